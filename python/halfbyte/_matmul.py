"""``matmul_4bit``: activations times a packed weight, eager, compiled, or with a gradient.

The eager call without a gradient is on the path of every token that a model generates, so all of it is one call of the
Rust core (``rust/python/src/eager.rs``), which goes past torch's dispatcher. Whatever that refuses takes the general
way, which either works or raises an error that says why.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte import _native, ops
from halfbyte import _transforms as transforms
from halfbyte._interop import giver_back, to_torch
from halfbyte._tables import FLOAT_DTYPES, NESTED_BLOCKSIZE
from halfbyte.errors import ArgumentError, DeviceError, DtypeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from halfbyte.quant_state import QuantState

# Bound here because each saves a look-up a call.
_eager = _native.eager_matmul_4bit
_compiling = torch.compiler.is_dynamo_compiling
_any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
_plain = ops.PLAIN_TENSORS


def matmul_4bit(A: Any, B: Any, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None) -> Any:
    """Multiply activations by a 4-bit weight: ``A @ W.T + bias``.

    Parameters
    ----------
    A
        Activations ``[..., K]``, fp32, fp16 or bf16. A NumPy array or another DLPack producer is accepted too, and its
        library gets the result.
    B
        Packed weight as :func:`~halfbyte.functional.quantize_4bit` returns it, or its transpose ``B.t()``.
    quant_state
        Its state; ``quant_state.shape`` is ``[N, K]``.
    out
        Where to write the result, ``[..., N]`` of A's dtype. No gradient then.
    bias
        ``[N]``; cast to A's dtype if it has another.

    Returns
    -------
    Tensor
        ``[..., N]`` of A's dtype. Sums are fp32; fp32 activations are multiplied in true fp32. Under
        :class:`torch.autocast`, A is cast first, as by :func:`torch.nn.functional.linear`.

    Raises
    ------
    DtypeError, ShapeError, DeviceError, ArgumentError
        If tensors do not fit together. Nothing is written then.

    Notes
    -----
    Gradients reach `A` and `bias`. The weight has none; the packed bytes are what is saved for the backward pass, and
    QLoRA's product with the dequantized weight (Dettmers et al. 2023, arXiv:2305.14314) is what it does.

    A weight that was quantized transposed, ``[K, N]``, is multiplied as it was meant, with a DeprecationWarning.
    """
    if out is None and not _compiling():
        result = _eager(A, B, quant_state, bias)
        if result is not None:
            return result
    return _general(A, B, quant_state, out, bias)


def statistics(state: QuantState, device: torch.device) -> tuple[Tensor, list[Any]]:
    """Return absmax and the list of the four nested arguments of the ops, as the kernels want them.

    Raises
    ------
    ArgumentError, DeviceError
        If the state is incomplete, or its tensors are not on `device`.
    """
    absmax = _statistic("absmax", state.absmax, device)
    if not state.nested or state.state2 is None:
        return absmax, [None, None, None, NESTED_BLOCKSIZE]
    nested = state.state2
    offset = _statistic("offset", state.offset, device)
    inner = _statistic("state2.absmax", nested.absmax, device)
    code = _statistic("state2.code", nested.code, device)
    if type(nested.blocksize) is not int or not 0 < nested.blocksize < 2**31:
        raise ArgumentError(f"quant_state.state2.blocksize: expected a positive number, got {nested.blocksize!r}")
    # bitsandbytes takes an offset of any float dtype, and files read under another default dtype leave one.
    return absmax, [inner, code, offset if offset.dtype == torch.float32 else offset.float(), nested.blocksize]


def _statistic(name: str, value: object, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        raise ArgumentError(f"quant_state.{name}: expected a tensor, got {type(value).__name__}")
    ops.check_strided(f"quant_state.{name}", value)
    if value.device != device:
        raise DeviceError(f"quant_state.{name}: expected a tensor on {device}, got one on {value.device}")
    return value


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what autocast would cast `x` to; None where it is off."""
    if not _compiling() and not _any_autocast():
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def _general(A: Any, B: Any, state: QuantState, out: Tensor | None, bias: Tensor | None) -> Any:
    give_back = giver_back(A)
    A, B = to_torch(A, "A"), to_torch(B, "B")
    dtype = autocast_dtype(A)
    if dtype is not None and A.dtype in FLOAT_DTYPES:
        A = A.to(dtype)
    return give_back(matmul_as_is(A, B, state, out, None if bias is None else to_torch(bias, "bias")))


