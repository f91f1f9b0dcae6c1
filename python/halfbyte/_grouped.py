"""Several weights in one call: ``matmul_4bit_group`` for one input, ``matmul_4bit_experts`` for rows sorted by expert.

======================================  ==============================================================================
op                                      what it does
======================================  ==============================================================================
``matmul_4bit_group``                   ``A [..., K]`` × each of several packed ``[N_i, K]``ᵀ + bias → ``[..., N_i]``
``matmul_4bit_experts``                 ``A [S, K]`` × packed ``[E, N, K]``, each row with its expert's → ``[S, N]``
``matmul_4bit_experts_grad_input``      ``grad [S, N]`` × the same, not transposed → ``[S, K]``
======================================  ==============================================================================

Gradients go to `A` and the biases, as with :func:`~halfbyte.matmul_4bit`. Rows of expert e are ``offsets[e]`` up to
``offsets[e + 1]``; rows before the first and after the last belong to nobody, and their results are zeros.
"""

# ruff: noqa: ARG001  # fakes and autograd functions take what their op takes
from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte import _native, ops
from halfbyte._interop import giver_back, to_torch
from halfbyte._matmul import autocast_dtype, matmul_as_is, statistics
from halfbyte._tables import FLOAT_DTYPES, NESTED_BLOCKSIZE
from halfbyte.errors import ArgumentError, DeviceError, DtypeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from halfbyte.quant_state import QuantState

MOST_WEIGHTS: Final = 8
"""Weights of one launch; more take several."""

EXPERTS_FUSED_ROWS: Final = 32
"""Rows an expert, on average, up to which the CUDA kernel multiplies packed experts; beyond, bf16 is multiplied by
dequantized ones."""

_NESTED = "Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? nested_offset=None, int nested_blocksize=256"

ops._define(
    "matmul_4bit_group(Tensor A, Tensor[] B, SymInt[] rows, Tensor[] absmax, int blocksize, str quant_type, "
    "Tensor[] bias, Tensor[] nested, int nested_blocksize) -> Tensor[]",
)
ops._define(
    "matmul_4bit_experts(Tensor A, Tensor offsets, Tensor B, SymInt[] shape, Tensor absmax, int blocksize, "
    f"str quant_type, Tensor? bias=None, {_NESTED}) -> Tensor",
)
ops._define(
    "matmul_4bit_experts_grad_input(Tensor grad, Tensor offsets, Tensor B, SymInt[] shape, Tensor absmax, "
    f"int blocksize, str quant_type, {_NESTED}) -> Tensor",
)


# ---- one input, several weights


def matmul_4bit_group(
    A: Any, weights: Sequence[tuple[Any, QuantState]], biases: Sequence[Tensor | None] | None = None
) -> list[Any]:
    """Multiply the same activations by several 4-bit weights: ``[A @ W.T + bias for W, bias in …]``, in one launch.

    Parameters
    ----------
    A
        Activations ``[..., K]``, fp32, fp16 or bf16; any DLPack producer.
    weights
        Packed weights with their states, of shapes ``[N_i, K]``, as for :func:`~halfbyte.matmul_4bit`.
    biases
        ``[N_i]`` or None for each weight; None for none at all.

    Returns
    -------
    list of Tensor
        ``[..., N_i]`` for each weight, of A's dtype; each has memory of its own.

    Raises
    ------
    ArgumentError
        If there are not as many biases as weights; and what :func:`~halfbyte.matmul_4bit` raises.

    Notes
    -----
    One launch on CUDA takes up to 8 weights that have quantization type, block size and form of statistics in common
    (more take more), for the number of rows where packed weights are multiplied directly. Everything else is multiplied
    weight by weight, with the same result. Gradients reach `A` and the biases.

    Examples
    --------
    >>> import halfbyte
    >>> q, k, v = (halfbyte.functional.quantize_4bit(torch.randn(n, 64), quant_type="nf4") for n in (64, 32, 32))
    >>> [tuple(y.shape) for y in halfbyte.matmul_4bit_group(torch.randn(2, 64), [q, k, v])]
    [(2, 64), (2, 32), (2, 32)]
    """
    if biases is None:
        biases = [None] * len(weights)
    if len(biases) != len(weights):
        raise ArgumentError(f"biases: expected one for each of {len(weights)} weights, got {len(biases)}")
    give_back = giver_back(A)
    a = to_torch(A, "A")
    dtype = autocast_dtype(a)
    if dtype is not None and a.dtype in FLOAT_DTYPES:
        a = a.to(dtype)
    packed = [to_torch(B, f"weights[{i}]") for i, (B, _) in enumerate(weights)]
    states = [state for _, state in weights]
    added = [None if bias is None else to_torch(bias, f"biases[{i}]").to(a.dtype) for i, bias in enumerate(biases)]
    products: list[Tensor] = []
    for first in range(0, len(packed), MOST_WEIGHTS):
        some = slice(first, first + MOST_WEIGHTS)
        products += _group(a, packed[some], states[some], added[some])
    return [give_back(product) for product in products]


