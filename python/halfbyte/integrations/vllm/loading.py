"""vLLM's model loaders, taught to put the entries of quantized checkpoints together."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from halfbyte.integrations.vllm.checkpoint import join
from halfbyte.integrations.vllm.config import BITSANDBYTES
from halfbyte.integrations.vllm.gated import fuse_gates

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

_OTHER: Final = ("dummy", "sharded_state", "tensorizer", "bitsandbytes", "gguf")
"""Load formats whose loaders read no checkpoint of that kind, or not through ``model.load_weights``."""


def joining(loader: type[Any]) -> type[Any]:
    """Return a subclass of `loader` that joins the entries of quantized weights, for models that halfbyte quantizes."""

    class Joining(loader):  # type: ignore[misc]
        """A loader of vLLM's that gives a model each quantized weight as one."""

        joins_packed_weights = True

        def __init__(self, load_config: Any, *arguments: Any, **options: Any) -> None:
            if load_config.load_format == BITSANDBYTES:  # an old flag; the files are the usual ones
                load_config = copy.copy(load_config)
                load_config.load_format = "auto"
            super().__init__(load_config, *arguments, **options)

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            """Load weights into a model."""
            if model_config.quantization not in METHODS:
                super().load_weights(model, model_config)
                return
            load: Any = model.load_weights

            def load_joined(weights: Iterable[Any], *arguments: Any, **options: Any) -> Any:
                return load(join(weights, model_config.dtype), *arguments, **options)

            # On the instance, over the class's method, and for this call only.
            model.__dict__["load_weights"] = load_joined
            try:
                super().load_weights(model, model_config)
            finally:
                del model.__dict__["load_weights"]
            fuse_gates(model)

    Joining.__name__ = Joining.__qualname__ = loader.__name__
    Joining.__module__ = loader.__module__
    return Joining


METHODS: set[str] = set()
"""Names of quantization methods whose models are loaded here."""


def register(methods: Iterable[str]) -> None:
    """Put :func:`joining` loaders in the place of vLLM's, and one for the load format ``bitsandbytes``.

    The last is left alone where something else provides it, unless `methods` has that name.
    """
    METHODS.update(methods)
    # Not by register_model_loader, which warns of every name that it knows already.
    registry: dict[str, type[Any]] = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    taught: dict[type[Any], type[Any]] = {}
    for load_format, loader in registry.items():
        if load_format in _OTHER or getattr(loader, "joins_packed_weights", False):
            continue
        if loader not in taught:
            taught[loader] = joining(loader)
        registry[load_format] = taught[loader]
    if BITSANDBYTES in METHODS:
        registry[BITSANDBYTES] = joining(DefaultModelLoader)