def matmul_as_is(A: Tensor, B: Tensor, state: QuantState, out: Tensor | None, bias: Tensor | None) -> Tensor:
    """Do what :func:`matmul_4bit` does, for torch tensors and with no regard to autocast."""
    shape, blocksize, quant_type = state.shape, state.blocksize, state.quant_type
    if shape is None or len(shape) != 2:
        raise ShapeError(f"quant_state.shape: expected the [N, K] of a matrix, got {shape}")
    if blocksize is None or quant_type is None:
        raise ArgumentError(f"quant_state: expected a 4-bit state, got blocksize {blocksize}, quant_type {quant_type}")
    n, k = shape
    ops.check_device("A", A)
    ops.check_dtype("A", A.dtype)
    ops.check_blocksize(blocksize)
    ops.check_quant_type(quant_type)
    ops.check_packed("B", B, (n, k))
    if B.device != A.device:
        raise DeviceError(f"B: expected a tensor on {A.device} like A, got one on {B.device}")
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    absmax, nested = statistics(state, A.device)
    if A.dim() and A.shape[-1] == n != k:
        warnings.warn(
            f"matmul_4bit: the weight was quantized as its transpose, {[n, k]}, which fits A only that way round. "
            "Re-quantize from the weight in [out_features, in_features] order.",
            DeprecationWarning,
            stacklevel=3,
        )
        product = torch.ops.halfbyte.matmul_4bit_grad_input.default(
            A, B, (n, k), absmax, blocksize, quant_type, *nested
        )
        return _written(product if bias is None else product + bias, out)
    arguments: list[Any] = [A, B, (n, k), absmax, blocksize, quant_type, bias, *nested]
    if not _compiling() and transforms.active():
        return _written(_transformed(arguments), out)
    needs_grad = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    if needs_grad or not ops.is_eager(A) or type(B) not in _plain:
        return _written(torch.ops.halfbyte.matmul_4bit.default(*arguments), out)
    if out is not None and _is_place_for(out, A, n):
        arguments.append(out)
    return _written(ops.run_matmul_4bit(*arguments), out)


def _transformed(arguments: list[Any]) -> Tensor:
    A, B, shape, absmax, blocksize, quant_type, bias, *nested = arguments
    forth, back = torch.ops.halfbyte.matmul_4bit.default, torch.ops.halfbyte.matmul_4bit_grad_input.default
    weight = (B, shape, absmax, blocksize, quant_type)

    def product(x: Tensor, addend: Tensor | None = None) -> Tensor:
        return forth(x, *weight, addend, *nested)  # type: ignore[no-any-return]

    return transforms.multiply(A, bias, product, product, lambda grad: back(grad, *weight, *nested))


def _is_place_for(out: Tensor, A: Tensor, n: int) -> bool:
    return (
        type(out) in _plain
        and out.shape == (*A.shape[:-1], n)
        and out.dtype == A.dtype
        and out.device == A.device
        and out.is_contiguous()
    )


def _written(result: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return result
    if out.shape != result.shape:
        raise ShapeError(f"out: expected shape {list(result.shape)}, got {list(out.shape)}")
    if out.dtype != result.dtype:
        raise DtypeError(f"out: expected dtype {result.dtype}, got {out.dtype}")
    return result if result is out else out.copy_(result)
