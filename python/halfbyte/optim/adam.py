"""Adam, with weight decay as in AdamW: bitsandbytes makes no difference between the two but the default."""

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


class AdamRule(Optimizer2State):
    """What Adam and AdamW of every width have in common."""

    _bits: ClassVar[int | None] = None
    """Bits of the states; None leaves them to `optim_bits`."""
    _paged: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, "amsgrad", amsgrad, False)
        if self._bits is not None and optim_bits != 32:
            raise ArgumentError(
                f"optim_bits: {type(self).__name__} has {self._bits}-bit states and takes only the default, 32, "
                f"which stands there because bitsandbytes has it; got {optim_bits}"
            )
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits if self._bits is None else self._bits,
            args,
            min_8bit_size,
            is_paged=is_paged or self._paged,
            **options,
        )


class Adam(AdamRule):
    """Adam (Kingma & Ba 2014, arXiv:1412.6980), with decoupled weight decay.

    Parameters
    ----------
    params
        fp32, fp16 or bf16 parameters on CPU or CUDA, or groups of them.
    lr
        Learning rate.
    betas
        Factors of the first and second moment, or a string, ``"(0.9, 0.999)"``.
    eps
        Added to the root of the second moment.
    weight_decay
        The parameter shrinks by ``lr * weight_decay`` of itself a step, as in :class:`AdamW` and unlike
        :class:`torch.optim.Adam`.
    amsgrad
        Not supported.
    optim_bits
        8 or 32: bits an element of a state. 8-bit states have a scale for every 256 elements (Dettmers et al. 2021,
        arXiv:2110.02861).
    args
        An object with attributes that are used instead of arguments; see :class:`~halfbyte.optim.Optimizer2State`.
    min_8bit_size
        Parameters of fewer elements have 32-bit states.
    is_paged
        Keep large states in memory that the driver moves to the host when the GPU runs short.
    **options
        See :class:`~halfbyte.optim.Options`.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    UnsupportedError
        If `amsgrad` is set.
    """


class Adam8bit(AdamRule):
    """:class:`Adam` with 8-bit states. `optim_bits` takes its default only."""

    _bits = 8


class Adam32bit(AdamRule):
    """:class:`Adam` with 32-bit states. `optim_bits` takes its default only."""

    _bits = 32


class PagedAdam(AdamRule):
    """:class:`Adam` with paged states."""

    _paged = True


class PagedAdam8bit(AdamRule):
    """:class:`Adam` with paged 8-bit states. `optim_bits` takes its default only."""

    _bits, _paged = 8, True


class PagedAdam32bit(AdamRule):
    """:class:`Adam` with paged 32-bit states. `optim_bits` takes its default only."""

    _bits, _paged = 32, True
