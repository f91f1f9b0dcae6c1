"""The optimizer that all others are: states, plans and steps, state dicts; with bitsandbytes' three base classes."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte._tables import dynamic_map
from halfbyte.errors import ArgumentError, UnsupportedError
from halfbyte.optim._named import Named
from halfbyte.optim._options import (
    GROUP_OPTIONS,
    Options,
    check_at_least,
    check_betas,
    check_exclusive,
    group_options,
)
from halfbyte.optim._pages import LEAST, GlobalPageManager, Pages, is_paged
from halfbyte.optim._plans import Plans, Run, arguments, plain, scalar_on, total_norm
from halfbyte.optim._states import (
    BITSANDBYTES_TENSORS,
    OUR_TENSORS,
    WRAPPED,
    blocks,
    check_groups,
    complete,
    given_out,
    modernize,
    shard_of,
    unwrap,
    wrap,
)
from halfbyte.optim._watched import watched
from halfbyte.optim.manager import GlobalOptimManager

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Unpack

    from torch.optim.optimizer import ParamsT

# What a group has of options that bitsandbytes' groups do not know, where nothing else is said.
_GROUP_DEFAULTS: dict[str, Any] = GROUP_OPTIONS | {"nesterov": False, "bias_correction": True, "adam_w_mode": True}


class MockArgs:
    """Options as attributes: what an optimizer's ``args`` is, unless the caller brought an object of their own."""

    def __init__(self, initial_data: dict[str, Any]) -> None:
        for name, value in initial_data.items():
            setattr(self, name, value)


