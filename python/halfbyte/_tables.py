"""Code tables as tensors: 4-bit types and dynamic 8-bit maps, made once a device.

The values are facts of the formats (bitsandbytes' NF4, FP4 and dynamic maps); the Rust crate holds the same ones, and
the tests compare the two. Tables are fp32 whatever torch's default dtype is. Those that :func:`code_4bit` and
:func:`dynamic_map` return are shared between callers: clone one before writing it to a file or into it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.errors import ArgumentError

BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes of the 4-bit formats."""

QUANT_TYPES: Final = ("nf4", "fp4")
"""4-bit types that the kernels know and that checkpoints can hold."""

NESTED_BLOCKSIZE: Final = 256
"""Block size of nested statistics (double quantization)."""

FLOAT_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
"""Element types of what is quantized, multiplied or dequantized."""

STORAGE_DTYPES: Final = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
"""Element types that packed bytes may be viewed as."""

# From the Rust core, in code order. Code 8 of FP4 is a plain zero in bitsandbytes' table, and so in every file: + 0.0
# makes one of the core's -0.0 and changes nothing else.
_NF4 = tuple(_native.code_values("nf4"))
_FP4 = tuple(value + 0.0 for value in _native.code_values("fp4"))
# Two tables that no kernel uses, for callers of get_4bit_type only.
_AF4 = (
    1.0,
    0.72424863,
    0.55496234,
    0.42563882,
    0.31675666,
    0.21961274,
    0.12934483,
    0.04273164,
    0.0,
    -0.04934812,
    -0.14982478,
    -0.25607552,
    -0.3736951,
    -0.51243739,
    -0.69441008,
    -1.0,
)
_INT4 = tuple(v / 7 for v in (7, 6, 5, 4, 3, 2, 1, 0, -0.0, -1, -2, -3, -4, -5, -6, -7))

# From the Rust core, not from dynamic_values: those bits depend on how torch vectorizes linspace on the machine.
_SIGNED = tuple(_native.dynamic_map(True))
_UNSIGNED = tuple(_native.dynamic_map(False))

_VALUES = {"nf4": _NF4, "fp4": _FP4, "af4": _AF4, "int4": _INT4}

_cache: dict[tuple[str, torch.device], Tensor] = {}


def _shared(name: str, values: tuple[float, ...], device: torch.device | str | None) -> Tensor:
    where = torch.device("cpu" if device is None else device)
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
        # Someone traces: a shared table is none of the tensors that they know, and theirs may be no real one.
        return torch.tensor(values, dtype=torch.float32, device=where)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    table = _cache.get((name, where))
    if table is None:
        # An inference tensor in the cache could never be saved for a backward pass.
        with torch.inference_mode(False):
            table = torch.tensor(values, dtype=torch.float32, device=where)
        if where.type == "cuda" and name in QUANT_TYPES:
            _native.remember_code(table.data_ptr(), name)  # C callers say the type by this address
        _cache[name, where] = table
    return table


def code_4bit(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """Return the 16 values of a 4-bit type in code order, fp32 ``[16]``, shared.

    Raises
    ------
    ArgumentError
        If `quant_type` is not ``"nf4"``, ``"fp4"``, ``"af4"`` or ``"int4"``.
    """
    values = _VALUES.get(quant_type)
    if values is None:
        raise ArgumentError(f"quant_type: expected one of {', '.join(map(repr, _VALUES))}, got {quant_type!r}")
    return _shared(quant_type, values, device)


def dynamic_map(signed: bool = True, device: torch.device | str | None = None) -> Tensor:
    """Return the dynamic 8-bit map, fp32 ``[256]`` ascending, shared."""
    return _shared("signed", _SIGNED, device) if signed else _shared("unsigned", _UNSIGNED, device)


def dynamic_values(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> tuple[float, ...]:
    """Return the 256 values of a dynamic map, ascending.

    Each exponent step covers a decade below the last with half as many values: the midpoints of evenly spaced bounds
    between 0.1 and 1, scaled by a power of ten, all in fp32, so that the bits are those of bitsandbytes' map
    (Dettmers et al. 2021, arXiv:2110.02861).

    Raises
    ------
    ArgumentError
        If the arguments do not make exactly ``2**total_bits`` values (or more than 256).
    """
    if not 2 <= total_bits <= 8 or not 1 <= max_exponent_bits <= 16:
        raise ArgumentError(
            "total_bits, max_exponent_bits: expected 2 to 8 and 1 to 16, "
            f"got total_bits={total_bits}, max_exponent_bits={max_exponent_bits}"
        )
    magnitude_bits = total_bits - 1
    values = [0.0, 1.0]
    for step in range(max_exponent_bits):
        items = int(2.0 ** (step + magnitude_bits - max_exponent_bits + (0 if signed else 1)))
        values += _decade(items, step - max_exponent_bits + 1, signed)
    # With fewer exponent steps than bits, values are left over; they go to the top decade.
    spare = 2 ** max(magnitude_bits - max_exponent_bits, 0) - 1
    values += _decade(spare, 0, signed)
    if len(values) != 2**total_bits:
        raise ArgumentError(
            f"max_exponent_bits: with total_bits={total_bits} and signed={signed}, {max_exponent_bits} exponent steps "
            f"make {len(values)} values, expected {2**total_bits}"
        )
    return tuple(sorted(values + [0.0] * (256 - len(values))))


def _decade(items: int, exponent: int, signed: bool) -> list[float]:
    if items < 1:
        return []
    bounds = torch.linspace(0.1, 1, items + 1, dtype=torch.float32, device="cpu")
    scaled: list[float] = ((bounds[:-1] + bounds[1:]) / 2 * 10.0**exponent).tolist()
    return scaled + [-v for v in scaled] if signed else scaled
