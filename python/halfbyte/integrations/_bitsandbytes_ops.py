"""The operations of ``torch.ops.bitsandbytes`` on halfbyte's kernels: schemas, implementations, fakes.

Schemas are those of bitsandbytes 0.50. :func:`define` makes the operations where no bitsandbytes has made them (the
drop-in); :mod:`halfbyte.integrations.bitsandbytes` puts the implementations into those of an installed bitsandbytes.
"""

# ruff: noqa: ARG001, ARG005  # fakes and autograd functions take what their op takes
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import torch
from torch import Tensor

from halfbyte import functional as F
from halfbyte import ops
from halfbyte._optimizer_update import optimizer_update_8bit_blockwise, optimizer_update_32bit
from halfbyte._tables import NESTED_BLOCKSIZE, QUANT_TYPES, STORAGE_DTYPES, code_4bit
from halfbyte.errors import ArgumentError, DtypeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_STEP = "float gnorm_scale, bool skip_zeros=False"

SCHEMAS: Final = (
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    "int8_linear_matmul(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out(Tensor A, Tensor B, Tensor! out) -> ()",
    "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, "
    "Tensor? bias=None) -> Tensor",
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    "dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, "
    "Tensor! out) -> ()",
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    "dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, "
    "Tensor! out) -> ()",
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    "gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor! out) -> ()",
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, "
    f"float eps, float weight_decay, int step, float lr, {_STEP}) -> ()",
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    f"{_STEP}) -> ()",
)

# ---- 4-bit and blockwise 8-bit


def _dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    if tuple(out.shape) != tuple(shape):
        raise ShapeError(f"out: expected shape {list(shape)}, got {list(out.shape)}")
    _expect_dtype("out", out, dtype)
    ops.check_packed("A", A, shape)
    _write(out, lambda place: ops.dequantize_4bit_into(A, absmax, place, blocksize, quant_type))


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return ops.run_quantize_blockwise(A, code.to(torch.float32).contiguous(), blocksize)


def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return ops.run_dequantize_blockwise(A, absmax, code.to(torch.float32).contiguous(), blocksize, dtype)


def _dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    if out.shape != A.shape:
        raise ShapeError(f"out: expected shape {list(A.shape)}, got {list(out.shape)}")
    _expect_dtype("out", out, dtype)
    table = code.to(torch.float32).contiguous()
    _write(out, lambda place: ops.dequantize_blockwise_into(A, absmax, table, place, blocksize))


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    scales, nested = _statistics(absmax, absmax_8bit, absmax_code, absmax_offset)
    return ops.run_matmul_4bit(A, B, shapeB, scales, blocksize, quant_type, bias, *nested)


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    return ops.run_matmul_4bit(A, B, shapeB, absmax, blocksize, type_of_code(code))


def _gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    shape = (*A.shape[:-1], shapeB[0])
    if tuple(out.shape) != shape:
        raise ShapeError(f"out: expected shape {list(shape)}, got {list(out.shape)}")
    _expect_dtype("out", out, A.dtype)
    quant_type = type_of_code(code)
    _write(out, lambda place: ops.run_matmul_4bit(A, B, shapeB, absmax, blocksize, quant_type, out=place))


def _statistics(
    absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None, absmax_offset: Tensor | None
) -> tuple[Tensor, list[Any]]:
    """Turn the order of bitsandbytes' arguments for scales into that of halfbyte's."""
    if absmax_8bit is None:
        return absmax, [None, None, None, NESTED_BLOCKSIZE]
    if absmax_code is None or absmax_offset is None:
        raise ArgumentError("absmax_code, absmax_offset: expected both beside absmax_8bit, got None")
    return absmax_8bit, [absmax, absmax_code, absmax_offset.to(torch.float32), NESTED_BLOCKSIZE]


_known: dict[int, tuple[Any, int, str]] = {}


def type_of_code(code: Tensor) -> str:
    """Return the 4-bit type whose table `code` is. One on CUDA is looked at once, which waits for the device.

    Raises
    ------
    ArgumentError
        If it is no table of nf4 or fp4, to a rounding to bf16.
    """
    key = id(code)
    known = _known.get(key)
    if known is not None and known[0]() is code and known[1] == code._version:
        return known[2]
    if code.numel() == 16:
        values = code.detach().reshape(-1).to("cpu", torch.float32)
        for quant_type in QUANT_TYPES:
            if bool(((values - code_4bit(quant_type, "cpu")).abs() <= 2**-8).all()):
                _known[key] = (ref(code, lambda _: _known.pop(key, None)), code._version, quant_type)
                return quant_type
    raise ArgumentError(f"code: expected the 16 values of nf4 or fp4, got {list(code.shape)}")