class Optimizer8bit(torch.optim.Optimizer, metaclass=Named):
    """Base of all optimizers here.

    A step is one call of the core for each group of parameters, whatever their number, sizes and element types; on a
    GPU it goes to torch's current stream and is not waited for. Arithmetic is fp32, and a parameter is rounded once.
    An element whose gradient is infinite or NaN is left alone, parameter and states.

    Parameters
    ----------
    params
        fp32, fp16 or bf16 parameters on CPU or CUDA, or groups of them. A group may set any option of its own:
        ``lr``, ``betas``, ``weight_decay``, ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and so on.
    defaults
        Options of groups that do not set them.
    optim_bits
        8 or 32: bits an element of a state.
    is_paged
        Keep large states in memory that the driver moves to the host when the GPU runs short. Nothing on the CPU.
    **options
        See :class:`~halfbyte.optim.Options`.
    """

    _FSDP_WRAPPED_QUANT_STATE_KEY: ClassVar[str] = WRAPPED
    _two_states: ClassVar[bool] = True
    _rule_options: Mapping[str, Any] = MappingProxyType({})
    """Options of a rule that bitsandbytes' groups do not know, where they are not at their default."""

    optimizer_name: str
    """The rule: adam, ademamix, lion, momentum, lars, lamb, rmsprop or adagrad."""
    args: Any
    grad_norm: Tensor | None
    """With ``max_grad_norm``: L2 norm of the last step's gradients, fp32 ``[1]`` on their device, not waited for."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        optim_bits: int = 32,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {**defaults, **self._rule_options, **group_options(options)}
        self.capturable = options.get("capturable", False)
        self.max_grad_norm = options.get("max_grad_norm")
        self.grad_norm = None
        self.initialized = False
        self.is_paged = is_paged
        self.name2qmap: dict[str, Tensor] = {}
        self.non_castable_tensor_keys = set(BITSANDBYTES_TENSORS | OUR_TENSORS)
        self._helpers()
        super().__init__(params, defaults)
        # GradScaler hands such an optimizer the scale and whether to step, instead of asking the GPU and waiting.
        self._step_supports_amp_scaling = self.capturable
        if optim_bits == 8:
            self.fill_qmap()

    def _helpers(self) -> None:
        """Make what is neither copied nor pickled with an optimizer."""
        self.mng = GlobalOptimManager.get_instance()
        self.page_mng = GlobalPageManager.get_instance()
        self._plans: Plans | None = None
        self._pages = Pages()

    def fill_qmap(self) -> None:
        """Make this optimizer's own copies of the two dynamic maps, which states refer to."""
        self.name2qmap = {"dynamic": dynamic_map(True).clone(), "udynamic": dynamic_map(False).clone()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :meth:`torch.optim.Optimizer.add_param_group`."""
        check_exclusive(self.defaults | param_group)
        super().add_param_group(param_group)

    # ---- options

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return the options of parameter `pindex` of group `gindex`: its own, else its group's, else the optimizer's.

        Parameters
        ----------
        gindex, pindex
            Where the parameter stands.
        group
            ``self.param_groups[gindex]``.
        """
        args = self.args
        config = {
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "lr": group["lr"],
            "alpha": group.get("alpha", 0.0),
            "t_alpha": group.get("t_alpha"),
            "t_beta3": group.get("t_beta3"),
            "optim_bits": group.get("optim_bits", args.optim_bits),
            "min_8bit_size": group.get("min_8bit_size", args.min_8bit_size),
            "max_unorm": group.get("max_unorm", args.max_unorm),
            "skip_zeros": group.get("skip_zeros", args.skip_zeros),
        }
        for name, default in _GROUP_DEFAULTS.items():
            config[name] = group.get(name, default)
        manager = self.mng
        if manager.pid2config or manager.index2config:
            config.update(manager.config_of(group["params"][pindex], gindex, pindex))
        return config

    def check_overrides(self) -> None:
        """Give parameters of modules what :meth:`GlobalOptimManager.register_module_override` holds for them."""
        registered = self.mng.module_weight_config_triple
        if not registered:
            return
        places = {
            id(param): (gindex, pindex)
            for gindex, group in enumerate(self.param_groups)
            for pindex, param in enumerate(group["params"])
        }
        for module, name, config in registered:
            param = getattr(module, name)
            if not isinstance(param, Tensor):
                raise ArgumentError(
                    f"{name}: expected a parameter of {type(module).__name__}, to which options were given, "
                    f"got {type(param).__name__}"
                )
            place = places.get(id(param))
            if place is not None:
                self.mng.give(param, config)
                self.mng.index2config[place] = config
                self.mng.version += 1

    # ---- states

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Make the states of `p`, all zero.

        Raises
        ------
        UnsupportedError
            If ``optim_bits`` is neither 8 nor 32.
        """
        config = self.get_config(gindex, pindex, group)
        bits = config["optim_bits"]
        if bits not in (8, 32):
            raise UnsupportedError(f"optim_bits: expected 8 or 32, got {bits}")
        local = plain(p)
        ops.check_dtype(f"params[{pindex}]", local.dtype)
        if config["max_unorm"] > 0.0 and shard_of(p):
            raise UnsupportedError(
                "max_unorm: the norm of a parameter that is spread over processes is not known to one"
            )
        eight = bits == 8 and local.numel() >= config["min_8bit_size"]
        dtype = torch.uint8 if eight else torch.float32
        copies = 2 if self.optimizer_name == "ademamix" else 1
        state = self.state[p]
        state["step"] = 0
        state["state1"] = self.get_state_buffer(local, dtype, copies)
        if eight:
            state["qmap1"] = self._qmap("dynamic", local.device)
            rows = (2,) if copies == 2 else ()
            state["absmax1"] = torch.zeros((*rows, blocks(local)), dtype=torch.float32, device=local.device)
        if self._two_states:
            state["state2"] = self.get_state_buffer(local, dtype)
            if eight:
                state["qmap2"] = self._qmap("udynamic", local.device)
                state["absmax2"] = torch.zeros((blocks(local),), dtype=torch.float32, device=local.device)
        if config["max_unorm"] > 0.0:
            state["unorm_vec"] = torch.zeros((1,), dtype=torch.float32, device=local.device)
        complete(state, local, config)

    def _qmap(self, name: str, device: torch.device) -> Tensor:
        if not self.name2qmap:
            self.fill_qmap()
        if self.name2qmap[name].device != device:
            self.name2qmap[name] = self.name2qmap[name].to(device)
        return self.name2qmap[name]

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32, copies: int = 1) -> Tensor:
        """Return zeros like `p`, in paged memory where that applies.

        Parameters
        ----------
        copies
            With 2, the result is ``[2, *p.shape]``.
        """
        shape = p.shape if copies == 1 else (copies, *p.shape)
        if self._is_paged(p):
            return self._pages.zeros(shape, dtype, p.device)
        return torch.zeros(shape, dtype=dtype, device=p.device)

    def _is_paged(self, p: Tensor) -> bool:
        return self.is_paged and p.is_cuda and p.numel() >= LEAST

    def prefetch_state(self, p: Tensor) -> None:
        """Do nothing: a step has paged states brought ahead of their use by itself. For code that calls this."""

    def to_gpu(self) -> None:
        """Move states to the GPU of their parameter, where a model has been moved after its optimizer was loaded."""
        for group in self.param_groups:
            for p in group["params"]:
                local = plain(p)
                for name, value in self.state.get(p, {}).items() if local.is_cuda else ():
                    if name in self.non_castable_tensor_keys and not is_paged(value) and value.device != local.device:
                        self.state[p][name] = value.to(local.device)

    # ---- steps

    @watched
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Parameters
        ----------
        closure
            Computes the loss again, gradients included, before the update.

        Returns
        -------
        Any
            What `closure` returned, else None.

        Raises
        ------
        ArgumentError, DtypeError, ShapeError, DeviceError
            If a parameter, a gradient or a state does not fit. No parameter of its group has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    # There is nothing to trace in it; a closure, which may be compiled, has run before.
    @torch._disable_dynamo  # type: ignore[attr-defined] # brings the compiler in when a step runs, not at import
    def _update(self) -> None:
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        if type(self).update_step is not Optimizer8bit.update_step:
            self._step_one_by_one()
            return
        plans = self._plans
        if plans is None or not plans.are_current(self):
            plans = self._plans = Plans(self)
        self._run([(run, self.get_config(gindex, pindex, group)) for run, group, gindex, pindex in plans.runs])

    def _step_one_by_one(self) -> None:
        """Make a step of a subclass that has an update of its own."""
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(group, p, gindex, pindex)
                self.prefetch_state(p)
                self.update_step(group, p, gindex, pindex)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Update one parameter, which has a gradient and states. A subclass may do so in its own way."""
        run = Run(self.optimizer_name, [p], [self.state[p]], self.capturable)
        self._run([(run, self.get_config(gindex, pindex, group))])

    def _run(self, runs: list[tuple[Run, dict[str, Any]]]) -> None:
        for run, _ in runs:
            run.begin()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self.max_grad_norm is not None and runs:
            self.grad_norm = total_norm([run for run, _ in runs], grad_scale)
        for run, config in runs:
            device = plain(run.params[0]).device
            if device.type == "cpu":
                ops._sync_threads()
            lr = config["lr"]
            run.plan.step(
                lr if self.capturable or not isinstance(lr, Tensor) else lr.item(),
                **arguments(self.optimizer_name, config),
                grad_scale=scalar_on(grad_scale, device),
                found_inf=scalar_on(found_inf, device),
                total_norm=scalar_on(self.grad_norm, device) if self.max_grad_norm is not None else None,
                max_norm=self.max_grad_norm,
                stochastic=config["stochastic_rounding"],
                seed=config["seed"],
                grads=run.grads,
            )
        for run, _ in runs:
            run.end()

    # ---- state dicts, copies

    def state_dict(self) -> dict[str, Any]:
        """Return states and groups, in the form of bitsandbytes: tensors of a parameter in a dict of their own.

        Tensors are not copied, except for paged ones, which are on the CPU there. With ``capturable``, step counts are
        waited for.
        """
        state_dict: dict[str, Any] = super().state_dict()
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        state_dict["state"] = {
            key: wrap(state, self.non_castable_tensor_keys, shard_of(params[key])) if isinstance(key, int) else state
            for key, state in state_dict["state"].items()
        }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load what :meth:`state_dict` returned, here or in bitsandbytes, of any version.

        Paged states are paged again. Values are copied and never change: states keep their own element type,
        whatever the parameter's is.

        Parameters
        ----------
        state_dict
            States and groups. Left as it is.
        move_to_device
            Move states to the device of their parameter.

        Raises
        ------
        CheckpointError
            If groups or states do not fit the parameters. Nothing has been loaded then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved_groups: list[dict[str, Any]] = deepcopy(state_dict["param_groups"])
        check_groups(self.param_groups, saved_groups)
        params = dict(
            zip(
                chain.from_iterable(group["params"] for group in saved_groups),
                chain.from_iterable(group["params"] for group in self.param_groups),
                strict=True,
            )
        )
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, entry in state_dict["state"].items():
            if key not in params:
                state[key] = deepcopy(entry)
                continue
            param, where = params[key], f"state[{key!r}]"
            flat = unwrap(entry, shard_of(param), where)
            modernize(flat, plain(param), where)
            state[param] = self._placed(flat, plain(param), move_to_device)
        # A group keeps the options of its own that the file does not know.
        groups = [
            {**group, **saved, "params": group["params"]}
            for group, saved in zip(self.param_groups, saved_groups, strict=True)
        ]
        self.__setstate__({"state": state, "param_groups": groups})
        for gindex, group in enumerate(self.param_groups):
            for pindex, param in enumerate(group["params"]):
                if self.state.get(param):
                    complete(self.state[param], plain(param), self.get_config(gindex, pindex, group))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _placed(self, state: dict[str, Any], param: Tensor, move: bool) -> dict[str, Any]:
        """Return a copy of a parameter's states, where a fresh optimizer would have them."""
        placed: dict[str, Any] = {}
        for name, value in state.items():
            if not isinstance(value, Tensor):
                placed[name] = deepcopy(value)
            elif name in ("qmap1", "qmap2") and move:
                placed[name] = self._qmap("dynamic" if name == "qmap1" else "udynamic", param.device)
            elif name in ("state1", "state2") and move and self._is_paged(param):
                placed[name] = self._pages.zeros(value.shape, value.dtype, param.device).copy_(value)
            else:
                placed[name] = value.detach().to(param.device if move else value.device, copy=True)
        return placed

    def __getstate__(self) -> dict[str, Any]:
        state = defaultdict(dict, self.state)
        for param, entry in self.state.items():
            if any(map(is_paged, entry.values())):
                state[param] = {key: given_out(value) for key, value in entry.items()}
        return {"state": state} | {name: getattr(self, name) for name in ("defaults", "param_groups", *_OWN)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "optimizer_name" not in state:  # groups and states only: a loaded state dict
            self._plans = None
            return
        self._helpers()
        if self.is_paged:  # a copy of managed memory is ordinary memory
            for param, entry in self.state.items():
                self.state[param] = self._placed(entry, plain(param), True)


# Attributes that go with an optimizer when it is copied or pickled.
_OWN = (
    "args",
    "capturable",
    "grad_norm",
    "initialized",
    "is_paged",
    "max_grad_norm",
    "name2qmap",
    "non_castable_tensor_keys",
    "optimizer_name",
    "_step_supports_amp_scaling",
)


class Optimizer2State(Optimizer8bit):
    """Base of optimizers with a first and a second moment: adam, lamb and ademamix.

    Parameters
    ----------
    optimizer_name
        The rule.
    params, lr, betas, eps, weight_decay
        See the optimizers. `betas` may be a string, ``"(0.9, 0.999)"``.
    optim_bits
        8 or 32.
    args
        An object whose attributes ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros`` are used instead
        of the arguments of these names.
    min_8bit_size
        Parameters of fewer elements have 32-bit states.
    max_unorm
        Largest norm of an update, as a multiple of the parameter's norm. 0 for no limit. LAMB only.
    skip_zeros
        Leave elements alone whose gradient is zero.
    is_paged, **options
        See :class:`Optimizer8bit`.
    alpha, t_alpha, t_beta3
        See :class:`~halfbyte.optim.AdEMAMix`.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        betas = check_betas(betas, (3,) if optimizer_name == "ademamix" else (2, 3))
        _check_numbers(lr, eps, weight_decay, max_unorm)
        self.optimizer_name = optimizer_name
        self.args = _arguments(args, optim_bits, min_8bit_size, max_unorm, skip_zeros)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
        }
        super().__init__(params, defaults, optim_bits, is_paged, **options)


class Optimizer1State(Optimizer8bit):
    """Base of optimizers with one state: momentum, lars, lion, rmsprop and adagrad.

    Parameters
    ----------
    optimizer_name
        The rule.
    betas
        Factor of the state, and of lion the second factor, of momentum and lars the dampening.
    params, lr, eps, weight_decay, optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged, **options
        See :class:`Optimizer2State`. `max_unorm` is of LARS only.

    Raises
    ------
    ArgumentError
        If an argument is outside its domain.
    """

    _two_states = False

    def __init__(
        self,
        optimizer_name: str,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        betas = check_betas(betas, (2,))
        _check_numbers(lr, eps, weight_decay, max_unorm)
        self.optimizer_name = optimizer_name
        self.args = _arguments(args, optim_bits, min_8bit_size, max_unorm, skip_zeros)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, optim_bits, is_paged, **options)


def _check_numbers(lr: float | Tensor, eps: float, weight_decay: float, max_unorm: float) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("max_unorm", max_unorm)):
        check_at_least(name, value)


def _arguments(args: Any, optim_bits: int, min_8bit_size: int, max_unorm: float, skip_zeros: bool) -> Any:
    given = {
        "optim_bits": optim_bits,
        "min_8bit_size": min_8bit_size,
        "max_unorm": max_unorm,
        "skip_zeros": skip_zeros,
    }
    if args is None:
        return MockArgs(given)
    missing = [name for name in given if not hasattr(args, name)]
    if missing:
        raise ArgumentError(f"args: expected an object with the attributes {', '.join(given)}; {missing[0]} is missing")
    return args
