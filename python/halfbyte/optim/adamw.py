"""AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from halfbyte.optim.adam import AdamRule

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

    from halfbyte.optim._options import Options


class _AdamW(AdamRule):
    """AdamW of every width that is not paged."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, **options
        )


class _PagedAdamW(AdamRule):
    """AdamW of every width that is paged."""

    _paged: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, **options)


class AdamW(_AdamW):
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).

    Parameters and errors are those of :class:`~halfbyte.optim.Adam`; `weight_decay` is 0.01 where it is not given.
    """


class AdamW8bit(_AdamW):
    """:class:`AdamW` with 8-bit states. `optim_bits` takes its default only."""

    _bits = 8


class AdamW32bit(_AdamW):
    """:class:`AdamW` with 32-bit states. `optim_bits` takes its default only."""

    _bits = 32


class PagedAdamW(_PagedAdamW):
    """:class:`AdamW` with paged states."""


class PagedAdamW8bit(_PagedAdamW):
    """:class:`AdamW` with paged 8-bit states. `optim_bits` takes its default only."""

    _bits = 8


class PagedAdamW32bit(_PagedAdamW):
    """:class:`AdamW` with paged 32-bit states. `optim_bits` takes its default only."""

    _bits = 32
