"""The operations of LLM.int8() in ``torch.ops.halfbyte``: schema, implementation, fake and autograd.

==============================  ======================================================================================
``int8_linear``                 a whole layer: ``A [..., K]`` quantized by rows, times codes ``[N, K]``ᵀ, outlier
                                columns in floating point, + bias → ``[..., N]``; gradient to `A` and `bias`
``int8_linear_outliers``        the same, and the bitmap of outlier columns
``int8_linear_dense``           the same layer with unquantized activations
``int8_linear_grad_input``      ``grad [..., N]`` × dequantized codes → ``[..., K]``; the backward of those above
``int8_vectorwise_quant``       float ``[..., K]`` → int8 of its shape, fp32 ``[rows]``, outlier columns int64 or None
``int8_double_quant``           the same by rows and by columns
``int8_vectorwise_dequant``     int8 ``[..., K]`` and fp32 ``[rows]`` → fp32
``int8_linear_matmul``          int8 ``[..., K]`` × int8 ``[N, K]``ᵀ → int32 ``[..., N]``; also into ``out``
``int8_scaled_mm``              the same, scaled to floating point, + bias
``int8_mixed_scaled_mm``        the same, plus outlier columns in floating point
``int8_mm_dequant``             int32 ``[..., N]``, scaled to floating point, + bias
==============================  ======================================================================================

The first four have static shapes, wait for nothing and can be captured in a CUDA graph. ``outlier_cols`` of the others
has a size that depends on the data, so making it waits for the device.
"""

# ruff: noqa: ARG001  # fakes and autograd functions take what their op takes
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte import _native, ops
from halfbyte._tables import FLOAT_DTYPES
from halfbyte.errors import DeviceError, DtypeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable

_INT8: Final = (torch.int8,)
_INT32: Final = (torch.int32,)
_FP32: Final = (torch.float32,)


# ---- checks, also run by the fakes


def _rows(x: Tensor) -> int:
    """Product of all sizes but the last."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def _check_rows(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    ops.check_dtype(name, x.dtype, allowed)
    if x.dim() < 1:
        raise ShapeError(f"{name}: expected shape [..., K], got []")


def _check_vector(name: str, x: Tensor | None, size: int, dtypes: tuple[torch.dtype, ...] = _FP32) -> None:
    """Raise unless `x`, in whatever shape, holds `size` numbers."""
    if x is None:
        return
    ops.check_dtype(name, x.dtype, dtypes)
    if x.numel() != size:
        raise ShapeError(f"{name}: expected {size} numbers, got shape {list(x.shape)}")


def _check_weight(name: str, B: Tensor, k: int) -> None:
    ops.check_dtype(name, B.dtype, _INT8)
    if B.dim() != 2 or B.shape[1] != k:
        raise ShapeError(f"{name}: expected shape [N, {k}], got {list(B.shape)}")


def _check_together(first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise DeviceError(f"{name}: expected a tensor on {first.device}, got one on {tensor.device}")


def _check_linear(A: Tensor, B: Tensor, SCB: Tensor, bias: Tensor | None) -> None:
    _check_rows("A", A, FLOAT_DTYPES)
    _check_weight("B", B, A.shape[-1])
    _check_vector("SCB", SCB, B.shape[0])
    _check_vector("bias", bias, B.shape[0], (A.dtype,))
    _check_together(A, B=B, SCB=SCB, bias=bias)


def _words(k: int) -> int:
    """Words of the bitmap of `k` columns."""
    return (k + 31) // 32


def _prepare(x: Tensor) -> None:
    if x.is_cpu:
        ops._sync_threads()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


# ---- int8_linear and its kin

_LINEAR = "(Tensor A, Tensor B, Tensor SCB, Tensor? bias=None, float threshold=0.0)"
ops._define(f"int8_linear{_LINEAR} -> Tensor")
ops._define(f"int8_linear_outliers{_LINEAR} -> (Tensor, Tensor)")
ops._define("int8_linear_dense(Tensor A, Tensor B, Tensor SCB, Tensor? bias=None) -> Tensor")
ops._define("int8_linear_grad_input(Tensor grad, Tensor B, Tensor SCB) -> Tensor")


def run_linear(A: Tensor, B: Tensor, SCB: Tensor, bias: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    """Apply a layer; see the module's table."""
    _check_linear(A, B, SCB, bias)
    A = A.contiguous()
    out = A.new_empty((*A.shape[:-1], B.shape[0]))
    if not out.numel():
        return out
    _prepare(A)
    size = _native.int8_linear_workspace(A, B.shape[0], threshold)
    workspace = torch.empty(size, dtype=torch.uint8, device=A.device) if size else None
    _native.int8_linear(A, B.contiguous(), _flat(SCB), out, workspace, _flat(bias), threshold)
    return out