def _expect_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise DtypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")


def _write(out: Tensor, run: Callable[[Tensor], object]) -> None:
    place = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    run(place)
    if place is not out:
        out.copy_(place)


# ---- LLM.int8() and optimizers: by their functions


def _int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    return F.int8_linear_matmul(A, B)


def _int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    F.int8_linear_matmul(A, B, out=out)


def _int8_double_quant(A: Tensor, threshold: float = 0.0) -> Any:
    return F.int8_double_quant(A, threshold=threshold)


def _int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    return F.int8_mm_dequant(A, row_stats, col_stats, bias=bias).to(dtype or torch.float16)


def _int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _int8_mm_dequant(_int8_linear_matmul(A, B), row_stats, col_stats, dtype, bias)


def _int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    product = _int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    if outlier_cols is None:
        return product, None
    part = A[:, outlier_cols].contiguous()
    if outlier_cols.numel():
        weight = F.int8_vectorwise_dequant(CB[:, outlier_cols].contiguous(), SCB).to(A.dtype)
        product = product.addmm(part, weight.t())
    return product, part


def _optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    *rates: Any,
    **more: Any,
) -> None:
    beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, *rest = rates
    optimizer_update_32bit(
        optimizer_name,
        g,
        p,
        state1,
        beta1,
        eps,
        step,
        lr,
        state2,
        beta2,
        beta3,
        alpha,
        weight_decay,
        gnorm_scale,
        unorm_vec,
        max_unorm,
        rest[0] if rest else more.get("skip_zeros", False),
    )


IMPLEMENTATIONS: Final[dict[str, Callable[..., Any]]] = {
    "quantize_4bit": ops.run_quantize_4bit,
    "dequantize_4bit": ops.run_dequantize_4bit,
    "dequantize_4bit.out": _dequantize_4bit_out,
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "dequantize_blockwise.out": _dequantize_blockwise_out,
    "gemm_4bit": _gemm_4bit,
    "gemv_4bit": _gemv_4bit,
    "gemv_4bit.out": _gemv_4bit_out,
}
"""4-bit and blockwise 8-bit operations, for CPU and CUDA."""

BY_FUNCTION: Final[dict[str, Callable[..., Any]]] = {
    "int8_linear_matmul": _int8_linear_matmul,
    "int8_linear_matmul.out": _int8_linear_matmul_out,
    "int8_vectorwise_quant": F.int8_vectorwise_quant,
    "int8_vectorwise_dequant": F.int8_vectorwise_dequant,
    "int8_double_quant": _int8_double_quant,
    "int8_mm_dequant": _int8_mm_dequant,
    "int8_scaled_mm": _int8_scaled_mm,
    "int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
    "optimizer_update_32bit": _optimizer_update_32bit,
    "optimizer_update_8bit_blockwise": optimizer_update_8bit_blockwise,
}
"""LLM.int8() and optimizers."""

# ---- fakes


def _fake_rows(A: Tensor) -> Tensor:
    return A.new_empty((A.numel() // A.shape[-1],), dtype=torch.float32)


def _fake_outliers(A: Tensor, threshold: float) -> Tensor | None:
    if not threshold:
        return None
    return A.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _fake_dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    ops.check_blocksize(blocksize)
    ops.check_quant_type(quant_type)
    ops.check_dtype("A", A.dtype, STORAGE_DTYPES)
    ops.check_dtype("dtype", dtype)
    return A.new_empty(tuple(shape), dtype=dtype)


def _fake_gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    *rest: Any,
    **more: Any,
) -> Tensor:
    ops.check_blocksize(blocksize)
    ops.check_quant_type(quant_type)
    return _fake_product(A, B, shapeB)


def _fake_product(A: Tensor, B: Tensor, shapeB: Sequence[int], *rest: Any) -> Tensor:
    ops.check_dtype("A", A.dtype)
    ops.check_dtype("B", B.dtype, STORAGE_DTYPES)
    if len(shapeB) != 2 or A.dim() < 1 or A.shape[-1] != shapeB[1]:
        raise ShapeError(f"A: expected shape [..., K] for a weight of shape {list(shapeB)}, got {list(A.shape)}")
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _fake_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return ops.empty_blockwise(A, blocksize)


def _fake_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)


