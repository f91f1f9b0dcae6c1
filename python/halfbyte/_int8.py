"""LLM.int8(): products with 8-bit weights, and the state that goes with a weight."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Final

import torch
from torch import Tensor

from halfbyte import _int8_ops as int8_ops
from halfbyte import _transforms as transforms
from halfbyte import ops
from halfbyte._matmul import autocast_dtype
from halfbyte._tables import FLOAT_DTYPES
from halfbyte.errors import ArgumentError, DtypeError, ShapeError

_compiling = torch.compiler.is_dynamo_compiling

_REMOVED: Final = frozenset({"CxB", "CxBt", "formatB", "_tile_indices"})


@dataclasses.dataclass(eq=False)
class MatmulLtState:
    """The 8-bit form of a weight and how to multiply with it; every ``Linear8bitLt`` has one.

    Attributes
    ----------
    CB
        Codes of the weight, int8 ``[N, K]``.
    SCB
        Largest magnitude of each of its rows, fp32 ``[N]``: a weight is ``code * SCB / 127``.
    threshold
        Activations of at least this magnitude are outliers, and their columns are multiplied in floating point; 0 for
        none.
    has_fp16_weights
        Whether the weight stays in floating point and is quantized for each product.
    is_training
        Whether the layer is in training mode.
    idx
        Outlier columns of the last product that wanted a gradient, int64, or None. Reading it waits for the device. A
        product that wants none leaves no trace.
    force_no_igemmlt, SB, SBt, CBt, subB, outlier_pool, use_pool, has_accumulated_gradients
        Kept for code that sets them; without effect.

    Notes
    -----
    ``CxB``, ``CxBt``, ``formatB`` and ``_tile_indices`` of layouts that no longer exist are None, with a FutureWarning.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: Any = None
    has_accumulated_gradients = False
    threshold = 0.0
    idx: Tensor | None = None
    is_training = True
    has_fp16_weights = True
    use_pool = False

    def __getattr__(self, name: str) -> Any:
        if name in _REMOVED:
            warnings.warn(f"MatmulLtState.{name} is of a layout that no longer exists", FutureWarning, stacklevel=2)
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatmulLtState):
            return NotImplemented
        return all(_same(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self))

    __hash__ = None  # type: ignore[assignment]

    def reset_grads(self) -> None:
        """Forget the weight's 8-bit form, so that it is made, or taken from the parameter, again."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None

    def record(self, bitmap: Tensor, k: int) -> None:
        """Remember the outlier columns of a product, as a bitmap."""
        self.__dict__["_bitmap"] = (bitmap, k)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


def _get_idx(self: MatmulLtState) -> Tensor | None:
    bitmap, k = self.__dict__.pop("_bitmap", (None, 0))
    if bitmap is not None:
        self.__dict__["_idx"] = int8_ops.outlier_columns(bitmap, k)
    found: Tensor | None = self.__dict__.get("_idx")
    return found


def _set_idx(self: MatmulLtState, idx: Tensor | None) -> None:
    self.__dict__.pop("_bitmap", None)
    self.__dict__["_idx"] = idx


# After the class is made: the dataclass takes the default of the field from the class, and assigns through this.
MatmulLtState.idx = property(_get_idx, _set_idx)  # type: ignore[assignment]


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply activations by a weight in 8-bit integers: ``A @ B.T + bias`` (Dettmers et al. 2022, arXiv:2208.07339).

    Parameters
    ----------
    A
        Activations ``[..., K]``, fp32, fp16 or bf16.
    B
        Weight ``[N, K]``, in floating point or the codes of `state`, also as the transpose of a ``[K, N]`` one. Where
        the state has codes and ``has_fp16_weights`` is False, those count and `B` is not looked at.
    out
        Where to write the result, ``[..., N]`` of A's dtype. No gradient then.
    state
        8-bit form of `B`. Without codes it gets them from `B`; with ``has_fp16_weights`` in every step of training (as
        long as B has no gradient yet) and whenever `B` has changed.
    threshold
        Above 0, takes the place of ``state.threshold``.
    bias
        ``[N]``; cast to A's dtype if it has another.

    Returns
    -------
    Tensor
        ``[..., N]`` of A's dtype, scaled in fp32 and rounded once. Under :class:`torch.autocast`, A is cast first.

    Raises
    ------
    DtypeError, ShapeError, DeviceError, ArgumentError
        If tensors do not fit together.

    Notes
    -----
    Gradients reach `A`, `bias` and a `B` in floating point that requires one. On CUDA the weight's gradient is a
    product of 8-bit integers, except for outliers; on the CPU it is exact, and activations are not quantized while
    ``state.is_training``, as in bitsandbytes. A row with a NaN, and one with an infinity where there is no threshold,
    is NaN; with a threshold an infinity is an outlier and multiplied as such.
    """
    state = MatmulLtState() if state is None else state
    if threshold > 0:
        state.threshold = threshold
    ops.check_device("A", A)
    dtype = autocast_dtype(A)
    if dtype is not None and A.dtype in FLOAT_DTYPES:
        A = A.to(dtype)
    result = matmul_as_is(A, B, state, bias)
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype:
        kind = ShapeError if out.shape != result.shape else DtypeError
        raise kind(f"out: expected {list(result.shape)} of {result.dtype}, got {list(out.shape)} of {out.dtype}")
    with torch.no_grad():
        return out.copy_(result)


