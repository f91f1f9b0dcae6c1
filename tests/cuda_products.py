"""What the tests of products on a GPU share: weights, kind and hostile, and the error of a product."""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.functional import dequantize_4bit

HALVES = [torch.bfloat16, torch.float16]
# Code, block size, whether scales are nested.
CODES = [
    ("nf4", 64, False),
    ("nf4", 64, True),
    ("fp4", 64, False),
    ("nf4", 128, False),
    ("nf4", 4096, True),
    ("fp4", 256, True),
]
HOSTILE = ["one huge block", "alternating signs", "zeros", "subnormal scales"]


def weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(n, k, device="cuda") * 0.02).to(dtype)


def hostile_weight(case: str, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """A weight of one of the kinds ``HOSTILE``, within what ``dtype`` holds."""
    wide = dtype == torch.bfloat16
    w = torch.randn(n, k, device="cuda") * 0.02
    if case == "one huge block":
        w[5, 64:128] *= 1e6 if wide else 1e3
    elif case == "alternating signs":
        w = w.abs() * (1 - 2 * (torch.arange(k, device="cuda") % 2))
    elif case == "zeros":
        w[:, : k // 2] = 0
    else:
        w *= 1e-38 if wide else 1e-5
    return w.to(dtype)


def exact_weight(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """The weight as code × scale in fp32."""
    dtype, state.dtype = state.dtype, torch.float32
    dense = dequantize_4bit(packed, state)
    state.dtype = dtype
    return dense


def error(out: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Relative error against double precision."""
    expected = x.double() @ dense.double().t()
    if bias is not None:
        expected += bias.double()
    return float((out.double() - expected).norm() / expected.norm())
