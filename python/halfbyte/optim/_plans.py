"""From parameter groups to plans of the core: which parameters one launch updates, and with what.

A plan (``_native.OptimPlan``) holds parameters of one device that share their options, and the very dicts that
``optimizer.state`` has of them; it reads both at every step, so replacing a tensor in either needs nothing from here.
Plans are made again when a list of parameters, a dict of states or an option of a single parameter has changed.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte import _native, ops
from halfbyte._optimizer_update import L2_RULES
from halfbyte.errors import ArgumentError, DeviceError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from halfbyte.optim.optimizer import Optimizer8bit


def arguments(rule: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a plan's step takes besides ``lr`` and gradients, from the options of a parameter."""
    betas = config["betas"]
    given = {
        "beta1": betas[0],
        "eps": config["eps"],
        "weight_decay": config["weight_decay"],
        "max_unorm": config["max_unorm"],
        "skip_zeros": config["skip_zeros"],
        "maximize": config["maximize"],
        "decay": "l2" if rule in L2_RULES or not config["adam_w_mode"] else "decoupled",
    }
    if rule in ("momentum", "lars"):
        return given | {"dampening": betas[1], "nesterov": config["nesterov"]}
    if rule == "ademamix":
        if len(betas) < 3:
            raise ArgumentError(f"betas: expected 3 numbers for AdEMAMix, got {betas}")
        given["beta3"] = betas[2]
        given |= {name: config[name] for name in ("alpha", "t_alpha", "t_beta3")}
    return given | {"beta2": betas[1], "bias_correction": config["bias_correction"]}


def plain(tensor: Tensor) -> Tensor:
    """Return the memory of this process behind `tensor` as a plain tensor: the local shard of a distributed one."""
    if type(tensor) in ops.PLAIN_TENSORS:
        return tensor
    to_local = getattr(tensor, "to_local", None)
    if to_local is not None:
        tensor = to_local()
    return tensor.as_subclass(Tensor) if type(tensor) not in ops.PLAIN_TENSORS else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a part of one that several processes hold."""
    return type(tensor) not in ops.PLAIN_TENSORS and hasattr(tensor, "to_local")


class Run:
    """Parameters that one plan updates, and the plan.

    Parameters that are contiguous plain tensors are updated where they are. Others get there by a detour: shards and
    subclasses as the plain tensor behind them, parameters of another layout through a contiguous copy a step.
    """

    def __init__(self, rule: str, params: Sequence[Tensor], states: Sequence[dict[str, Any]], capturable: bool) -> None:
        self.params = list(params)
        self.states = list(states)
        self.grads: list[Tensor | None] | None = None
        """Gradients of the step at hand where they are not just ``param.grad``."""
        self._rule, self._capturable = rule, capturable
        self._plain = [plain(param) for param in self.params]
        self._copied = not all(param.is_contiguous() for param in self._plain)
        self._direct = not self._copied and all(map(is_, self._plain, self.params))
        if capturable and not all(param.is_cuda for param in self._plain):
            raise DeviceError(f"capturable: expected parameters on cuda, got one on {self._plain[0].device}")
        self.plan: Any = self._plan(self._plain) if not self._copied else None

    def _plan(self, params: list[Tensor]) -> Any:
        return _native.OptimPlan(self._rule, params, self.states, self._capturable)

    def begin(self) -> None:
        """Make `plan` and `grads` fit for a step."""
        if self._direct:
            return
        self.grads = [None if param.grad is None else plain(param.grad) for param in self.params]
        if not self._copied:
            return
        self._plain = [plain(param) for param in self.params]
        self._contiguous = [param.detach().contiguous() for param in self._plain]
        self.plan = self._plan(self._contiguous)

    def end(self) -> None:
        """Put copies back, and let autograd know that parameters have changed."""
        if self._copied:
            for param, copy in zip(self._plain, self._contiguous, strict=True):
                if param.data_ptr() != copy.data_ptr():
                    param.detach().copy_(copy)
            self.plan, self._contiguous = None, []
        torch.autograd.graph.increment_version(self.params)


class Plans:
    """Every run of an optimizer, and a memory of what they were made from."""

    def __init__(self, optimizer: Optimizer8bit) -> None:
        self.runs: list[tuple[Run, dict[str, Any], int, int]] = []
        """Run, group, and position of its first parameter."""
        self._version = optimizer.mng.version
        self._groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._waiting: list[Tensor] = []
        for gindex, group in enumerate(optimizer.param_groups):
            self._groups.append((group, list(group["params"])))
            for positions in self._sorted(optimizer, gindex, group).values():
                params = [group["params"][pindex] for pindex in positions]
                states = [optimizer.state[param] for param in params]
                run = Run(optimizer.optimizer_name, params, states, optimizer.capturable)
                self.runs.append((run, group, gindex, positions[0]))
        self._states = list(optimizer.state.values())
        self._in_use = [state for run, *_ in self.runs for state in run.states]

    def _sorted(self, optimizer: Optimizer8bit, gindex: int, group: dict[str, Any]) -> dict[Any, list[int]]:
        """Return positions of the parameters that are at work, by what they cannot differ in within a run."""
        sorted_: dict[Any, list[int]] = {}
        for pindex, param in enumerate(group["params"]):
            if not optimizer.state.get(param):
                if param.grad is None:
                    self._waiting.append(param)
                    continue
                optimizer.init_state(group, param, gindex, pindex)
            config = optimizer.get_config(gindex, pindex, group)
            own = optimizer.mng.config_of(param, gindex, pindex)
            where = plain(param)
            # An option of the parameter's own is told from an equal one of the group, which may change tomorrow.
            key = (where.device, where.is_contiguous(), frozenset(own), *map(_comparable, config.values()))
            sorted_.setdefault(key, []).append(pindex)
        return sorted_

    def are_current(self, optimizer: Optimizer8bit) -> bool:
        """Whether what the plans were made from is still so."""
        if self._version != optimizer.mng.version or len(self._groups) != len(optimizer.param_groups):
            return False
        for (group, params), now in zip(self._groups, optimizer.param_groups, strict=True):
            if group is not now or not _native.same_items(params, now["params"]):
                return False
        return (
            _native.same_values(self._states, optimizer.state)
            and _native.all_filled(self._in_use)
            and all(param.grad is None for param in self._waiting)
        )


def _comparable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    return value if isinstance(value, int | float | str | None) else id(value)


def scalar_on(value: Any, device: torch.device) -> Any:
    """Return `value`, if it is a tensor, on `device`."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) and value.device != device else value


def total_norm(runs: Iterable[Run], grad_scale: Any) -> Tensor:
    """Return the L2 norm of the gradients of all runs, of their values without the scale they came with."""
    by_device: dict[torch.device, list[Run]] = {}
    for run in runs:
        if any(map(is_sharded, run.params)):
            raise UnsupportedError(
                "max_grad_norm: the norm of gradients that are spread over processes is not known to one of them; "
                "use torch.nn.utils.clip_grad_norm_"
            )
        by_device.setdefault(plain(run.params[0]).device, []).append(run)
    norms = []
    for device, together in by_device.items():
        norm = torch.empty((1,), dtype=torch.float32, device=device)
        _native.optim_grad_norm([run.plan for run in together], norm, [run.grads for run in together])
        norms.append(norm)
    total = norms[0]
    if len(norms) > 1:
        total = torch.linalg.vector_norm(torch.cat([norm.to(total.device) for norm in norms])).view(1)
    return total if grad_scale is None else total / scalar_on(grad_scale, total.device)
