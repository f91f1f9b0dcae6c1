"""bitsandbytes as halfbyte serves it: the names of bitsandbytes, the classes and functions of halfbyte.

This package is what ``import bitsandbytes`` finds when halfbyte serves it (see :mod:`halfbyte._dropin`); it is loaded
under that name and holds re-exports only, so ``isinstance(x, bitsandbytes.nn.Linear4bit)`` and
``isinstance(x, halfbyte.nn.Linear4bit)`` are one question. Served today: everything 4-bit and LLM.int8() that
transformers, peft and accelerate use. Asking for anything else raises an AttributeError that says so.
"""

from typing import Any

from halfbyte import MatmulLtState, matmul, matmul_4bit
from halfbyte._dropin import SERVED_VERSION as __version__

from . import functional, nn
from .nn import modules

features = {"multi_backend"}
"""Read by transformers and accelerate: with this, training on the CPU is allowed."""

supported_torch_devices = {"cpu", "cuda"}

__all__ = [
    "MatmulLtState",
    "__version__",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "supported_torch_devices",
]


def __getattr__(name: str) -> Any:
    from halfbyte import __version__ as version

    raise AttributeError(
        f"bitsandbytes is served by halfbyte {version} here, which has no bitsandbytes.{name}",
        name=name,
    )
