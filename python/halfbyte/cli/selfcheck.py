"""A quick check that this build computes rightly on this machine: against known bytes and plain torch arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import halfbyte
from halfbyte import functional

if TYPE_CHECKING:
    from collections.abc import Callable

# The codes of -1, -31/32, ... 31/32 as bitsandbytes 0.50.2 packs them.
_KNOWN_CODES = {
    "nf4": "000001111111122222333344455566677788999aaabbbccccddddeeeeeeeffff",
    "fp4": "bbbbbbaaaaaaaadddddccccfffeeee9901166667774444555552222222233333",
}


@dataclass
class Check:
    """One check: where, what, whether it passed, and what was seen."""

    device: str
    what: str
    ok: bool
    detail: str


def run() -> list[Check]:
    """Check quantizing, dequantizing and multiplying on the CPU and on every CUDA GPU that torch sees.

    Returns
    -------
    list of Check
        One for each device and operation. Errors are failed checks, not exceptions.
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    checks = []
    for device in devices:
        for what, check in (
            ("quantize", _quantize),
            ("quantize, nested scales", _nested),
            ("dequantize", _dequantize),
            ("matmul, one row", lambda device: _matmul(device, 1)),
            ("matmul, 64 rows", lambda device: _matmul(device, 64)),
        ):
            checks.append(_attempt(str(device), what, check, device))
    return checks


def _attempt(name: str, what: str, check: Callable[[torch.device], tuple[bool, str]], device: torch.device) -> Check:
    try:
        ok, detail = check(device)
    except Exception as error:  # whatever goes wrong is the finding
        ok, detail = False, f"{type(error).__name__}: {error}"
    return Check(name, what, ok, detail)


def _quantize(device: torch.device) -> tuple[bool, str]:
    weights = (torch.arange(64, dtype=torch.float32) / 32 - 1).to(device)
    wrong = []
    for quant_type, known in _KNOWN_CODES.items():
        packed, _ = functional.quantize_4bit(weights, quant_type=quant_type)
        codes = bytes(packed.flatten().tolist()).hex()
        if codes != known:
            wrong.append(f"{quant_type} gives {codes}, not {known}")
    return not wrong, "; ".join(wrong) or "codes as known for nf4 and fp4"


def _nested(device: torch.device) -> tuple[bool, str]:
    weights = _random(128, 1024)
    on_cpu, expected = functional.quantize_4bit(weights, compress_statistics=True, quant_type="nf4")
    packed, state = functional.quantize_4bit(weights.to(device), compress_statistics=True, quant_type="nf4")
    same = torch.equal(packed.cpu(), on_cpu)
    plain = functional.quantize_4bit(weights, quant_type="nf4")[1].absmax
    for nested in (expected, state):
        # Half the widest step of the 8-bit map, of the widest deviation from the mean.
        error = (_scales(nested).cpu() - plain).abs().max().item()
        same = same and error <= 0.008 * (plain - plain.mean()).abs().max().item()
    return same, f"codes {'equal' if same else 'differ from'} the CPU's, largest error of a scale {error:.1e}"


def _scales(state: functional.QuantState) -> torch.Tensor:
    nested, offset = state.state2, state.offset
    assert nested is not None and offset is not None
    assert nested.code is not None and nested.blocksize is not None
    scales = nested.absmax.repeat_interleave(nested.blocksize)[: state.absmax.numel()]
    return nested.code[state.absmax.long()] * scales + offset


def _dequantize(device: torch.device) -> tuple[bool, str]:
    worst = 0.0
    for quant_type in _KNOWN_CODES:
        packed, state = functional.quantize_4bit(_random(96, 321).to(device), quant_type=quant_type)
        expected = _plain_dequantize(packed, state)
        worst = max(worst, (functional.dequantize_4bit(packed, state) - expected).abs().max().item())
    return worst == 0.0, f"largest difference from table lookup {worst:.1e}"


def _plain_dequantize(packed: torch.Tensor, state: functional.QuantState) -> torch.Tensor:
    assert state.code is not None and state.shape is not None and state.blocksize is not None
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: math.prod(state.shape)]
    scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes.long()] * scales).reshape(state.shape)


def _matmul(device: torch.device, rows: int) -> tuple[bool, str]:
    worst = 0.0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)):
        packed, state = functional.quantize_4bit(_random(192, 320).to(device, dtype), quant_type="nf4")
        x = _random(rows, 320).to(device, dtype)
        # The weight is taken exactly as dequantizing gives it, in fp64 from there on.
        expected = x.double() @ functional.dequantize_4bit(packed, state).double().t()
        error = (halfbyte.matmul_4bit(x, packed, state).double() - expected).abs().max() / expected.abs().max()
        worst = max(worst, error.item() / tolerance)
    return worst <= 1.0, f"error {100 * worst:.0f} % of what is allowed in fp32, fp16, bf16"


def _random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