def _fake_mixed(
    A: Tensor, CA: Tensor, CB: Tensor, SCA: Tensor, SCB: Tensor, outlier_cols: Any = None, bias: Any = None
) -> Any:
    part = None if outlier_cols is None else A.new_empty((A.shape[0], outlier_cols.shape[0]))
    return A.new_empty((*CA.shape[:-1], CB.shape[0])), part


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


_FAKES: Final[dict[str, Callable[..., Any]]] = {
    "quantize_4bit": ops.empty_4bit,
    "dequantize_4bit": _fake_dequantize_4bit,
    "dequantize_4bit.out": _nothing,
    "quantize_blockwise": _fake_blockwise,
    "dequantize_blockwise": lambda A, absmax, code, blocksize, dtype: torch.empty_like(
        A, dtype=dtype, memory_format=torch.contiguous_format
    ),
    "dequantize_blockwise.out": _nothing,
    "gemm_4bit": _fake_gemm_4bit,
    "gemv_4bit": _fake_product,
    "gemv_4bit.out": _nothing,
    "int8_linear_matmul": _fake_linear_matmul,
    "int8_linear_matmul.out": _nothing,
    "int8_vectorwise_quant": lambda A, threshold=0.0: (
        torch.empty_like(A, dtype=torch.int8, memory_format=torch.contiguous_format),
        _fake_rows(A),
        _fake_outliers(A, threshold),
    ),
    "int8_vectorwise_dequant": lambda A, stats: torch.empty_like(A, dtype=torch.float32),
    "int8_double_quant": lambda A, threshold=0.0: (
        torch.empty_like(A, dtype=torch.int8),
        torch.empty_like(A, dtype=torch.int8),
        _fake_rows(A),
        A.new_empty((A.shape[-1],), dtype=torch.float32),
        _fake_outliers(A, threshold),
    ),
    "int8_mm_dequant": lambda A, row_stats, col_stats, dtype=None, bias=None: torch.empty_like(
        A, dtype=dtype or torch.float16
    ),
    "int8_scaled_mm": lambda A, B, row_stats, col_stats, bias=None, dtype=None: A.new_empty(
        (*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16
    ),
    "int8_mixed_scaled_mm": _fake_mixed,
    "optimizer_update_32bit": _nothing,
    "optimizer_update_8bit_blockwise": _nothing,
}

# ---- autograd of gemm_4bit, which bitsandbytes' own has not: to A and bias


def _gemm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, bias, *nested = inputs
    ctx.has_bias = bias is not None
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(B, absmax, *nested)


def _gemm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_A = grad_bias = None
    if ctx.needs_input_grad[0]:
        B, *given = ctx.saved_tensors
        scales, nested = _statistics(*given)
        grad_A = torch.ops.halfbyte.matmul_4bit_grad_input.default(
            grad, B, ctx.shape, scales, ctx.blocksize, ctx.quant_type, *nested
        )
    if ctx.has_bias and ctx.needs_input_grad[6]:
        grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
    return (grad_A, None, None, None, None, None, grad_bias, None, None, None)


_library: torch.library.Library | None = None


def define() -> None:
    """Make ``torch.ops.bitsandbytes``; once a process. A bitsandbytes that is imported already has made its own.

    Raises
    ------
    RuntimeError
        torch's, if the operations are there already.
    """
    global _library
    if _library is not None:
        return
    library: Any = torch.library.Library("bitsandbytes", "DEF")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        library.define(schema)
    for name, run in (IMPLEMENTATIONS | BY_FUNCTION).items():
        for device in ("CPU", "CUDA"):
            library.impl(name, run, device)
        torch.library.register_fake(f"bitsandbytes::{name}", lib=library)(_FAKES[name])
    torch.library.register_autograd("bitsandbytes::gemm_4bit", _gemm_backward, setup_context=_gemm_setup, lib=library)
    _library = library
