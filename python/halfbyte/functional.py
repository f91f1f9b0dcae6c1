"""4-bit, blockwise 8-bit and LLM.int8() quantization as functions, with bitsandbytes' signatures.

Tensors are torch's, on CPU or CUDA; NumPy arrays and other DLPack producers are accepted for every input, and the main
result goes back to the library of the first argument (statistics stay torch tensors, in the
:class:`~halfbyte.quant_state.QuantState`). Input is fp32, fp16 or bf16 in any layout; arithmetic is fp32, whatever
torch's default dtype, default device or autocast say. Nothing here is differentiable except
:func:`~halfbyte.matmul_4bit`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte._int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from halfbyte._interop import giver_back, to_torch
from halfbyte._matmul import matmul_4bit, statistics
from halfbyte._optimizer_update import optimizer_update_8bit_blockwise, optimizer_update_32bit
from halfbyte._tables import FLOAT_DTYPES, NESTED_BLOCKSIZE, STORAGE_DTYPES, code_4bit, dynamic_map, dynamic_values
from halfbyte.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from halfbyte.quant_state import QuantState

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "matmul_4bit",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]

_DEFAULT_4BIT = 64
_DEFAULT_8BIT = 4096


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """Return the values of a dynamic 8-bit map, fp32 ``[256]`` ascending, on the CPU.

    Raises
    ------
    ArgumentError
        If the arguments do not make a map of ``2**total_bits`` values.
    """
    if (max_exponent_bits, total_bits) == (7, 8):
        return dynamic_map(signed).clone()
    values = dynamic_values(signed, max_exponent_bits, total_bits)
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """Return the 16 values of a 4-bit type in code order, fp32 ``[16]``.

    Parameters
    ----------
    typename
        ``"nf4"``, ``"fp4"``, ``"af4"`` or ``"int4"``. Only the first two can be quantized to.
    device
        Default: CUDA where there is a GPU, else the CPU.
    blocksize
        AF4 exists for 64 only; the others do not depend on it.

    Raises
    ------
    ArgumentError
        If there is no such type.
    """
    if typename == "af4" and blocksize != 64:
        raise ArgumentError(f"blocksize: expected 64, the only one AF4 is defined for, got {blocksize}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return code_4bit(typename, device).clone()


def quantize_4bit(
    A: Any,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
    *,
    scale_search: bool = False,
) -> tuple[Any, QuantState]:
    """Quantize a tensor to 4 bits an element.

    Parameters
    ----------
    A
        What to quantize: fp32, fp16 or bf16, any shape and layout.
    absmax
        Where to write the scales, fp32 ``[nblocks]`` contiguous.
    out
        Where to write the packed bytes, of `quant_storage` and the shape returned, contiguous.
    blocksize
        Elements that share a scale, across rows: 32, 64 (default), 128, 256, 512, 1024, 2048 or 4096.
    compress_statistics
        Quantize the scales too (double quantization, Dettmers et al. 2023, arXiv:2305.14314): 4.127 instead of 4.5
        bits an element at blocksize 64.
    quant_type
        ``"nf4"`` or ``"fp4"``.
    quant_storage
        Element type that the bytes are viewed as: uint8, int8, fp16, bf16 or fp32. A last item that is not full is
        filled with zero bytes.
    scale_search
        Pick each block's scale, and its sign, by least squared error instead of its largest magnitude: about 18 %
        less squared error for NF4 and 14 % for FP4 at blocksize 64. The result is of the same format, and what reads
        the one reads the other. Before the scales are quantized too, no block's error is larger than without.

    Returns
    -------
    packed : Tensor
        ``[⌈⌈n/2⌉ / itemsize⌉, 1]``; byte j holds element 2j in its high and 2j+1 in its low half.
    state : QuantState
        What :func:`dequantize_4bit` and :func:`~halfbyte.matmul_4bit` need beside it.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError, DeviceError
        If an argument is outside its domain. Nothing is written then.

    Notes
    -----
    Codes are the nearest value to ``x / absmax``. A block with a NaN has scale NaN; one with an infinity decodes to
    NaN where its finite elements were. A block of zeros has NF4 code 7 on the CPU and 0 on CUDA, as in bitsandbytes.
    """
    give_back = giver_back(A)
    a = to_torch(A, "A").detach()
    blocksize = _DEFAULT_4BIT if blocksize is None else blocksize
    ops.check_device("A", a)
    ops.check_dtype("A", a.dtype)
    ops.check_blocksize(blocksize)
    ops.check_quant_type(quant_type)
    ops.check_dtype("quant_storage", quant_storage, STORAGE_DTYPES)
    n = a.numel()
    if absmax is not None:
        _check_place("absmax", absmax, (-(-n // blocksize),), torch.float32, a.device)
    if out is not None:
        _check_place("out", out, (-(-((n + 1) // 2) // quant_storage.itemsize), 1), quant_storage, a.device)
    if not ops.is_eager(a):
        op = torch.ops.halfbyte.quantize_4bit_search if scale_search else torch.ops.halfbyte.quantize_4bit
        packed, scales = op.default(a, blocksize, quant_type, quant_storage)
    elif absmax is None and out is None and not scale_search:
        packed, scales = ops.run_quantize_4bit(a, blocksize, quant_type, quant_storage)
    else:
        packed, scales = ops.empty_4bit(a, blocksize, quant_type, quant_storage)
        packed, scales = packed if out is None else out, scales if absmax is None else absmax
        ops.quantize_4bit_into(a, packed, scales, quant_type, blocksize, scale_search)
    packed, scales = _copied(packed, out), _copied(scales, absmax)
    code = code_4bit(quant_type, a.device)
    if not compress_statistics:
        return give_back(packed), QuantState(scales, a.shape, code, blocksize, quant_type, a.dtype)
    codes, offset, state2 = _compress(scales, dynamic_map(True, a.device), NESTED_BLOCKSIZE)
    if scale_search:
        packed = _encode(a, packed, codes, blocksize, quant_type, state2.absmax, state2.code, offset)
    return give_back(packed), QuantState(codes, a.shape, code, blocksize, quant_type, a.dtype, offset, state2)


def quantize_nf4(
    A: Any,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
    *,
    scale_search: bool = False,
) -> tuple[Any, QuantState]:
    """Quantize to NF4: :func:`quantize_4bit` with ``quant_type="nf4"``."""
    return quantize_4bit(
        A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage, scale_search=scale_search
    )


def quantize_fp4(
    A: Any,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
    *,
    scale_search: bool = False,
) -> tuple[Any, QuantState]:
    """Quantize to FP4: :func:`quantize_4bit` with ``quant_type="fp4"``."""
    return quantize_4bit(
        A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage, scale_search=scale_search
    )


def dequantize_4bit(
    A: Any,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Any:
    """Dequantize what :func:`quantize_4bit` packed.

    Parameters
    ----------
    A
        Packed bytes, of any storage dtype.
    quant_state
        Their state. Without it, `absmax` and `out` are needed, and `blocksize` (default 64) and `quant_type` count.
    absmax
        Scales, fp32 ``[nblocks]``.
    out
        Where to write the result. Its dtype is the result's.

    Returns
    -------
    Tensor
        Of ``quant_state.shape`` and ``quant_state.dtype``, or `out`. Transposed when `A` is ``[1, bytes]``: callers
        that pass ``packed.t()`` want ``weight.t()``.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError, DeviceError
        If arguments are missing or do not fit together. Nothing is written then.
    """
    give_back = giver_back(A)
    packed = to_torch(A, "A").detach()
    if quant_state is None:
        if absmax is None or out is None:
            raise ArgumentError("absmax, out: dequantize_4bit requires both when quant_state is not provided")
        blocksize = _DEFAULT_4BIT if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    ops.check_device("A", packed)
    ops.check_dtype("A", packed.dtype, STORAGE_DTYPES)
    shape, dtype = quant_state.shape, quant_state.dtype
    if shape is None or dtype is None or quant_state.blocksize is None or quant_state.quant_type is None:
        raise ArgumentError(f"quant_state: expected a complete 4-bit state, got {quant_state}")
    ops.check_packed("A", packed, shape)
    ops.check_blocksize(quant_state.blocksize)
    ops.check_quant_type(quant_state.quant_type)
    if out is not None:
        if prod(out.shape) != prod(shape):
            raise ShapeError(f"out: expected shape {list(shape)}, got {list(out.shape)}")
        ops.check_dtype("out", out.dtype)
        dtype = out.dtype
    scales, nested = statistics(quant_state, packed.device)
    blocksize, quant_type = quant_state.blocksize, quant_state.quant_type
    if not ops.is_eager(packed):
        result = torch.ops.halfbyte.dequantize_4bit.default(
            packed, scales, blocksize, quant_type, tuple(shape), dtype, *nested
        )
        result = result if out is None else out.copy_(result.view(out.shape))
    elif out is None:
        result = ops.run_dequantize_4bit(packed, scales, blocksize, quant_type, shape, dtype, *nested)
    else:
        place = out if _is_plain(out) else torch.empty(out.shape, dtype=dtype, device=packed.device)
        ops.dequantize_4bit_into(packed, scales, place, blocksize, quant_type, *nested)
        result = _copied(place, out)
    # [1, 1] is a tensor of one or two elements, packed as usual, and no one's transpose.
    transposed = packed.dim() == 2 and packed.shape[0] == 1 and packed.shape[1] != 1 and result.dim() == 2
    return give_back(result.t() if transposed else result)


def dequantize_nf4(
    A: Any,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Any:
    """Dequantize NF4: :func:`dequantize_4bit` with ``quant_type="nf4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: Any,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Any:
    """Dequantize FP4: :func:`dequantize_4bit` with ``quant_type="fp4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,  # noqa: ARG001
    transposed_B: bool = False,  # noqa: ARG001
    state: QuantState | None = None,
) -> Tensor:
    """Multiply one vector (or a few) by a 4-bit weight, without a gradient.

    Kept for callers of bitsandbytes' function of that name; :func:`~halfbyte.matmul_4bit` does the same for any
    number of rows.

    Parameters
    ----------
    A
        ``[..., K]``, fp32, fp16 or bf16.
    B
        Packed weight.
    out
        Where to write the result.
    transposed_A, transposed_B
        Accepted and without effect: which way round the weight is, its state says.
    state
        State of `B`; required.

    Returns
    -------
    Tensor
        ``[..., N]`` of A's dtype.

    Raises
    ------
    ArgumentError
        If `state` is None; and what :func:`~halfbyte.matmul_4bit` raises.
    """
    if state is None:
        raise ArgumentError("state: gemv_4bit requires the quantization state of B")
    with torch.no_grad():
        product: Tensor = matmul_4bit(A, B, state, out)
    return product


def quantize_blockwise(
    A: Any,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = _DEFAULT_8BIT,
    nested: bool = False,
) -> tuple[Any, QuantState]:
    """Quantize a tensor to 8 bits an element with a table of 256 values.

    Parameters
    ----------
    A
        What to quantize: fp32, fp16 or bf16, any shape and layout.
    code
        The values, fp32 ``[256]`` ascending; default the signed dynamic map (Dettmers et al. 2021, arXiv:2110.02861).
    absmax
        Where to write the scales, fp32 ``[nblocks]`` contiguous.
    out
        Where to write the codes, uint8 of A's shape, contiguous.
    blocksize
        Elements that share a scale. On CUDA a power of two from 64 to 4096; on the CPU any positive number.
    nested
        Quantize the scales as well, with the same block size.

    Returns
    -------
    codes : Tensor
        uint8 of A's shape.
    state : QuantState
        What :func:`dequantize_blockwise` needs beside it.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError, DeviceError
        If an argument is outside its domain. Nothing is written then.

    Notes
    -----
    Each code is that of the nearest value, on both devices. (bitsandbytes' CPU code rounds to a grid of 65,536 levels
    first, which gets most small values wrong. Statistics nested inside a state are made that way here as well, on the
    CPU, so that they equal bitsandbytes' to the byte.)
    """
    give_back = giver_back(A)
    a = to_torch(A, "A").detach()
    ops.check_device("A", a)
    ops.check_dtype("A", a.dtype)
    code = dynamic_map(True, a.device) if code is None else _table(to_torch(code, "code"), a.device)
    if absmax is not None:
        _check_place("absmax", absmax, (-(-a.numel() // blocksize),), torch.float32, a.device)
    if out is not None:
        _check_place("out", out, a.shape, torch.uint8, a.device)
    if not ops.is_eager(a):
        codes, scales = torch.ops.halfbyte.quantize_blockwise.default(a, code, blocksize)
    else:
        codes, scales = ops.empty_blockwise(a, blocksize)
        codes, scales = codes if out is None else out, scales if absmax is None else absmax
        ops.quantize_blockwise_into(a, code, codes, scales, blocksize)
    codes, scales = _copied(codes, out), _copied(scales, absmax)
    if not nested:
        return give_back(codes), QuantState(scales, code=code, blocksize=blocksize, dtype=a.dtype)
    scale_codes, offset, state2 = _compress(scales, code, blocksize)
    state = QuantState(scale_codes, code=code, blocksize=blocksize, dtype=a.dtype, offset=offset, state2=state2)
    return give_back(codes), state


def dequantize_blockwise(
    A: Any,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = _DEFAULT_8BIT,
    nested: bool = False,  # noqa: ARG001
) -> Any:
    """Dequantize what :func:`quantize_blockwise` made.

    Parameters
    ----------
    A
        Codes, uint8.
    quant_state
        Their state. Without it `absmax` is needed, `code` (default the signed dynamic map) and `blocksize` count, and
        the result is fp32.
    absmax
        Scales, fp32 ``[nblocks]``.
    code
        The values, fp32 ``[256]``.
    out
        Where to write the result. Its dtype is the result's.
    blocksize
        Elements that share a scale.
    nested
        Accepted and without effect: the state says whether its scales are quantized.

    Returns
    -------
    Tensor
        Of A's shape and ``quant_state.dtype``, or `out`.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError, DeviceError
        If arguments are missing or do not fit together. Nothing is written then.
    """
    give_back = giver_back(A)
    codes = to_torch(A, "A").detach()
    ops.check_device("A", codes)
    ops.check_dtype("A", codes.dtype, (torch.uint8,))
    if quant_state is None:
        if absmax is None:
            raise ArgumentError("absmax: dequantize_blockwise requires it when quant_state is not provided")
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if quant_state.blocksize is None:
        raise ArgumentError("quant_state.blocksize: expected a number, got None")
    blocksize = quant_state.blocksize
    values = dynamic_map(True, codes.device) if quant_state.code is None else _table(quant_state.code, codes.device)
    scales, (inner, inner_code, offset, inner_block) = statistics(quant_state, codes.device)
    if inner is not None:
        scales = _decode(scales, inner, inner_code, inner_block, torch.float32, offset)
    if out is None:
        return give_back(_decode(codes, scales, values, blocksize, quant_state.dtype or torch.float32))
    if out.shape != codes.shape:
        raise ShapeError(f"out: expected shape {list(codes.shape)}, got {list(out.shape)}")
    if ops.is_eager(codes) and _is_plain(out):
        ops.check_dtype("out", out.dtype)
        ops.dequantize_blockwise_into(codes, scales, values, out, blocksize)
        return give_back(out)
    return give_back(out.copy_(_decode(codes, scales, values, blocksize, out.dtype)))


def _decode(codes: Tensor, absmax: Tensor, code: Any, blocksize: Any, dtype: torch.dtype, offset: Any = None) -> Tensor:
    run: Any = ops.run_dequantize_blockwise
    if not ops.is_eager(codes):
        run = torch.ops.halfbyte.dequantize_blockwise.default
    result: Tensor = run(codes, absmax, code, blocksize, dtype, offset)
    return result


def _encode(a: Tensor, packed: Tensor, codes: Tensor, blocksize: int, quant_type: str, *nested: Any) -> Tensor:
    """Choose the codes again, for the scales that readers will decode."""
    if not ops.is_eager(a):
        encoded: Tensor = torch.ops.halfbyte.encode_4bit.default(a, packed, codes, blocksize, quant_type, *nested)
        return packed.copy_(encoded)
    ops.encode_4bit_into(a, packed, codes, quant_type, blocksize, *nested)
    return packed


def _compress(absmax: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor, QuantState]:
    """Quantize scales: their codes, their mean, and the state of the codes."""
    # torch's mean, so that it is bitsandbytes' to the last bit.
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    run: Any = ops.run_quantize_blockwise if ops.is_eager(absmax) else torch.ops.halfbyte.quantize_blockwise.default
    codes, scales = run(absmax, code, blocksize, offset, absmax.device.type == "cpu")
    return codes, offset, QuantState(scales, code=code, blocksize=blocksize, dtype=torch.float32)


def _table(code: Tensor, device: torch.device) -> Tensor:
    if code.numel() != 256:
        raise ShapeError(f"code: expected 256 values, got shape {list(code.shape)}")
    ops.check_dtype("code", code.dtype, FLOAT_DTYPES)
    return code.detach().to(device, torch.float32).reshape(-1).contiguous()


def _check_place(
    name: str, place: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    """Check a tensor given to be written to."""
    if not isinstance(place, Tensor):
        raise DtypeError(f"{name}: expected a torch tensor, got {type(place).__name__}")
    if place.dtype != dtype:
        raise DtypeError(f"{name}: expected dtype {dtype}, got {place.dtype}")
    if tuple(place.shape) != tuple(shape) or not place.is_contiguous():
        raise ShapeError(f"{name}: expected a contiguous tensor of shape {list(shape)}, got {list(place.shape)}")
    if place.device != device:
        raise DeviceError(f"{name}: expected a tensor on {device}, got one on {place.device}")


def _is_plain(out: Tensor) -> bool:
    return type(out) in ops.PLAIN_TENSORS and out.is_contiguous()


def _copied(result: Tensor, place: Tensor | None) -> Tensor:
    """Return `result`, in `place` if that was given and is another tensor."""
    return result if place is None or place is result else place.copy_(result)
