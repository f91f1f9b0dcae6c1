"""RMSprop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from halfbyte.errors import UnsupportedError
from halfbyte.optim._options import refuse
from halfbyte.optim.optimizer import Optimizer1State

if TYPE_CHECKING:
    from typing import Unpack

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

    from halfbyte.optim._options import Options


class RMSprop(Optimizer1State):
    """RMSprop (Tieleman & Hinton 2012), as :class:`torch.optim.RMSprop`.

    Parameters
    ----------
    params
        fp32, fp16 or bf16 parameters on CPU or CUDA, or groups of them.
    lr
        Learning rate.
    alpha
        Factor of the mean of squared gradients, above 0.
    eps
        Added to the root of that mean.
    weight_decay
        Times the parameter, added to the gradient.
    momentum, centered
        Not supported.
    optim_bits, args, min_8bit_size, **options
        See :class:`~halfbyte.optim.Adam`.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    UnsupportedError
        If `alpha` is 0, or `momentum` or `centered` is set.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        if alpha == 0:
            raise UnsupportedError(f"alpha: {type(self).__name__} needs one above 0, got {alpha}")
        refuse(self, "momentum", momentum, 0)
        refuse(self, "centered", centered, False)
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, momentum),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            **options,
        )


class _RMSpropOfWidth(RMSprop):
    """RMSprop of one width."""

    _bits: ClassVar[int]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, self._bits, args, min_8bit_size, **options
        )


class RMSprop8bit(_RMSpropOfWidth):
    """:class:`RMSprop` with 8-bit states."""

    _bits = 8


class RMSprop32bit(_RMSpropOfWidth):
    """:class:`RMSprop` with 32-bit states."""

    _bits = 32
