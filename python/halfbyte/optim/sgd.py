"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from halfbyte.errors import ArgumentError, UnsupportedError
from halfbyte.optim.optimizer import Optimizer1State

if TYPE_CHECKING:
    from typing import Unpack

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

    from halfbyte.optim._options import Options


def momentum_options(who: object, momentum: float, dampening: float, nesterov: bool) -> dict[str, bool]:
    """Check what SGD and LARS have in common, and return what a group has of it beside ``betas``.

    Raises
    ------
    UnsupportedError
        If `momentum` is 0: there would be no state to keep.
    ArgumentError
        If Nesterov's momentum is asked for with dampening.
    """
    if momentum == 0:
        raise UnsupportedError(f"momentum: {type(who).__name__} needs one above 0, got {momentum}")
    if nesterov and dampening != 0:
        raise ArgumentError(f"nesterov: expected a dampening of 0 with it, got {dampening}")
    return {"nesterov": True} if nesterov else {}


class SGD(Optimizer1State):
    """Stochastic gradient descent with momentum, as :class:`torch.optim.SGD`.

    Parameters
    ----------
    params
        fp32, fp16 or bf16 parameters on CPU or CUDA, or groups of them.
    lr
        Learning rate.
    momentum
        Factor of the momentum, above 0.
    dampening
        The gradient enters the momentum with ``1 - dampening``, except at the first step.
    weight_decay
        Times the parameter, added to the gradient.
    nesterov
        Step along ``gradient + momentum * buffer`` instead of the buffer.
    optim_bits, args, min_8bit_size, **options
        See :class:`~halfbyte.optim.Adam`.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    UnsupportedError
        If `momentum` is 0.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        self._rule_options = momentum_options(self, momentum, dampening, nesterov)
        super().__init__(
            "momentum",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            **options,
        )


class _SGDOfWidth(SGD):
    """SGD of one width."""

    _bits: ClassVar[int]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, self._bits, args, min_8bit_size, **options
        )


class SGD8bit(_SGDOfWidth):
    """:class:`SGD` with 8-bit states."""

    _bits = 8


class SGD32bit(_SGDOfWidth):
    """:class:`SGD` with 32-bit states."""

    _bits = 32
