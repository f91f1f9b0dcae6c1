"""Adagrad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.errors import ArgumentError
from halfbyte.optim._options import refuse
from halfbyte.optim.optimizer import Optimizer1State

if TYPE_CHECKING:
    from typing import Unpack

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

    from halfbyte.optim._options import Options


class Adagrad(Optimizer1State):
    """Adagrad (Duchi et al. 2011), as :class:`torch.optim.Adagrad`.

    Parameters
    ----------
    params
        fp32, fp16 or bf16 parameters on CPU or CUDA, or groups of them.
    lr
        Learning rate.
    lr_decay, initial_accumulator_value
        Not supported.
    weight_decay
        Times the parameter, added to the gradient.
    eps
        Added to the root of the sum of squared gradients.
    optim_bits, args, min_8bit_size, **options
        See :class:`~halfbyte.optim.Adam`.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    UnsupportedError
        If `lr_decay` or `initial_accumulator_value` is set.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, "initial_accumulator_value", initial_accumulator_value, 0)
        refuse(self, "lr_decay", lr_decay, 0)
        super().__init__(
            "adagrad", params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, args, min_8bit_size, **options
        )


class Adagrad8bit(Adagrad):
    """:class:`Adagrad` with 8-bit states. `optim_bits` takes 8 only."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        if optim_bits != 8:
            raise ArgumentError(f"optim_bits: Adagrad8bit takes 8 only, got {optim_bits}")
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, 8, args, min_8bit_size, **options
        )


class Adagrad32bit(Adagrad):
    """:class:`Adagrad` with 32-bit states. `optim_bits` takes 32 only."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        if optim_bits != 32:
            raise ArgumentError(f"optim_bits: Adagrad32bit takes 32 only, got {optim_bits}")
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, 32, args, min_8bit_size, **options
        )
