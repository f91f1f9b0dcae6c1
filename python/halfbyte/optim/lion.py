"""Lion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from halfbyte.optim.optimizer import Optimizer1State

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

    from halfbyte.optim._options import Options


class Lion(Optimizer1State):
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a mean of gradients, with decoupled weight decay.

    Parameters
    ----------
    params
        fp32, fp16 or bf16 parameters on CPU or CUDA, or groups of them.
    lr
        Learning rate; every element moves by this much.
    betas
        Factor of the mean that the sign is taken of, and of the mean that is kept.
    weight_decay
        The parameter shrinks by ``lr * weight_decay`` of itself a step.
    optim_bits, args, min_8bit_size, is_paged, **options
        See :class:`~halfbyte.optim.Adam`.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Sequence[float] | str = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            **options,
        )


class _LionOfWidth(Lion):
    """Lion of one width."""

    _bits: ClassVar[int]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Sequence[float] | str = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, self._bits, args, min_8bit_size, is_paged, **options)


class _PagedLionOfWidth(Lion):
    """Paged Lion of one width."""

    _bits: ClassVar[int]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Sequence[float] | str = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, self._bits, args, min_8bit_size, True, **options)


class Lion8bit(_LionOfWidth):
    """:class:`Lion` with 8-bit states."""

    _bits = 8


class Lion32bit(_LionOfWidth):
    """:class:`Lion` with 32-bit states."""

    _bits = 32


class PagedLion(Lion):
    """:class:`Lion` with paged states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Sequence[float] | str = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, optim_bits, args, min_8bit_size, True, **options)


class PagedLion8bit(_PagedLionOfWidth):
    """:class:`Lion` with paged 8-bit states."""

    _bits = 8


class PagedLion32bit(_PagedLionOfWidth):
    """:class:`Lion` with paged 32-bit states."""

    _bits = 32