def matmul_as_is(A: Tensor, B: Tensor, state: MatmulLtState, bias: Tensor | None) -> Tensor:
    """Do what :func:`matmul` does, with no regard to autocast."""
    ops.check_dtype("A", A.dtype)
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    trained = state.has_fp16_weights and B.requires_grad and torch.is_grad_enabled()
    if state.has_fp16_weights or state.CB is None or state.SCB is None:
        quantize_weight(B, state)
    codes, stats = state.CB, state.SCB
    if codes is None or stats is None:
        raise ArgumentError("state: expected the codes CB and the statistics SCB of a weight, got neither")
    dense = A.is_cpu and state.is_training
    if not _compiling() and transforms.active():
        if trained:
            raise ArgumentError(
                "B: expected a weight that needs no gradient under a transform of torch.func or with tangents, got one "
                "that does; call it under torch.no_grad(), or make the layer with has_fp16_weights=False"
            )
        return _transformed(A, codes, stats, bias, None if dense else float(state.threshold))
    if trained:
        if A.dim() < 1 or A.shape[-1] != B.shape[1]:
            raise ShapeError(f"A: expected shape [..., {B.shape[1]}], got {list(A.shape)}")
        result: Tensor = _Trained.apply(A, B, bias, codes, stats, float(state.threshold), dense)  # type: ignore[no-untyped-call]
        return result
    needs_grad = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    if not needs_grad and not dense and ops.is_eager(A):
        return int8_ops.run_linear(A, codes, stats, bias, float(state.threshold))
    if dense:
        result = _called("int8_linear_dense", A, codes, stats, bias)
    elif needs_grad and state.threshold > 0 and not _compiling():
        result, bitmap = _called("int8_linear_outliers", A, codes, stats, bias, float(state.threshold))
        if ops.is_eager(bitmap):
            state.record(bitmap, A.shape[-1])
    else:
        result = _called("int8_linear", A, codes, stats, bias, float(state.threshold))
    return result


def _transformed(A: Tensor, codes: Tensor, stats: Tensor, bias: Tensor | None, threshold: float | None) -> Tensor:
    # The derivative is that of the layer with activations that are not quantized, as it is without a transform.
    def dense(x: Tensor, addend: Tensor | None = None) -> Tensor:
        return _called("int8_linear_dense", x, codes, stats, addend)  # type: ignore[no-any-return]

    def quantizing(x: Tensor, addend: Tensor | None) -> Tensor:
        return _called("int8_linear", x, codes, stats, addend, threshold)  # type: ignore[no-any-return]

    product = dense if threshold is None else quantizing
    return transforms.multiply(
        A, bias, product, dense, lambda grad: _called("int8_linear_grad_input", grad, codes, stats)
    )


def _called(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.halfbyte, name).default(*arguments)


