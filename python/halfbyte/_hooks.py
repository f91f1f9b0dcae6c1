"""What ``import halfbyte`` leaves behind for libraries that may come later: one action after each one's import."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from halfbyte._dropin import AfterImport

if TYPE_CHECKING:
    from collections.abc import Callable


def _prepare_transformers() -> None:
    try:
        from halfbyte.integrations.transformers.quantizer import register
    except ImportError as error:  # a transformers that has moved what we build on must stay importable
        warnings.warn(f"halfbyte: models may not load or save quantized with this transformers: {error}", stacklevel=2)
    else:
        register()


def _prepare_peft() -> None:
    try:
        from halfbyte.integrations.peft import register
    except ImportError as error:
        warnings.warn(f"halfbyte: adapters may not train on experts with this peft: {error}", stacklevel=2)
    else:
        register()


def _prepare_accelerate() -> None:
    try:
        from halfbyte.integrations.accelerate import register
    except ImportError as error:
        warnings.warn(f"halfbyte: this accelerate may quantize models on GPUs only: {error}", stacklevel=2)
    else:
        register()


_ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.quantizers.auto": _prepare_transformers,
    "peft.tuners.lora.model": _prepare_peft,
    "accelerate.utils.bnb": _prepare_accelerate,
}


def install() -> None:
    """Prepare libraries that are imported already, and have the others prepared once they are."""
    for module, action in _ACTIONS.items():
        if module in sys.modules:
            action()
        elif not any(isinstance(finder, AfterImport) and finder.module == module for finder in sys.meta_path):
            hook: Any = AfterImport(module, action)
            sys.meta_path.insert(0, hook)
