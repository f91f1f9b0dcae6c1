"""``matmul_4bit_gated``: a 4-bit product of which one half gates the other, as decoders' feed-forward layers have it.

=======================  ===============================================================================================
op                       what it does
=======================  ===============================================================================================
``matmul_4bit_gated``    ``A [..., K]`` × packed ``[2N, K]``ᵀ + bias, then ``gate(a) * b`` of its halves → ``[..., N]``
=======================  ===============================================================================================

The op has no gradient; :func:`matmul_4bit_gated` goes by differentiable operations where one is wanted.
"""

# ruff: noqa: ARG001  # fakes take what their op takes
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte import _native, ops
from halfbyte._interop import giver_back, to_torch
from halfbyte._matmul import autocast_dtype, matmul_as_is, statistics
from halfbyte._tables import FLOAT_DTYPES, NESTED_BLOCKSIZE
from halfbyte.errors import ArgumentError, DeviceError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from halfbyte.quant_state import QuantState

GATES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
}
"""What can be done to the first half, by name."""

ops._define(
    "matmul_4bit_gated(Tensor A, Tensor B, SymInt[] shape, Tensor absmax, int blocksize, str quant_type, str gate, "
    f"Tensor? bias=None, {ops._NESTED}) -> Tensor",
)

# Builds without CUDA lack them.
_product: Any = getattr(_native, "matmul_4bit_gated", None)
_gate: Any = getattr(_native, "gate", None)


def matmul_4bit_gated(A: Any, B: Any, quant_state: QuantState, gate: str = "silu", bias: Tensor | None = None) -> Any:
    """Multiply by a 4-bit weight and gate one half of the result by the other: ``gate(a) * b`` of ``A @ W.T + bias``.

    That is a gated linear unit (Shazeer 2020, arXiv:2002.05202): SwiGLU with ``"silu"``, GEGLU with ``"gelu_tanh"``.

    Parameters
    ----------
    A
        Activations ``[..., K]``, fp32, fp16 or bf16. A NumPy array or another DLPack producer is accepted too, and its
        library gets the result.
    B
        Packed weight as :func:`~halfbyte.functional.quantize_4bit` returns it: the rows of the gate, then as many that
        are gated, as in ``torch.cat([gate_proj, up_proj])``.
    quant_state
        Its state; ``quant_state.shape`` is ``[2N, K]``.
    gate
        ``"silu"``, or ``"gelu_tanh"`` (GELU by its approximation with tanh).
    bias
        ``[2N]``; cast to A's dtype if it has another.

    Returns
    -------
    Tensor
        ``[..., N]`` of A's dtype. Under :class:`torch.autocast`, A is cast first.

    Raises
    ------
    ArgumentError
        If there is no such gate.
    ShapeError
        If the weight has an odd number of rows.
    DtypeError, ShapeError, DeviceError, ArgumentError
        As :func:`~halfbyte.matmul_4bit`.

    Notes
    -----
    On GPUs of compute capability 9.0 and later up to 8 rows of 16-bit activations take one launch, and nothing is
    rounded before the result; more rows take two. Gradients reach `A` and `bias`.

    Examples
    --------
    >>> import halfbyte
    >>> packed, state = halfbyte.functional.quantize_4bit(torch.randn(2 * 48, 64), quant_type="nf4")
    >>> halfbyte.matmul_4bit_gated(torch.randn(3, 64), packed, state).shape
    torch.Size([3, 48])
    """
    _check_gate(gate)
    shape = quant_state.shape
    if shape is None or len(shape) != 2 or shape[0] % 2:
        raise ShapeError(f"quant_state.shape: expected the [2N, K] of a gated matrix, got {shape}")
    give_back = giver_back(A)
    a, packed = to_torch(A, "A"), to_torch(B, "B")
    added = None if bias is None else to_torch(bias, "bias")
    dtype = autocast_dtype(a)
    if dtype is not None and a.dtype in FLOAT_DTYPES:
        a = a.to(dtype)
    return give_back(_gated(a, packed, quant_state, gate, added))


def _gated(a: Tensor, packed: Tensor, state: QuantState, gate: str, bias: Tensor | None) -> Tensor:
    wanted = torch.is_grad_enabled() and (a.requires_grad or (bias is not None and bias.requires_grad))
    compiling = torch.compiler.is_dynamo_compiling()
    # Function transforms differentiate without saying so here; and what is wrong with the arguments, the product says.
    if wanted or not (compiling or ops.is_eager(a)) or state.blocksize is None or state.quant_type is None:
        return apart(matmul_as_is(a, packed, state, None, bias), gate)
    ops.check_device("A", a)
    ops.check_packed("B", packed, state.shape)  # type: ignore[arg-type]  # a matrix, as the caller has seen
    if packed.device != a.device:
        raise DeviceError(f"B: expected a tensor on {a.device} like A, got one on {packed.device}")
    absmax, nested = statistics(state, a.device)
    run: Any = torch.ops.halfbyte.matmul_4bit_gated.default if compiling else run_matmul_4bit_gated
    added = None if bias is None else bias.to(a.dtype)
    result: Tensor = run(a, packed, state.shape, absmax, state.blocksize, state.quant_type, gate, added, *nested)
    return result


def apart(product: Tensor, gate: str) -> Tensor:
    """Return ``gate(a) * b`` of the halves of ``[..., 2N]``, by torch."""
    a, b = product.chunk(2, -1)
    return GATES[gate](a) * b


def run_matmul_4bit_gated(
    A: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    gate: str,
    bias: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> Tensor:
    """Multiply by a packed gated weight; see the module's table."""
    n, k = _check(A, shape, gate, bias)
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    out = A.new_empty((*A.shape[:-1], n))
    if A.is_cuda and _product is not None and k and out.numel():
        A, B = A.contiguous(), B.contiguous()
        bias = None if bias is None else bias.contiguous()
        if _product(A, B, absmax, out, quant_type, blocksize, gate, bias, *nested):
            return out
    product = ops.run_matmul_4bit(A, B, shape, absmax, blocksize, quant_type, bias, *nested)
    if not A.is_cuda or _gate is None:
        return apart(product, gate)
    _gate(product, out, gate)
    return out


def _check_gate(gate: str) -> None:
    if gate not in GATES:
        raise ArgumentError(f"gate: expected one of {', '.join(map(repr, GATES))}, got {gate!r}")


def _check(A: Tensor, shape: Sequence[int], gate: str, bias: Tensor | None) -> tuple[int, int]:
    rows, k = ops._matrix(shape)
    if rows % 2:
        raise ShapeError(f"shape: expected the [2N, K] of a gated matrix, got {list(shape)}")
    _check_gate(gate)
    ops._check_matmul("A", A, rows, k, bias)
    return rows // 2, k


for _key in ("CPU", "CUDA"):
    ops._library.impl("matmul_4bit_gated", run_matmul_4bit_gated, _key)  # type: ignore[no-untyped-call]


@ops._fake("matmul_4bit_gated")
def _(
    A: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    gate: str,
    bias: Tensor | None = None,
    *nested: Any,
) -> Tensor:
    ops.check_blocksize(blocksize)
    ops.check_quant_type(quant_type)
    n, _ = _check(A, shape, gate, bias)
    return torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device)