def quantize_weight(B: Tensor, state: MatmulLtState) -> None:
    """Give `state` the 8-bit form of the weight `B`, unless it has that already."""
    if B.dtype == torch.int8:
        raise DtypeError("B: expected a weight in floating point where the state has no codes, got torch.int8")
    ops.check_dtype("B", B.dtype)
    seen = None if _compiling() else (B.data_ptr(), B._version) if ops.is_eager(B.detach()) else None
    fresh = _compiling() or (state.is_training and getattr(B, "grad", None) is None)
    if state.CB is not None and state.SCB is not None and not fresh and seen == state.__dict__.get("_seen"):
        return
    state.reset_grads()
    state.CB, state.SCB = quantized(B.detach())
    state.__dict__["_seen"] = seen


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and statistics of a float weight, as bitsandbytes makes them: of its values in fp16.

    Weights that fp16 cannot hold are quantized as they are.
    """
    half = weight.to(torch.float16)
    codes, stats, _ = _quantize(half)
    if weight.dtype != torch.float16 and not _compiling() and ops.is_eager(weight) and not bool(stats.isfinite().all()):
        codes, stats, _ = _quantize(weight)
    return codes, stats


def _quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    if not _compiling() and ops.is_eager(x):
        return int8_ops.run_vectorwise_quant(x)
    result: tuple[Tensor, Tensor, Tensor | None] = torch.ops.halfbyte.int8_vectorwise_quant.default(x)
    return result


class _Trained(torch.autograd.Function):
    """The product with a weight that gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        stats: Tensor,
        threshold: float,
        dense: bool,
    ) -> Tensor:
        ctx.save_for_backward(A, codes, stats)
        ctx.threshold, ctx.dense, ctx.weight_dtype, ctx.has_bias = threshold, dense, B.dtype, bias is not None
        if dense:
            return _called("int8_linear_dense", A, codes, stats, bias)  # type: ignore[no-any-return]
        return _called("int8_linear", A, codes, stats, bias, threshold)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        A, codes, stats = ctx.saved_tensors
        grad_A = grad_B = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_A = _called("int8_linear_grad_input", grad, codes, stats)
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            rows = A.reshape(-1, A.shape[-1])
            make = _run_weight_gradient if ops.is_eager(flat) else torch.ops.halfbyte.int8_weight_gradient.default
            grad_B = make(flat, rows, ctx.threshold, ctx.dense).to(ctx.weight_dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_A, grad_B, grad_bias, None, None, None, None


def exact_weight_gradient(grad: Tensor, A: Tensor) -> Tensor:
    """``gradᵀ @ A`` in floating point, ``[N, K]``."""
    dtype = ops._dense_dtype(grad)
    return torch.matmul(grad.to(dtype).t(), A.to(dtype)).to(grad.dtype)


def weight_gradient(grad: Tensor, A: Tensor, threshold: float) -> Tensor:
    """``gradᵀ @ A`` in 8-bit integers with statistics by columns, outliers of `A` in floating point; ``[N, K]``."""
    if not grad.numel() or not A.numel():
        return grad.new_zeros((grad.shape[1], A.shape[1]))
    left, left_stats = int8_ops.quantize_columns(grad)
    right, right_stats = int8_ops.quantize_columns(A, threshold)
    product = int8_ops.run_scaled_mm(left.t(), right.t().contiguous(), left_stats, right_stats, None, torch.float32)
    if threshold > 0:
        # Outliers have code 0, so they are added as they are; other values of their columns are in the product.
        outliers = A.abs() >= threshold
        columns = outliers.any(0).nonzero().view(-1)
        if len(columns):
            some = torch.where(outliers[:, columns], A[:, columns], 0)
            product[:, columns] += exact_weight_gradient(grad.float(), some.float())
    return product.to(grad.dtype)


# An op, since its steps are not to be traced: they call the core, and look at the numbers for outliers.
ops._define("int8_weight_gradient(Tensor grad, Tensor A, float threshold, bool exact) -> Tensor")


def _run_weight_gradient(grad: Tensor, A: Tensor, threshold: float, exact: bool) -> Tensor:
    return exact_weight_gradient(grad, A) if exact else weight_gradient(grad, A, threshold)


def _fake_weight_gradient(grad: Tensor, A: Tensor, threshold: float, exact: bool) -> Tensor:  # noqa: ARG001
    return grad.new_empty((grad.shape[1], A.shape[1]))


for _device in ("CPU", "CUDA"):
    ops._library.impl("int8_weight_gradient", _run_weight_gradient, _device)  # type: ignore[no-untyped-call]
torch.library.register_fake("halfbyte::int8_weight_gradient", _fake_weight_gradient, lib=ops._library)


# ---- bitsandbytes' functions


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each row to 8-bit integers by its largest magnitude.

    Parameters
    ----------
    A
        ``[..., K]``, fp16, bf16 or fp32; each row of K numbers by itself.
    threshold
        Above 0, values of at least this magnitude are outliers: they do not count for their row's statistic, and their
        columns get code 0 (in a single row, only they themselves do).

    Returns
    -------
    codes : Tensor
        int8 of A's shape: ``round(a * (127 / stat))``, half to even.
    stats : Tensor
        fp32 ``[rows]``; NaN for a row with a NaN.
    outlier_cols : Tensor or None
        int64, the columns that have an outlier; None without a threshold. Making it waits for the device.

    Raises
    ------
    DtypeError, ShapeError, DeviceError, ArgumentError
        If `A` is no such tensor, or the threshold is NaN.
    """
    return _either("int8_vectorwise_quant", int8_ops.run_vectorwise_quant, A, threshold)  # type: ignore[no-any-return]


def int8_double_quant(
    A: Tensor,
    col_stats: None = None,
    row_stats: None = None,
    out_col: None = None,
    out_row: None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize by rows and by columns: what the backward pass of a trained weight needs.

    Parameters
    ----------
    A
        ``[..., K]``, fp16, bf16 or fp32.
    col_stats, row_stats, out_col, out_row
        Must be None.
    threshold
        See :func:`int8_vectorwise_quant`. Outliers get code 0 by columns as well.

    Returns
    -------
    out_row, out_col : Tensor
        int8 of A's shape.
    row_stats, col_stats : Tensor
        fp32 ``[rows]`` and ``[K]``.
    outlier_cols : Tensor or None
        See :func:`int8_vectorwise_quant`.

    Raises
    ------
    ArgumentError
        If one of the four is not None; and what :func:`int8_vectorwise_quant` raises.
    """
    given = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"{name}: expected None, results are always new tensors; got {type(value).__name__}")
    return _either("int8_double_quant", int8_ops.run_double_quant, A, threshold)  # type: ignore[no-any-return]


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Return ``code * stat / 127`` for rows of codes: fp32 of A's shape.

    Raises
    ------
    DtypeError, ShapeError, DeviceError
        If `A` is not int8 or `stats` not fp32 with one number a row.
    """
    return _either("int8_vectorwise_dequant", int8_ops.run_vectorwise_dequant, A, stats)  # type: ignore[no-any-return]


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """Multiply 8-bit integers: ``A @ B.T`` in int32, exact up to K = 131,071.

    Parameters
    ----------
    A, B
        int8 ``[..., K]`` and ``[N, K]``.
    out
        Where to write the result, int32 ``[..., N]``.
    dtype
        int32, the only one there is.

    Raises
    ------
    DtypeError, ShapeError, DeviceError
        If tensors do not fit together. Nothing is written then.
    """
    ops.check_dtype("dtype", dtype, (torch.int32,))
    if out is None:
        ops.check_device("A", A)
        # Integers have no gradient that would have to be kept out.
        if not _compiling() and ops.is_eager(A):
            return int8_ops.run_linear_matmul(A, B)
        return _called("int8_linear_matmul", A, B)  # type: ignore[no-any-return]
    int8_ops.linear_matmul_into(A, B, out)
    return out


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Scale the sums of a product: ``A * row_stats * col_stats / 127² + bias`` in fp32, rounded to fp16.

    Parameters
    ----------
    A
        int32 ``[..., N]``.
    row_stats, col_stats
        fp32, one number a row and a column, in any shape.
    out
        Where to write the result, of any float dtype.
    bias
        ``[N]``, of any float dtype.

    Raises
    ------
    DtypeError, ShapeError, DeviceError
        If tensors do not fit together.
    """
    # Statistics of a float weight may come as they are.
    row_stats, col_stats = row_stats.float(), col_stats.float()
    result: Tensor = _either("int8_mm_dequant", int8_ops.run_mm_dequant, A, row_stats, col_stats, torch.float16, bias)
    return result if out is None else out.copy_(result)


