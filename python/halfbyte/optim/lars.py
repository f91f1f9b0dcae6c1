"""LARS, and the same in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from halfbyte.errors import ArgumentError
from halfbyte.optim._options import check_at_least
from halfbyte.optim.optimizer import Optimizer1State
from halfbyte.optim.sgd import momentum_options

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

    from halfbyte.optim._options import Options


class LARS(Optimizer1State):
    """LARS (You et al. 2017, arXiv:1708.03888): SGD with momentum whose steps are no longer than the parameter allows.

    The step of a parameter is scaled by ``min(1, max_unorm * norm(parameter) / norm(momentum))``.

    Parameters
    ----------
    params, lr, momentum, dampening, weight_decay, nesterov, optim_bits, args, min_8bit_size, **options
        See :class:`~halfbyte.optim.SGD`.
    max_unorm
        Largest norm of an update before the learning rate, as a multiple of the parameter's. 0 for no limit.

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
        max_unorm: float = 0.02,
        **options: Unpack[Options],
    ) -> None:
        self._rule_options = momentum_options(self, momentum, dampening, nesterov)
        super().__init__(
            "lars",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm,
            **options,
        )


class _LARSOfWidth(LARS):
    """LARS of one width."""

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
        max_unorm: float = 0.02,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            self._bits,
            args,
            min_8bit_size,
            max_unorm,
            **options,
        )


class LARS8bit(_LARSOfWidth):
    """:class:`LARS` with 8-bit states."""

    _bits = 8


class LARS32bit(_LARSOfWidth):
    """:class:`LARS` with 32-bit states."""

    _bits = 32


class PytorchLARS(torch.optim.Optimizer):
    """LARS in plain torch operations, to compare with.

    Parameters
    ----------
    params, lr, momentum, dampening, weight_decay, nesterov, max_unorm
        See :class:`LARS`. `momentum` may be 0.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            check_at_least(name, value)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ArgumentError(
                f"nesterov: expected a momentum above 0 and no dampening with it, got {momentum} and {dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "max_unorm": max_unorm,
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
        momentum, limit = group["momentum"], group["max_unorm"]
        update = param.grad + group["weight_decay"] * param
        if momentum != 0:
            state = self.state[param]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = state["momentum_buffer"] = update.clone()
            else:
                buffer.mul_(momentum).add_(update, alpha=1 - group["dampening"])
            update = update + momentum * buffer if group["nesterov"] else buffer
        scale = 1.0
        if limit > 0:
            longest = limit * torch.linalg.vector_norm(param, dtype=torch.float32)
            length = torch.linalg.vector_norm(update, dtype=torch.float32)
            scale = float(torch.where(length > longest, longest / length, 1.0))
        param.add_(update, alpha=-group["lr"] * scale)
