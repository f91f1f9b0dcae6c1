"""bitsandbytes as halfbyte serves it: the names of bitsandbytes, the classes and functions of halfbyte.

This package is what ``import bitsandbytes`` finds when halfbyte serves it (see :mod:`halfbyte._dropin`). It is loaded
under that name, and holds re-exports and the few helpers that mean nothing outside bitsandbytes, so
``isinstance(x, bitsandbytes.nn.Linear4bit)`` and ``isinstance(x, halfbyte.nn.Linear4bit)`` are one question. A name
that halfbyte does not have is an AttributeError that says so.

``python -m halfbyte.bitsandbytes path`` prints a folder that makes it importable for other processes, through
``PYTHONPATH``; ``python -m bitsandbytes`` prints what is there to run on.
"""

from halfbyte._dropin import SERVED_VERSION as __version__

from . import _ops as _ops
from . import autograd, cextension, consts, cuda_specs, functional, nn, optim, utils
from ._absent import absent
from .autograd._functions import MatmulLtState, matmul, matmul_4bit
from .nn import modules
from .optim import adam

features = {"multi_backend"}
"""Read by transformers and accelerate: with this, training on the CPU is allowed."""

supported_torch_devices = {"cpu", "cuda"}

__all__ = [
    "MatmulLtState",
    "__version__",
    "adam",
    "autograd",
    "cextension",
    "consts",
    "cuda_specs",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "optim",
    "supported_torch_devices",
    "utils",
]

__getattr__ = absent("bitsandbytes")
