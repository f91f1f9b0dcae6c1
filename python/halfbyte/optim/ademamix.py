"""AdEMAMix."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from halfbyte.errors import ArgumentError
from halfbyte.optim.optimizer import Optimizer2State

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

    from halfbyte.optim._options import Options


class AdEMAMix(Optimizer2State):
    """AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137): Adam with a second, slow mean of gradients.

    Parameters
    ----------
    params
        fp32, fp16 or bf16 parameters on CPU or CUDA, or groups of them.
    lr
        Learning rate.
    betas
        Factors of the fast mean, the second moment, and the slow mean.
    alpha
        Weight of the slow mean.
    t_alpha
        Steps over which `alpha` grows from 0 to its value. None: it has it from the start.
    t_beta3
        Steps over which the factor of the slow mean grows from that of the fast one to its value, so that the number
        of steps it remembers grows evenly. None: it has it from the start.
    eps
        Added to the root of the second moment.
    weight_decay
        The parameter shrinks by ``lr * weight_decay`` of itself a step.
    optim_bits, min_8bit_size, is_paged, **options
        See :class:`~halfbyte.optim.Adam`.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        for name, steps in (("t_alpha", t_alpha), ("t_beta3", t_beta3)):
            if steps is not None and steps < 0:
                raise ArgumentError(f"{name}: expected a number of steps or None, got {steps}")
        super().__init__(
            "ademamix",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            None,
            min_8bit_size,
            is_paged=is_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            **options,
        )


class _AdEMAMixOfWidth(AdEMAMix):
    """AdEMAMix of one width."""

    _bits: ClassVar[int]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            self._bits,
            min_8bit_size,
            is_paged,
            **options,
        )


class AdEMAMix8bit(_AdEMAMixOfWidth):
    """:class:`AdEMAMix` with 8-bit states."""

    _bits = 8


class AdEMAMix32bit(_AdEMAMixOfWidth):
    """:class:`AdEMAMix` with 32-bit states."""

    _bits = 32


class PagedAdEMAMix(AdEMAMix):
    """:class:`AdEMAMix` with paged states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay, optim_bits, min_8bit_size, True, **options
        )


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """:class:`AdEMAMix` with paged 8-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay, min_8bit_size, True, **options)


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """:class:`AdEMAMix` with paged 32-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay, min_8bit_size, True, **options)
