"""Products with packed weights under the transforms of ``torch.func`` and in forward-mode differentiation.

``torch.library`` gives an op gradients, but neither rules for ``torch.func`` nor for tangents; without them ``grad``
raises and a tangent is lost. Here a product is an autograd function that has all of them. Weights are constants: what
is differentiated, or mapped over, is activations and bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from collections.abc import Callable

_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def active() -> bool:
    """Whether a transform is under way, or tangents may be. Not to be asked by what is being compiled."""
    return _functorch_active() or forward_ad._current_level >= 0


def multiply(
    A: Tensor,
    bias: Tensor | None,
    product: Callable[[Tensor, Tensor | None], Tensor],
    linear: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return ``product(A, bias)``, differentiable in any mode and any number of times.

    Parameters
    ----------
    A
        Activations ``[..., K]``.
    bias
        ``[N]`` of A's dtype, or None.
    product
        The product, ``[..., N]``.
    linear, adjoint
        What it does to a tangent ``[..., K]``, and to a gradient ``[..., N]``; derivatives of each other.
    """

    def with_bias(x: Tensor, addend: Tensor | None) -> Tensor:
        return linear(x) if addend is None else linear(x) + addend

    forth, back = _Map(with_bias), _Map(lambda x, _: adjoint(x))
    # The derivative of a linear map is itself, and of one of these two the other is the adjoint.
    forth.set_derivative(forth, back)
    back.set_derivative(back, forth)
    start = _Map(product)
    start.set_derivative(forth, back)
    return start(A, bias)


class _Map:
    """A function of activations and a bias, with its derivative along activations and the adjoint of that."""

    def __init__(self, function: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.function = function

    def set_derivative(self, forth: _Map, back: _Map) -> None:
        self.forth, self.back = forth, back

    def __call__(self, A: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = _Affine.apply(A, bias, self)  # type: ignore[no-untyped-call]
        return result


class _Affine(torch.autograd.Function):
    """A :class:`_Map` with all rules."""

    @staticmethod
    def forward(A: Tensor, bias: Tensor | None, of: _Map) -> Any:
        return of.function(A, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        A, bias, ctx.of = inputs
        ctx.has_bias, ctx.out_shape = bias is not None, output.shape
        ctx.leading = tuple(range(A.dim() - 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        grad_A = ctx.of.back(grad) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.has_bias and ctx.needs_input_grad[1]:
            grad_bias = grad.sum(ctx.leading) if ctx.leading else grad
        return grad_A, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        along_A, along_bias = tangents[:2]
        if along_A is None:
            return along_bias.expand(ctx.out_shape).clone()
        result = ctx.of.forth(along_A)
        return result if along_bias is None else result + along_bias

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], A: Tensor, bias: Tensor | None, of: _Map) -> Any:
        at_A, at_bias, _ = in_dims
        # Activations may have any leading dimensions, so that one more is none.
        A = A.unsqueeze(0).expand(info.batch_size, *A.shape) if at_A is None else A.movedim(at_A, 0)
        if bias is None or at_bias is None:
            return of(A, bias), 0
        bias = bias.movedim(at_bias, 0)
        return of(A) + bias.reshape(bias.shape[0], *[1] * (A.dim() - 2), bias.shape[1]), 0
