"""4-bit and 8-bit quantization for PyTorch, with a Rust core.

>>> import torch, halfbyte as hb
>>> weight = torch.randn(32, 64)
>>> packed, state = hb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
>>> hb.matmul_4bit(torch.randn(2, 64), packed, state).shape
torch.Size([2, 32])

Importing this package makes an absent ``bitsandbytes`` importable (``HALFBYTE_NO_DROPIN=1`` turns that off);
:func:`replace_bitsandbytes` does it to an installed one.
"""

from typing import Any

from halfbyte import _dropin, _hooks, _native, errors, functional, nn, ops, optim
from halfbyte._dropin import replace_bitsandbytes
from halfbyte._fuse import fuse_linears, unfuse_linears
from halfbyte._gated import matmul_4bit_gated
from halfbyte._grouped import matmul_4bit_experts, matmul_4bit_group
from halfbyte._int8 import MatmulLtState, matmul
from halfbyte._matmul import matmul_4bit
from halfbyte._model import quantize_model
from halfbyte._next import prefetch_linears
from halfbyte.quant_state import QuantState

__version__: str = _native.build_info()["version"]

__all__ = [
    "HalfbyteConfig",
    "MatmulLtState",
    "QuantState",
    "__version__",
    "errors",
    "functional",
    "fuse_linears",
    "matmul",
    "matmul_4bit",
    "matmul_4bit_experts",
    "matmul_4bit_gated",
    "matmul_4bit_group",
    "nn",
    "ops",
    "optim",
    "prefetch_linears",
    "quantize_model",
    "replace_bitsandbytes",
    "unfuse_linears",
]

_dropin.install()
_hooks.install()


def __getattr__(name: str) -> Any:
    if name == "HalfbyteConfig":  # imports transformers
        from halfbyte.integrations.transformers import HalfbyteConfig

        return HalfbyteConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