def run_linear_outliers(
    A: Tensor, B: Tensor, SCB: Tensor, bias: Tensor | None = None, threshold: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Apply a layer and say which columns were outliers; see the module's table."""
    _check_linear(A, B, SCB, bias)
    A, B = A.contiguous(), B.contiguous()
    codes, stats, bitmap = quantize_rows(A, threshold)
    out = A.new_empty((*A.shape[:-1], B.shape[0]))
    if not out.numel():
        return out, bitmap
    mixed = (A, bitmap) if threshold > 0 else (None, None)
    _native.int8_matmul(codes, stats, B, _flat(SCB), out, _flat(bias), *mixed)
    return out, bitmap


def run_linear_dense(A: Tensor, B: Tensor, SCB: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a layer to activations as they are; see the module's table."""
    _check_linear(A, B, SCB, bias)
    dtype = ops._dense_dtype(A)
    weight = dequantize_rows(B, SCB, dtype)
    with ops._no_autocast(A), ops._exact_fp32(weight):
        return F.linear(A.to(dtype), weight, None if bias is None else bias.to(dtype)).to(A.dtype)


def run_linear_grad_input(grad: Tensor, B: Tensor, SCB: Tensor) -> Tensor:
    """Multiply by the weight itself, not its transpose; see the module's table."""
    _check_grad(grad, B, SCB)
    dtype = ops._dense_dtype(grad)
    weight = dequantize_rows(B, SCB, dtype)
    with ops._no_autocast(grad), ops._exact_fp32(weight):
        return torch.matmul(grad.to(dtype), weight).to(grad.dtype)


def _check_grad(grad: Tensor, B: Tensor, SCB: Tensor) -> None:
    _check_rows("grad", grad, FLOAT_DTYPES)
    _check_weight("B", B, B.shape[-1])
    if grad.shape[-1] != B.shape[0]:
        raise ShapeError(f"grad: expected shape [..., {B.shape[0]}], got {list(grad.shape)}")
    _check_vector("SCB", SCB, B.shape[0])
    _check_together(grad, B=B, SCB=SCB)


# ---- rows and columns to codes, and back

ops._define("int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)")
ops._define("int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)")
ops._define("int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor")


def quantize_rows(A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of A's shape, fp32 ``[rows]``, and the bitmap of outlier columns, int32 ``[⌈K / 32⌉]``.

    Outliers get code 0, the rest of their columns codes as everywhere. Waits for nothing.
    """
    _check_rows("A", A, FLOAT_DTYPES)
    A = A.contiguous()
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    stats = torch.empty(_rows(A), dtype=torch.float32, device=A.device)
    bitmap = torch.zeros(_words(A.shape[-1]), dtype=torch.int32, device=A.device)
    if not A.numel():
        return codes, stats.zero_(), bitmap
    _prepare(A)
    _native.int8_quantize_rows(A, codes, stats, threshold, bitmap if threshold > 0 else None)
    return codes, stats, bitmap


def outlier_columns(bitmap: Tensor, k: int) -> Tensor:
    """Return the columns in a bitmap, int64 rising. Waits for the device."""
    columns = torch.empty(k, dtype=torch.int64, device=bitmap.device)
    if not k:
        return columns
    count = torch.empty(1, dtype=torch.int32, device=bitmap.device)
    _native.int8_outlier_columns(bitmap, columns, count)
    return columns[: int(count.item())].clone()


def run_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize by rows; see the module's table. With more than one row, codes of outlier columns are all 0."""
    codes, stats, bitmap = quantize_rows(A, threshold)
    if not threshold > 0:
        return codes, stats, None
    columns = outlier_columns(bitmap, A.shape[-1])
    if len(stats) > 1 and len(columns):
        _native.int8_zero_columns(codes, bitmap)
    return codes, stats, columns


def quantize_columns(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Codes of A's shape by columns, and fp32 ``[K]``; outliers get 0. Waits for nothing."""
    _check_rows("A", A, FLOAT_DTYPES)
    A = A.contiguous()
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    stats = torch.zeros(A.shape[-1], dtype=torch.float32, device=A.device)
    if A.numel():
        _prepare(A)
        _native.int8_column_stats(A, stats, threshold)
        _native.int8_quantize_columns(A, stats, codes, threshold)
    return codes, stats


def run_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize by rows and by columns; see the module's table."""
    codes, stats, columns = run_vectorwise_quant(A, threshold)
    by_columns, column_stats = quantize_columns(A, threshold)
    return codes, by_columns, stats, column_stats, columns


def dequantize_rows(A: Tensor, stats: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * stat / 127`` in fp32, rounded to `dtype`."""
    _check_dequantize(A, stats)
    out = torch.empty(A.shape, dtype=dtype, device=A.device)
    if out.numel():
        _prepare(A)
        _native.int8_dequantize_rows(A.contiguous(), _flat(stats), out)
    return out


def _check_dequantize(A: Tensor, stats: Tensor) -> None:
    _check_rows("A", A, _INT8)
    _check_vector("stats", stats, _rows(A))
    _check_together(A, stats=stats)


def run_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Dequantize rows to fp32; see the module's table."""
    return dequantize_rows(A, stats, torch.float32)


# ---- products

ops._define("int8_linear_matmul(Tensor A, Tensor B) -> Tensor")
ops._define("int8_linear_matmul.out(Tensor A, Tensor B, Tensor(a!) out) -> ()")
ops._define(
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor"
)
ops._define(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)"
)
ops._define(
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor"
)


def _check_codes(A: Tensor, B: Tensor) -> None:
    _check_rows("A", A, _INT8)
    _check_weight("B", B, A.shape[-1])
    _check_together(A, B=B)


def _product_shape(A: Tensor, B: Tensor) -> tuple[int, ...]:
    return (*A.shape[:-1], B.shape[0])


def linear_matmul_into(A: Tensor, B: Tensor, out: Tensor) -> None:
    """Write the integer product to `out`, int32 ``[..., N]``; see the module's table."""
    _check_codes(A, B)
    ops.check_dtype("out", out.dtype, _INT32)
    if out.shape != _product_shape(A, B):
        raise ShapeError(f"out: expected shape {list(_product_shape(A, B))}, got {list(out.shape)}")
    _check_together(A, out=out)
    _multiply(A, B, out)


def _multiply(A: Tensor, B: Tensor, out: Tensor) -> None:
    if not out.numel():
        return
    _prepare(A)
    place = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _native.int8_matmul_int32(A.contiguous(), B.contiguous(), place)
    if place is not out:
        out.copy_(place)


def run_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """Multiply codes; see the module's table."""
    _check_codes(A, B)
    out = torch.empty(_product_shape(A, B), dtype=torch.int32, device=A.device)
    _multiply(A, B, out)
    return out


def _biased(dtype: torch.dtype, bias: Tensor | None) -> torch.dtype:
    """Return what to compute in: `dtype`, or fp32 where the bias is of another one and would lose by a cast."""
    return dtype if bias is None or bias.dtype == dtype else torch.float32


def _check_scaled(
    name: str, row_stats: Tensor, col_stats: Tensor, rows: int, columns: int, bias: Tensor | None, on: Tensor
) -> None:
    _check_vector("row_stats", row_stats, rows)
    _check_vector("col_stats", col_stats, columns)
    _check_vector("bias", bias, columns, FLOAT_DTYPES)
    _check_together(on, row_stats=row_stats, col_stats=col_stats, bias=bias)


def _scaled(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    x: Tensor | None,
    bitmap: Tensor | None,
) -> Tensor:
    _check_codes(A, B)
    ops.check_dtype("dtype", dtype)
    _check_scaled("A", row_stats, col_stats, _rows(A), B.shape[0], bias, A)
    computed = _biased(dtype, bias)
    out = torch.empty(_product_shape(A, B), dtype=computed, device=A.device)
    if out.numel():
        _prepare(A)
        bias = None if bias is None else bias.to(computed)
        _native.int8_matmul(
            A.contiguous(), _flat(row_stats), B.contiguous(), _flat(col_stats), out, _flat(bias), x, bitmap
        )
    return out.to(dtype)


def run_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply codes and scale; see the module's table. Default dtype: fp16."""
    return _scaled(A, B, row_stats, col_stats, bias, dtype or torch.float16, None, None)


def run_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply codes and scale, with some columns of `A` in floating point; see the module's table.

    Also returns those columns of `A`, ``[rows, columns]``.
    """
    _check_rows("A", A, FLOAT_DTYPES)
    if A.numel() != CA.numel():
        raise ShapeError(f"A: expected shape {list(CA.shape)} like CA, got {list(A.shape)}")
    _check_together(A, CA=CA, outlier_cols=outlier_cols)
    if outlier_cols is None or not outlier_cols.numel() or not CA.numel():
        none = torch.empty(0, dtype=A.dtype, device=A.device)
        return _scaled(CA, CB, SCA, SCB, bias, A.dtype, None, None), none
    if outlier_cols.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"outlier_cols: expected dtype torch.int64, got {outlier_cols.dtype}")
    k = A.shape[-1]
    bitmap = torch.zeros(_words(k), dtype=torch.int32, device=A.device)
    columns = outlier_cols.to(torch.int64).contiguous()
    _native.int8_outlier_bitmap(columns, bitmap, k)
    A = A.contiguous()
    out = _scaled(CA, CB, SCA, SCB, bias, A.dtype, A, bitmap)
    return out, A.view(-1, k)[:, columns].contiguous()


def run_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Scale the sums of a product; see the module's table. Default dtype: fp16."""
    _check_rows("A", A, _INT32)
    dtype = dtype or torch.float16
    ops.check_dtype("dtype", dtype)
    _check_scaled("A", row_stats, col_stats, _rows(A), A.shape[-1], bias, A)
    computed = _biased(dtype, bias)
    out = torch.empty(A.shape, dtype=computed, device=A.device)
    if out.numel():
        _prepare(A)
        bias = None if bias is None else bias.to(computed)
        _native.int8_mm_dequant(A.contiguous(), _flat(row_stats), _flat(col_stats), out, _flat(bias))
    return out.to(dtype)


# ---- registration

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "int8_linear": run_linear,
    "int8_linear_outliers": run_linear_outliers,
    "int8_linear_dense": run_linear_dense,
    "int8_linear_grad_input": run_linear_grad_input,
    "int8_vectorwise_quant": run_vectorwise_quant,
    "int8_double_quant": run_double_quant,
    "int8_vectorwise_dequant": run_vectorwise_dequant,
    "int8_linear_matmul": run_linear_matmul,
    "int8_linear_matmul.out": linear_matmul_into,
    "int8_scaled_mm": run_scaled_mm,
    "int8_mixed_scaled_mm": run_mixed_scaled_mm,
    "int8_mm_dequant": run_mm_dequant,
}
for _name, _run in _IMPLEMENTATIONS.items():
    ops._library.impl(_name, _run, "CPU")  # type: ignore[no-untyped-call]
    ops._library.impl(_name, _run, "CUDA")  # type: ignore[no-untyped-call]


@ops._fake("int8_linear")
def _(A: Tensor, B: Tensor, SCB: Tensor, bias: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    _check_linear(A, B, SCB, bias)
    return A.new_empty(_product_shape(A, B))


@ops._fake("int8_linear_outliers")
def _(A: Tensor, B: Tensor, SCB: Tensor, bias: Tensor | None = None, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    _check_linear(A, B, SCB, bias)
    return A.new_empty(_product_shape(A, B)), A.new_empty(_words(A.shape[-1]), dtype=torch.int32)


@ops._fake("int8_linear_dense")
def _(A: Tensor, B: Tensor, SCB: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_linear(A, B, SCB, bias)
    return A.new_empty(_product_shape(A, B))


@ops._fake("int8_linear_grad_input")
def _(grad: Tensor, B: Tensor, SCB: Tensor) -> Tensor:
    _check_grad(grad, B, SCB)
    return grad.new_empty((*grad.shape[:-1], B.shape[1]))


def _some_columns(A: Tensor, threshold: float) -> Tensor | None:
    if not threshold > 0:
        return None
    size: Any = torch.library.get_ctx().new_dynamic_size()
    return A.new_empty(size, dtype=torch.int64)


@ops._fake("int8_vectorwise_quant")
def _(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    _check_rows("A", A, FLOAT_DTYPES)
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    return codes, A.new_empty(_rows(A), dtype=torch.float32), _some_columns(A, threshold)


@ops._fake("int8_double_quant")
def _(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    _check_rows("A", A, FLOAT_DTYPES)
    codes = [torch.empty(A.shape, dtype=torch.int8, device=A.device) for _ in range(2)]
    stats = [A.new_empty(size, dtype=torch.float32) for size in (_rows(A), A.shape[-1])]
    return codes[0], codes[1], stats[0], stats[1], _some_columns(A, threshold)


@ops._fake("int8_vectorwise_dequant")
def _(A: Tensor, stats: Tensor) -> Tensor:
    _check_dequantize(A, stats)
    return torch.empty(A.shape, dtype=torch.float32, device=A.device)


@ops._fake("int8_linear_matmul")
def _(A: Tensor, B: Tensor) -> Tensor:
    _check_codes(A, B)
    return A.new_empty(_product_shape(A, B), dtype=torch.int32)


@ops._fake("int8_linear_matmul.out")
def _(A: Tensor, B: Tensor, out: Tensor) -> None:
    _check_codes(A, B)


@ops._fake("int8_scaled_mm")
def _(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check_codes(A, B)
    return A.new_empty(_product_shape(A, B), dtype=dtype or torch.float16)


@ops._fake("int8_mixed_scaled_mm")
def _(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    _check_codes(CA, CB)
    columns = 0 if outlier_cols is None else outlier_cols.shape[0]
    some = A.new_empty(0) if outlier_cols is None else A.new_empty((_rows(A), columns))
    return A.new_empty(_product_shape(CA, CB)), some


@ops._fake("int8_mm_dequant")
def _(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    _check_rows("A", A, _INT32)
    return torch.empty(A.shape, dtype=dtype or torch.float16, device=A.device)


# ---- autograd: gradients go through a layer to A and bias. Codes and statistics are saved as they are; a dense weight
# exists only inside the backward op. The gradient is that of the layer with unquantized activations, as bitsandbytes'.


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, B, SCB, bias, *_ = inputs
    ctx.has_bias = bias is not None
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(B, SCB)


def _linear_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_A = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_A = torch.ops.halfbyte.int8_linear_grad_input.default(grad, *ctx.saved_tensors)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
    return (grad_A, None, None, grad_bias, None)


def _dense_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _linear_backward(ctx, grad)[:4]


def _grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (torch.ops.halfbyte.int8_linear_dense.default(grad, *ctx.saved_tensors), None, None)


for _name, _backward, _setup in (
    ("int8_linear", _linear_backward, _linear_setup),
    ("int8_linear_outliers", _linear_backward, _linear_setup),
    ("int8_linear_dense", _dense_backward, _linear_setup),
    ("int8_linear_grad_input", _grad_input_backward, _grad_input_setup),
):
    ops._register(f"halfbyte::{_name}", _backward, setup_context=_setup, lib=ops._library)


def _without_gradient(inputs: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """As in :mod:`halfbyte.ops`, for ops of which some outputs may be None."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*(tensor for tensor in outputs if tensor is not None))

    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return (None,) * inputs

    return backward, setup


for _name, _inputs in (
    ("int8_vectorwise_quant", 2),
    ("int8_double_quant", 2),
    ("int8_vectorwise_dequant", 2),
    ("int8_linear_matmul", 2),
    ("int8_scaled_mm", 6),
    ("int8_mixed_scaled_mm", 7),
    ("int8_mm_dequant", 5),
):
    _backward, _setup = _without_gradient(_inputs)
    ops._register(f"halfbyte::{_name}", _backward, setup_context=_setup, lib=ops._library)
