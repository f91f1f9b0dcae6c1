"""AdEMAMix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from halfbyte.errors import ArgumentError
from halfbyte.optim.optimizer import Optimizer2State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
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


class _ReferenceAdEMAMix(torch.optim.Optimizer):
    """AdEMAMix in plain torch operations, to compare with; arguments as of :class:`AdEMAMix`.

    The states of a parameter are ``m1_m2``, ``[2, *shape]``, and ``nu``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "t_beta3": t_beta3,
            "t_alpha": t_alpha,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` returned, else None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(group, param)
        return loss

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["m1_m2"] = param.new_zeros((2, *param.shape))
            state["nu"] = torch.zeros_like(param)
        state["step"] += 1
        step, (beta1, beta2, beta3), alpha = state["step"], group["betas"], group["alpha"]
        if group["t_alpha"]:
            alpha *= min(step / group["t_alpha"], 1.0)
        if group["t_beta3"]:
            # 1 / log of the factor, which is about the number of steps it remembers, goes evenly from one to the other.
            share = step / group["t_beta3"]
            between = (1 - share) / math.log(beta1) + share / math.log(beta3)
            beta3 = beta3 if share >= 1 else min(math.exp(1 / between), beta3)
        grad, (fast, slow), square = param.grad, state["m1_m2"], state["nu"]
        fast.lerp_(grad, 1 - beta1)
        slow.lerp_(grad, 1 - beta3)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        mean = fast / (1 - beta1**step) + alpha * slow
        root = (square / (1 - beta2**step)).sqrt() + group["eps"]
        param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(mean / root, alpha=group["lr"])