def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Multiply codes and scale: ``A @ B.T * row_stats * col_stats / 127² + bias``, straight to `dtype`.

    Parameters
    ----------
    A, B
        int8 ``[..., K]`` and ``[N, K]``.
    row_stats, col_stats
        fp32 ``[rows]`` and ``[N]``.
    bias
        ``[N]``.
    dtype
        fp16, bf16 or fp32.

    Raises
    ------
    DtypeError, ShapeError, DeviceError
        If tensors do not fit together.
    """
    return _either("int8_scaled_mm", int8_ops.run_scaled_mm, A, B, row_stats, col_stats, bias, dtype)  # type: ignore[no-any-return]


def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply codes and scale, with some columns of the activations in floating point.

    Parameters
    ----------
    A
        Activations ``[rows, K]``, whose dtype the result has.
    CA, SCA
        Their codes and statistics, as :func:`int8_vectorwise_quant` returns them.
    CB, SCB
        Codes ``[N, K]`` and statistics ``[N]`` of the weight.
    outlier_cols
        Columns to take from `A` itself.
    bias
        ``[N]``.

    Returns
    -------
    out : Tensor
        ``[rows, N]`` of A's dtype, rounded once.
    subA : Tensor
        Those columns of `A`.

    Raises
    ------
    DtypeError, ShapeError, DeviceError
        If tensors do not fit together.
    """
    run = int8_ops.run_mixed_scaled_mm
    return _either("int8_mixed_scaled_mm", run, A, CA, CB, SCA, SCB, outlier_cols, bias)  # type: ignore[no-any-return]


def _either(name: str, run: Any, A: Tensor, *arguments: Any) -> Any:
    """Run an op: directly where nobody watches, else through the dispatcher."""
    ops.check_device("A", A)
    if not _compiling() and ops.is_eager(A):
        with torch.no_grad():
            return run(A.detach(), *arguments)
    return _called(name, A, *arguments)