def _group(a: Tensor, packed: list[Tensor], states: list[QuantState], biases: list[Tensor | None]) -> list[Tensor]:
    if len(packed) < 2 or not _alike(a, states):
        return [matmul_as_is(a, *rest) for rest in zip(packed, states, [None] * len(packed), biases, strict=True)]
    ops.check_device("A", a)
    first = states[0]
    absmax, nested, rows = [], [], []
    for i, (B, state) in enumerate(zip(packed, states, strict=True)):
        n, k = state.shape  # type: ignore[misc]
        ops.check_packed(f"weights[{i}]", B, (n, k))
        if B.device != a.device:
            raise DeviceError(f"weights[{i}]: expected a tensor on {a.device} like A, got one on {B.device}")
        scales, (inner, code, offset, _) = statistics(state, a.device)
        absmax.append(scales)
        nested += [] if inner is None else [inner, code, offset]
        rows.append(n)
    added: list[Tensor] = []
    if any(bias is not None for bias in biases):
        added = [a.new_empty(0) if bias is None else bias for bias in biases]
    nested_blocksize = NESTED_BLOCKSIZE if first.state2 is None else first.state2.blocksize
    run: Any = torch.ops.halfbyte.matmul_4bit_group.default
    needs_grad = torch.is_grad_enabled() and (a.requires_grad or any(bias.requires_grad for bias in added))
    if not needs_grad and ops.is_eager(a) and all(type(B) in ops.PLAIN_TENSORS for B in packed):
        run = run_matmul_4bit_group
    products: list[Tensor] = run(
        a, packed, rows, absmax, first.blocksize, first.quant_type, added, nested, nested_blocksize
    )
    return products


def _alike(a: Tensor, states: Sequence[QuantState]) -> bool:
    """Whether the weights fit `a`, and one launch."""
    if a.dim() < 1 or a.dtype not in FLOAT_DTYPES:
        return False  # matmul_4bit says what is wrong
    first = states[0]
    if first.blocksize is None or first.quant_type is None:
        return False
    return all(
        state.shape is not None
        and len(state.shape) == 2
        and state.shape[1] == a.shape[-1]
        and state.blocksize == first.blocksize
        and state.quant_type == first.quant_type
        and (state.state2 is None) == (first.state2 is None)
        and (state.state2 is None or first.state2 is None or state.state2.blocksize == first.state2.blocksize)
        for state in states
    )


def _pieces(
    count: int, absmax: Sequence[Tensor], bias: Sequence[Tensor], nested: Sequence[Tensor]
) -> Iterator[tuple[Any, ...]]:
    """Yield absmax, bias and the three nested tensors of each weight."""
    for i in range(count):
        inner = tuple(nested[3 * i : 3 * i + 3]) if nested else (None, None, None)
        yield absmax[i], bias[i] if bias and bias[i].numel() else None, *inner


