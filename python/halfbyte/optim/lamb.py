"""LAMB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from halfbyte.errors import ArgumentError
from halfbyte.optim._options import refuse
from halfbyte.optim.optimizer import Optimizer2State

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

    from halfbyte.optim._options import Options


class LAMB(Optimizer2State):
    """LAMB (You et al. 2019, arXiv:1904.00962): Adam whose steps are no longer than the parameter allows.

    The step of a parameter, without its weight decay, is scaled by
    ``min(1, max_unorm * norm(parameter) / norm(update))``, which is bitsandbytes' reading of the paper.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay
        See :class:`~halfbyte.optim.Adam`.
    bias_correction
        Correct the moments for their start at zero.
    amsgrad
        Not supported.
    adam_w_mode
        Decay the parameter itself; with False, weight decay is a part of the gradient.
    optim_bits, args, min_8bit_size, **options
        See :class:`~halfbyte.optim.Adam`.
    max_unorm
        Largest norm of an update before the learning rate, as a multiple of the parameter's. 0 for no limit.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    UnsupportedError
        If `amsgrad` is set.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, "amsgrad", amsgrad, False)
        modes = {"bias_correction": bias_correction, "adam_w_mode": adam_w_mode}
        self._rule_options = {name: False for name, mode in modes.items() if not mode}
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm,
            **options,
        )


class _LAMBOfWidth(LAMB):
    """LAMB of one width."""

    _bits: ClassVar[int]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        if self._bits == 8 and max_unorm != 1.0:
            raise ArgumentError(f"max_unorm: LAMB8bit takes 1.0 only, got {max_unorm}; LAMB(optim_bits=8) takes any")
        super().__init__(
            params,
            lr,
            bias_correction,
            betas,
            eps,
            weight_decay,
            amsgrad,
            adam_w_mode,
            self._bits,
            args,
            min_8bit_size,
            max_unorm,
            **options,
        )


class LAMB8bit(_LAMBOfWidth):
    """:class:`LAMB` with 8-bit states.

    Raises
    ------
    ArgumentError
        If `max_unorm` is not 1, as in bitsandbytes; ``LAMB(optim_bits=8)`` takes any.
    """

    _bits = 8


class LAMB32bit(_LAMBOfWidth):
    """:class:`LAMB` with 32-bit states."""

    _bits = 32