def _check_group(
    A: Tensor, B: Sequence[Tensor], rows: Sequence[int], absmax: Sequence[Tensor], bias: Sequence[Tensor], nested: Any
) -> None:
    ops.check_dtype("A", A.dtype)
    if A.dim() < 1:
        raise ShapeError("A: expected shape [..., K], got []")
    for name, have, want in (
        ("rows", rows, (len(B),)),
        ("absmax", absmax, (len(B),)),
        ("bias", bias, (0, len(B))),
        ("nested", nested, (0, 3 * len(B))),
    ):
        if len(have) not in want:
            raise ArgumentError(f"{name}: expected {' or '.join(map(str, want))} of them, got {len(have)}")
    for n, added in zip(rows, bias, strict=False):
        if added.numel() and added.dtype != A.dtype:
            raise DtypeError(f"bias: expected dtype {A.dtype} like A, got {added.dtype}")
        if added.numel() and tuple(added.shape) != (n,):
            raise ShapeError(f"bias: expected shape [{n}], got {list(added.shape)}")


def run_matmul_4bit_group(
    A: Tensor,
    B: Sequence[Tensor],
    rows: Sequence[int],
    absmax: Sequence[Tensor],
    blocksize: int,
    quant_type: str,
    bias: Sequence[Tensor],
    nested: Sequence[Tensor],
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> list[Tensor]:
    """Multiply by several weights; see the module's table. `bias` of size 0 is none; `nested` are three a weight."""
    _check_group(A, B, rows, absmax, bias, nested)
    A = A.contiguous()
    k = A.shape[-1]
    parts = list(_pieces(len(B), absmax, bias, nested))
    if k and A.numel() and 0 < len(B) <= MOST_WEIGHTS and all(rows):
        outs = [A.new_empty((*A.shape[:-1], n)) for n in rows]
        if A.is_cpu:
            ops._sync_threads()
        pieces = [
            (packed.contiguous(), scales, out, None if added is None else added.contiguous(), *inner, nested_blocksize)
            for packed, out, (scales, added, *inner) in zip(B, outs, parts, strict=True)
        ]
        if _native.matmul_4bit_group(A, pieces, quant_type, blocksize):
            return outs
    return [
        ops.run_matmul_4bit(A, packed, (n, k), scales, blocksize, quant_type, added, a, b, c, nested_blocksize)
        for packed, n, (scales, added, a, b, c) in zip(B, rows, parts, strict=True)
    ]


# ---- rows sorted by expert, a stack of weights


def matmul_4bit_experts(A: Any, offsets: Tensor, B: Any, quant_state: QuantState, bias: Tensor | None = None) -> Any:
    """Multiply each row by the weight of its expert: ``A[s] @ W[e].T + bias[e]``.

    Parameters
    ----------
    A
        Activations ``[S, K]``, fp32, fp16 or bf16, sorted by expert; any DLPack producer.
    offsets
        int32 ``[E + 1]``, not falling: rows of expert e are ``offsets[e]`` up to ``offsets[e + 1]``. On CUDA it stays
        on the device: nothing waits for it, and it may change between replays of a graph.
    B
        The stack ``[E, N, K]`` packed by :func:`~halfbyte.functional.quantize_4bit` as one tensor.
    quant_state
        Its state; ``quant_state.shape`` is ``[E, N, K]``.
    bias
        ``[E, N]``; cast to A's dtype if it has another.

    Returns
    -------
    Tensor
        ``[S, N]`` of A's dtype. Rows before ``offsets[0]`` and from ``offsets[E]`` on are zeros.

    Raises
    ------
    DtypeError, ShapeError, DeviceError, ArgumentError
        If tensors do not fit together, or (on the CPU only) offsets fall or leave A. Nothing is written then.

    Notes
    -----
    Only the weights of experts that have rows are read. The result of a row does not depend on what other rows there
    are, as long as there are on average at most ``EXPERTS_FUSED_ROWS`` (32) an expert. Beyond, bf16 on CUDA is
    multiplied by the dequantized stack with ``torch.nn.functional.grouped_mm``, for which there must be memory for
    E·N·K bf16 numbers, and whose result is rounded to bf16 before the bias is added; fp16 and fp32 have no such product
    that would not wait for the device.

    Gradients reach `A` and `bias`. The backward pass of bf16 on CUDA is done that way too; that of other types, and on
    the CPU, dequantizes one used expert at a time and reads `offsets` on the host.
    """
    give_back = giver_back(A)
    a, packed = to_torch(A, "A"), to_torch(B, "B")
    dtype = autocast_dtype(a)
    if dtype is not None and a.dtype in FLOAT_DTYPES:
        a = a.to(dtype)
    shape, blocksize, quant_type = quant_state.shape, quant_state.blocksize, quant_state.quant_type
    if shape is None or len(shape) != 3:
        raise ShapeError(f"quant_state.shape: expected the [E, N, K] of stacked matrices, got {shape}")
    if blocksize is None or quant_type is None:
        raise ArgumentError(f"quant_state: expected a 4-bit state, got blocksize {blocksize}, quant_type {quant_type}")
    ops.check_device("A", a)
    ops.check_packed("B", packed, shape)
    for name, tensor in (("B", packed), ("offsets", offsets)):
        if tensor.device != a.device:
            raise DeviceError(f"{name}: expected a tensor on {a.device} like A, got one on {tensor.device}")
    if bias is not None and bias.dtype != a.dtype:
        bias = bias.to(a.dtype)
    absmax, nested = statistics(quant_state, a.device)
    run: Any = torch.ops.halfbyte.matmul_4bit_experts.default
    needs_grad = torch.is_grad_enabled() and (a.requires_grad or (bias is not None and bias.requires_grad))
    if not needs_grad and ops.is_eager(a) and type(packed) in ops.PLAIN_TENSORS:
        run = run_matmul_4bit_experts
    return give_back(run(a, offsets, packed, tuple(shape), absmax, blocksize, quant_type, bias, *nested))


def _check_experts(
    name: str,
    x: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    inner: int,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
) -> None:
    ops.check_dtype(name, x.dtype)
    ops.check_blocksize(blocksize)
    ops.check_quant_type(quant_type)
    if x.dim() != 2 or x.shape[1] != inner:
        raise ShapeError(f"{name}: expected shape [S, {inner}], got {list(x.shape)}")
    ops.check_dtype("offsets", offsets.dtype, (torch.int32,))
    if offsets.dim() != 1 or offsets.shape[0] != shape[0] + 1:
        raise ShapeError(f"offsets: expected shape [{shape[0] + 1}], got {list(offsets.shape)}")
    if bias is not None:
        if bias.dtype != x.dtype:
            raise DtypeError(f"bias: expected dtype {x.dtype} like {name}, got {bias.dtype}")
        if tuple(bias.shape) != tuple(shape[:2]):
            raise ShapeError(f"bias: expected shape {list(shape[:2])}, got {list(bias.shape)}")


def _stack(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ShapeError(f"shape: expected the [E, N, K] of stacked matrices, got {list(shape)}")
    return shape[0], shape[1], shape[2]


def run_matmul_4bit_experts(
    A: Tensor,
    offsets: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> Tensor:
    """Multiply rows by their experts' weights; see the module's table."""
    e, n, k = _stack(shape)
    _check_experts("A", A, offsets, shape, k, blocksize, quant_type, bias)
    A, offsets = A.contiguous(), offsets.contiguous()
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    if A.shape[0] > EXPERTS_FUSED_ROWS * e and _can_group(A, n, k):
        weight = ops.run_dequantize_4bit(B, absmax, blocksize, quant_type, shape, A.dtype, *nested)
        out = _grouped(A, weight.transpose(1, 2), offsets)
        if bias is not None:
            out += _of_rows(bias, offsets, A.shape[0])
            _native.clear_expert_rows(offsets, out)
        return out
    out = A.new_empty((A.shape[0], n))
    if out.numel() == 0:
        return out
    if A.is_cpu:
        ops._sync_threads()
    if bias is not None:
        bias = bias.contiguous()
    _native.matmul_4bit_experts(A, offsets, B.contiguous(), absmax, out, quant_type, blocksize, bias, *nested)
    return out


def _can_group(x: Tensor, n: int, k: int) -> bool:
    """Whether ``grouped_mm`` takes it, on the device alone: elsewhere it is a loop that reads the offsets."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and n % 8 == 0
        and k % 8 == 0
        and n * k > 0
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows by dense ``weight[e]``, ``[inner, outer]`` each; nobody's rows become zeros."""
    with ops._no_autocast(x):
        out: Tensor = F.grouped_mm(x, weight, offs=offsets[1:])
    _native.clear_expert_rows(offsets, out)
    return out


def _of_rows(values: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Return ``values[e]`` of each row's expert; anything for rows of nobody."""
    row = torch.arange(rows, dtype=torch.int32, device=values.device)
    expert = torch.searchsorted(offsets, row, right=True) - 1
    return values[expert.clamp_(0, max(values.shape[0] - 1, 0))]


def run_matmul_4bit_experts_grad_input(
    grad: Tensor,
    offsets: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> Tensor:
    """Multiply by the experts' weights themselves, not their transposes; see the module's table."""
    e, n, k = _stack(shape)
    _check_experts("grad", grad, offsets, shape, n, blocksize, quant_type)
    grad, offsets = grad.contiguous(), offsets.contiguous()
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    if _can_group(grad, n, k):
        return _grouped(
            grad, ops.run_dequantize_4bit(B, absmax, blocksize, quant_type, shape, grad.dtype, *nested), offsets
        )
    dtype = ops._dense_dtype(grad)
    out = grad.new_zeros((grad.shape[0], k))
    ends = _checked(offsets, grad.shape[0])
    with ops._no_autocast(grad), ops._exact_fp32(grad.new_empty(0, dtype=dtype)):
        for expert, weight in _used(ends, B, (e, n, k), absmax, blocksize, quant_type, dtype, nested):
            rows = slice(ends[expert], ends[expert + 1])
            out[rows] = torch.mm(grad[rows].to(dtype), weight)
    return out


def _checked(offsets: Tensor, rows: int) -> list[int]:
    ends: list[int] = offsets.tolist()
    if ends[0] < 0 or ends[-1] > rows or any(a > b for a, b in pairwise(ends)):
        raise ArgumentError(f"offsets: expected numbers from 0 to {rows} that do not fall")
    return ends


def _used(
    ends: Sequence[int],
    B: Tensor,
    shape: tuple[int, int, int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    nested: tuple[Any, ...],
) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that has rows with its dense weight ``[N, K]``, one at a time."""
    _, n, k = shape
    used = [e for e in range(shape[0]) if ends[e] < ends[e + 1]]
    if not used or not n * k:
        return
    if n * k % blocksize:  # experts share blocks
        weight = ops.run_dequantize_4bit(B, absmax, blocksize, quant_type, shape, dtype, *nested)
        yield from ((e, weight[e]) for e in used)
        return
    inner, code, offset, inner_block = nested
    if inner is not None:
        absmax = ops.run_dequantize_blockwise(absmax, inner, code, inner_block, torch.float32, offset)
    packed = B.contiguous().view(-1).view(torch.uint8)
    size = n * k
    for e in used:
        some = packed[e * size // 2 : (e + 1) * size // 2]
        scales = absmax.view(-1)[e * size // blocksize : (e + 1) * size // blocksize]
        yield e, ops.run_dequantize_4bit(some, scales, blocksize, quant_type, (n, k), dtype)


# ---- registration

for _name, _run in (
    ("matmul_4bit_group", run_matmul_4bit_group),
    ("matmul_4bit_experts", run_matmul_4bit_experts),
    ("matmul_4bit_experts_grad_input", run_matmul_4bit_experts_grad_input),
):
    ops._library.impl(_name, _run, "CPU")  # type: ignore[no-untyped-call]
    ops._library.impl(_name, _run, "CUDA")  # type: ignore[no-untyped-call]


@ops._fake("matmul_4bit_group")
def _(
    A: Tensor,
    B: Sequence[Tensor],
    rows: Sequence[int],
    absmax: Sequence[Tensor],
    blocksize: int,
    quant_type: str,
    bias: Sequence[Tensor],
    nested: Sequence[Tensor],
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> list[Tensor]:
    ops.check_blocksize(blocksize)
    ops.check_quant_type(quant_type)
    _check_group(A, B, rows, absmax, bias, nested)
    return [torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device) for n in rows]


@ops._fake("matmul_4bit_experts")
def _(
    A: Tensor,
    offsets: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    *nested: Any,
) -> Tensor:
    _, n, k = _stack(shape)
    _check_experts("A", A, offsets, shape, k, blocksize, quant_type, bias)
    return torch.empty((A.shape[0], n), dtype=A.dtype, device=A.device)


@ops._fake("matmul_4bit_experts_grad_input")
def _(
    grad: Tensor,
    offsets: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    *nested: Any,
) -> Tensor:
    _, n, k = _stack(shape)
    _check_experts("grad", grad, offsets, shape, n, blocksize, quant_type)
    return torch.empty((grad.shape[0], k), dtype=grad.dtype, device=grad.device)


def _group_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    A, B, rows, absmax, blocksize, quant_type, bias, nested, nested_blocksize = inputs
    ctx.rows, ctx.blocksize, ctx.quant_type, ctx.nested_blocksize = rows, blocksize, quant_type, nested_blocksize
    ctx.k, ctx.count = A.shape[-1], len(B)
    ctx.with_bias = [added.numel() > 0 for added in bias]
    ctx.save_for_backward(*B, *absmax, *nested)


def _group_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved, count = ctx.saved_tensors, ctx.count
    B, absmax, nested = saved[:count], saved[count : 2 * count], saved[2 * count :]
    grad_A = None
    if ctx.needs_input_grad[0]:
        for grad, packed, n, (scales, _, *inner) in zip(
            grads, B, ctx.rows, _pieces(count, absmax, (), nested), strict=True
        ):
            if grad is None:
                continue
            part = torch.ops.halfbyte.matmul_4bit_grad_input.default(
                grad, packed, (n, ctx.k), scales, ctx.blocksize, ctx.quant_type, *inner, ctx.nested_blocksize
            )
            grad_A = part if grad_A is None else grad_A + part
    grad_bias = [
        grad.sum_to_size(grad.shape[-1]) if has and grad is not None else None
        for has, grad in zip(ctx.with_bias, grads, strict=False)
    ]
    nothing: Callable[[Sequence[Any]], list[None]] = lambda items: [None] * len(items)  # noqa: E731
    return grad_A, nothing(B), None, nothing(absmax), None, None, grad_bias, nothing(nested), None


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, B, shape, absmax, blocksize, quant_type, bias, *nested = inputs
    ctx.shape, ctx.blocksize, ctx.quant_type, ctx.has_bias = shape, blocksize, quant_type, bias is not None
    *nested, ctx.nested_blocksize = nested
    if ctx.needs_input_grad[0] or ctx.has_bias:
        ctx.save_for_backward(offsets, B, absmax, *nested)


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_A = grad_bias = None
    if ctx.needs_input_grad[0]:
        offsets, B, absmax, *nested = ctx.saved_tensors
        grad_A = torch.ops.halfbyte.matmul_4bit_experts_grad_input.default(
            grad, offsets, B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, *nested, ctx.nested_blocksize
        )
    if ctx.has_bias and ctx.needs_input_grad[7]:
        # A product with zeros and ones instead of index_add, whose order of sums differs from run to run.
        offsets = ctx.saved_tensors[0]
        row = torch.arange(grad.shape[0], device=grad.device)
        is_its = (row >= offsets[:-1, None]) & (row < offsets[1:, None])
        grad_bias = (is_its.to(torch.float32) @ grad.to(torch.float32)).to(grad.dtype)
    return grad_A, None, None, None, None, None, None, grad_bias, None, None, None, None


def _experts_grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, *nested = inputs
    *nested, ctx.nested_blocksize = nested
    ctx.save_for_backward(offsets, B, absmax, *nested)


def _experts_grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    offsets, B, absmax, *nested = ctx.saved_tensors
    back = torch.ops.halfbyte.matmul_4bit_experts.default(
        grad, offsets, B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, None, *nested, ctx.nested_blocksize
    )
    return (back, *[None] * 10)


_register = torch.library.register_autograd
_register("halfbyte::matmul_4bit_group", _group_backward, setup_context=_group_setup, lib=ops._library)
_register("halfbyte::matmul_4bit_experts", _experts_backward, setup_context=_experts_setup, lib=ops._library)
_register(
    "halfbyte::matmul_4bit_experts_grad_input",
    _experts_grad_input_backward,
    setup_context=_experts_grad_input_setup,
    lib=ops._library,
)
