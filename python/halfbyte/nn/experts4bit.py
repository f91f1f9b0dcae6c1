"""Stacked experts with 4-bit weights: the 3-D parameters of mixture-of-experts models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import _native, ops
from halfbyte._grouped import matmul_4bit_experts
from halfbyte.errors import ArgumentError
from halfbyte.nn import sharded
from halfbyte.nn.params import Params4bit, check_packed, take_packed
from halfbyte.quant_state import QuantState

if TYPE_CHECKING:
    from collections.abc import Callable

_ROUTED_AT_ONCE = 8192
"""Rows up to which the kernel that counts is faster than torch's sort."""


def route(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort rows by expert, stably.

    Parameters
    ----------
    top_k_index
        Numbers of experts, int64 or int32, of any shape. Those outside 0 … experts − 1 are nobody's and come last.
    experts
        Number of experts E.

    Returns
    -------
    order : Tensor
        ``[S]``: which of the flattened indices is at each place.
    inverse : Tensor
        ``[S]``: the place of each.
    offsets : Tensor
        int32 ``[E + 1]``: places of expert e are ``offsets[e]`` up to ``offsets[e + 1]``. Nothing waits for the device.
    """
    index = top_k_index.reshape(-1)
    if index.is_cuda and ops.is_eager(index) and index.numel() <= _ROUTED_AT_ONCE:
        order = index.new_empty(index.shape, dtype=torch.int32)
        inverse = torch.empty_like(order)
        offsets = order.new_empty(experts + 1)
        _native.route_experts(index, offsets, order, inverse)
        return order, inverse, offsets
    index = torch.where((index >= 0) & (index < experts), index, experts)
    in_order, order = torch.sort(index, stable=True)
    numbers = torch.arange(experts + 1, dtype=index.dtype, device=index.device)
    offsets = torch.searchsorted(in_order, numbers).to(torch.int32)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=index.device))
    return order, inverse, offsets


def low_rank(x: Tensor, offsets: Tensor, lhs: Tensor, rhs: Tensor) -> Tensor:
    """Return ``x[s] @ rhs[e].T @ lhs[e].T`` for rows that are sorted by expert; zeros for rows of nobody.

    Parameters
    ----------
    x, offsets
        As for :func:`~halfbyte.matmul_4bit_experts`.
    lhs, rhs
        Factors ``[E, N, r]`` and ``[E, r, K]``, cast to x's dtype. Gradients go to all three.
    """
    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    owned = ((row >= offsets[0]) & (row < offsets[-1])).unsqueeze(1)
    lhs, rhs = lhs.to(x.dtype), rhs.to(x.dtype)
    # Grouped products on CUDA that wait for nothing are of bf16, with rows of whole 16 bytes, forward and backward.
    aligned = x.shape[1] % 8 == 0 and lhs.shape[1] % 8 == 0
    if x.is_cuda and not (x.dtype == torch.bfloat16 and aligned):
        return torch.where(owned, _low_rank_of_all(x, torch.searchsorted(offsets, row, right=True) - 1, lhs, rhs), 0)
    # They leave what is nobody's as it was in memory: rows, in results and in gradients, and gradients of experts
    # without rows.
    used = (offsets[1:] > offsets[:-1]).view(-1, 1, 1)
    lhs, rhs = torch.where(used, lhs, 0), torch.where(used, rhs, 0)
    spare = -rhs.shape[1] % 8
    lhs, rhs = F.pad(lhs, (0, spare)), F.pad(rhs, (0, 0, 0, spare))
    inner = torch.where(owned, F.grouped_mm(torch.where(owned, x, 0), rhs.transpose(1, 2), offs=offsets[1:]), 0)
    return torch.where(owned, F.grouped_mm(inner, lhs.transpose(1, 2), offs=offsets[1:]), 0)


def _low_rank_of_all(x: Tensor, expert: Tensor, lhs: Tensor, rhs: Tensor) -> Tensor:
    """Multiply rows by the factors of every expert, and keep those of their own: nothing has to know how many rows."""
    experts, rank, _ = rhs.shape
    place = expert.clamp(0, experts - 1).view(-1, 1, 1).expand(-1, 1, rank)
    inner = F.linear(x, rhs.flatten(0, 1)).view(-1, experts, rank).gather(1, place)
    spread = torch.zeros(x.shape[0], experts, rank, dtype=x.dtype, device=x.device).scatter(1, place, inner)
    return F.linear(spread.flatten(1), lhs.permute(1, 0, 2).flatten(1))


class _Stacks(nn.Module):
    """A module with stacks ``[E, N, K]`` as parameters, quantized when they first move to a device."""

    _adapters: dict[str, list[tuple[Tensor, Tensor, float]]] | None = None

    def _pack(
        self,
        name: str,
        stack: Tensor,
        blocksize: int,
        compress_statistics: bool,
        quant_type: str,
        quant_storage: torch.dtype,
        scale_search: bool,
    ) -> None:
        self.register_parameter(
            name,
            Params4bit(
                stack,
                requires_grad=False,
                blocksize=blocksize,
                compress_statistics=compress_statistics,
                quant_type=quant_type,
                quant_storage=quant_storage,
                scale_search=scale_search,
            ),
        )

    @property
    def adapters(self) -> dict[str, list[tuple[Tensor, Tensor, float]]]:
        """Low-rank terms of stacks by name: ``scale · lhs[e] @ rhs[e]``, with factors ``[E, N, r]`` and ``[E, r, K]``.

        Adapters of libraries put theirs here for the time of a call. They are no part of the state dict.
        """
        if self._adapters is None:
            self._adapters = {}
        return self._adapters

    def _packed(self) -> dict[str, Params4bit]:
        return {name: p for name, p in self._parameters.items() if isinstance(p, Params4bit)}

    def _split(self) -> dict[str, Any]:
        """Return the stacks that FSDP has split."""
        return {name: p for name, p in self._parameters.items() if sharded.shard_of(p) is not None}

    def _multiply(self, name: str, x: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
        weight: Any = self._parameters[name]
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ArgumentError(
                f"{type(self).__name__}.{name}: not quantized yet; move the module to a device first, "
                f'module.to("{"cpu" if weight.is_meta else weight.device}"), or load a quantized checkpoint'
            )
        product = cast("Tensor", matmul_4bit_experts(x, offsets, weight, state, bias))
        # Not the property, which may set an attribute: a traced forward changes none.
        for lhs, rhs, scale in (self._adapters or {}).get(name, ()):
            product = product + low_rank(x, offsets, lhs, rhs).to(product.dtype) * scale
        return product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Stacks:
        packed = self._packed()
        # nn.Module would wrap what comes back in a plain Parameter where it cannot put it into the old one (meta).
        for name in packed:
            self._parameters[name] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for name, weight in packed.items():
                    applied = fn(weight)
                    if applied is weight:
                        continue
                    if not isinstance(applied, Params4bit):
                        applied = weight.around(applied)
                    if torch._has_compatible_shallow_copy_type(weight, applied):
                        weight.data = applied
                    else:
                        packed[name] = applied
        finally:
            self._parameters.update(packed)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self._packed().items():
            if weight.quant_state is not None:
                for key, value in weight.quant_state.as_dict(packed=True).items():
                    destination[f"{prefix}{name}.{key}"] = value if keep_vars else value.detach()
        for name, split in self._split().items():
            destination.update({f"{prefix}{name}{key}": value for key, value in sharded.entries(split).items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        rest, done = dict(state_dict), set()
        for name, split in self._split().items():
            key = prefix + name
            entries = {k: v for k, v in state_dict.items() if k.startswith(key + ".")}
            if isinstance(state_dict.get(key), Tensor) and entries:
                sharded.load(split, state_dict[key], entries, key)
                done.add(key)
                for entry in (key, *entries):
                    rest.pop(entry)
        templates = self._packed()
        for name, weight in templates.items():
            key = prefix + name
            entries = {k: v for k, v in state_dict.items() if k.startswith(key + ".")}
            data = state_dict.get(key)
            if not isinstance(data, Tensor):
                continue
            if entries:
                self._load_packed(name, data, entries, key, assign, error_msgs)
            elif weight.bnb_quantized and data.is_floating_point() and data.shape == self._shape(weight):
                fresh = weight.like(data.detach(), bnb_quantized=False, quant_state=None)
                weight.data = fresh.to(weight.device)
            else:
                if weight.bnb_quantized and strict:
                    missing_keys.append(f"{key}.quant_state.bitsandbytes__{weight.quant_type}")
                continue
            done.add(key)
            for entry in (key, *entries):
                rest.pop(entry)
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key not in done]
        for name, template in templates.items():
            loaded = self._parameters[name]
            if loaded is not None and not isinstance(loaded, Params4bit):  # assigned
                self._parameters[name] = template.like(loaded.data)

    @staticmethod
    def _shape(weight: Params4bit) -> torch.Size:
        state = weight.quant_state
        return weight.shape if state is None else torch.Size(state.shape or ())

    def _load_packed(
        self, name: str, data: Tensor, entries: dict[str, Any], key: str, assign: bool, error_msgs: list[str]
    ) -> None:
        old = self._packed()[name]
        device = data.device if assign or old.is_meta else old.device
        state = QuantState.from_dict(entries, device)
        check_packed(data, state, key)
        if torch.Size(state.shape or ()) != self._shape(old):
            error_msgs.append(
                f"size mismatch for {key}: copying quantized weights of {list(state.shape or ())} from checkpoint, "
                f"the shape in current model is {list(self._shape(old))}."
            )
            return
        packed = take_packed(data, state, device, assign)
        if old.is_meta or assign:
            old = self._parameters[name] = Params4bit(packed)
        old.adopt(packed, state)


class StackedLinear4bit(_Stacks):
    """E linear layers of one shape, for rows that are sorted by layer.

    Parameters
    ----------
    num_experts, input_features, output_features
        Sizes E, K and N; the weight is ``[E, N, K]``, quantized as one tensor when it first moves to a device.
    bias
        Whether to add a bias ``[E, N]``, which stays in floating point.
    compress_statistics, quant_type, quant_storage, device, blocksize, scale_search
        See :class:`~halfbyte.nn.Linear4bit`.

    Notes
    -----
    The state dict has bitsandbytes' keys (:mod:`halfbyte.quant_state`), with the three sizes in the state's shape.

    Examples
    --------
    >>> experts = StackedLinear4bit(4, 64, 32).to("cpu")
    >>> offsets = torch.tensor([0, 1, 1, 3, 3], dtype=torch.int32)  # a row for the first, two for the third
    >>> experts(torch.randn(3, 64), offsets).shape
    torch.Size([3, 32])
    """

    def __init__(
        self,
        num_experts: int,
        input_features: int,
        output_features: int,
        bias: bool = False,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        blocksize: int = 64,
        *,
        scale_search: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, input_features, output_features
        stack = torch.empty(num_experts, output_features, input_features, device=device)
        reach = input_features**-0.5 if input_features else 0.0
        options = (blocksize, compress_statistics, quant_type, quant_storage, scale_search)
        self._pack("weight", stack.uniform_(-reach, reach), *options)
        added = torch.empty(num_experts, output_features, device=device).uniform_(-reach, reach) if bias else None
        self.register_parameter("bias", None if added is None else nn.Parameter(added))

    def extra_repr(self) -> str:
        """Describe sizes and format."""
        weight = cast("Params4bit", self.weight)
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {weight.quant_type}, blocksize={weight.blocksize}"
        )

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return ``x[s] @ weight[e].T + bias[e]`` for each row.

        Parameters
        ----------
        x
            ``[S, K]``, sorted by expert.
        offsets
            int32 ``[E + 1]``: rows of expert e are ``offsets[e]`` up to ``offsets[e + 1]``.

        Returns
        -------
        Tensor
            ``[S, N]``; see :func:`~halfbyte.matmul_4bit_experts`.
        """
        return self._multiply("weight", x, offsets, cast("Tensor | None", self.bias))


class Experts4bit(_Stacks):
    """The experts of a mixture: up (and gate), activation, down, with 4-bit stacks.

    Takes the place of transformers' modules with 3-D parameters (``MixtralExperts``, ``Qwen3MoeExperts``, …), whose
    call and parameter names it has.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size
        Sizes E, H and I: ``gate_up_proj`` is ``[E, 2·I, H]`` (``up_proj`` ``[E, I, H]`` without a gate), ``down_proj``
        ``[E, H, I]``.
    act_fn
        Activation of the gate's half, or of all without a gate; default SiLU.
    has_gate
        Whether the first product is of two halves, and the activated first one multiplies the second.
    bias
        Whether to have ``gate_up_proj_bias`` (or ``up_proj_bias``) and ``down_proj_bias``, floats ``[E, N]``.
    compress_statistics, quant_type, quant_storage, device, blocksize, scale_search
        See :class:`~halfbyte.nn.Linear4bit`.

    Notes
    -----
    Rows are sorted by expert on the device, and each product is one launch that reads only the experts in use; nothing
    waits for the device, so that a graph can capture it. Gradients go to the hidden states and the routing weights.
    The state dict has bitsandbytes' keys for each stack (``gate_up_proj``, ``gate_up_proj.absmax``,
    ``gate_up_proj.quant_state.bitsandbytes__nf4``, …), with the three sizes in the state's shape.

    Examples
    --------
    >>> experts = Experts4bit(4, 64, 32).to("cpu")
    >>> index, weights = torch.tensor([[0, 2], [2, 3]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    >>> experts(torch.randn(2, 64), index, weights).shape
    torch.Size([2, 64])
    """

    num_experts: int
    has_gate: bool

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act_fn: Callable[[Tensor], Tensor] | None = None,
        has_gate: bool = True,
        bias: bool = False,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        blocksize: int = 64,
        *,
        scale_search: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.has_gate = num_experts, has_gate
        self.act_fn = nn.SiLU() if act_fn is None else act_fn
        self._gate: Any = None
        up = intermediate_size * (2 if has_gate else 1)
        for name, rows, columns in (
            (self._up_name, up, hidden_size),
            ("down_proj", hidden_size, intermediate_size),
        ):
            reach = columns**-0.5 if columns else 0.0
            stack = torch.empty(num_experts, rows, columns, device=device).uniform_(-reach, reach)
            self._pack(name, stack, blocksize, compress_statistics, quant_type, quant_storage, scale_search)
            if bias:
                self.register_parameter(
                    f"{name}_bias", nn.Parameter(torch.zeros(num_experts, rows, device=device), requires_grad=False)
                )

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """Whether `module` is of transformers' kind with stacked float experts, which :meth:`from_module` takes."""
        if not all(
            isinstance(getattr(module, name, None), bool)
            for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")
        ):
            return False
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        stacks = [module._parameters.get(name) for name in names]
        return (
            all(stack is not None and stack.dim() == 3 and type(stack) is nn.Parameter for stack in stacks)
            and not getattr(module, "_is_expert_parallel", False)
            and callable(getattr(type(module), "_apply_gate", None))
        )

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        blocksize: int = 64,
        *,
        scale_search: bool = False,
    ) -> Experts4bit:
        """Return experts with the weights of `module`, not quantized yet.

        Parameters
        ----------
        module
            One that :meth:`recognizes`. Stacks that it has transposed, ``[E, K, N]``, are turned round; its gate, its
            activation and its norm are taken over.
        compress_statistics, quant_type, quant_storage, blocksize, scale_search
            See :class:`~halfbyte.nn.Linear4bit`.

        Raises
        ------
        ArgumentError
            If it is not such a module.
        """
        if not cls.recognizes(module):
            raise ArgumentError(f"module: expected experts with stacked parameters, got {type(module).__name__}")
        old: Any = module
        self = cls.__new__(cls)
        super(Experts4bit, self).__init__()
        # What the module's own gate may look at: limits, slopes, the config.
        kept = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        self.__dict__.update(kept)
        self._modules.update(module._modules)
        self._gate = type(old)._apply_gate if old.has_gate else None
        self.has_gate = old.has_gate
        stacks = (self._up_name, "down_proj")
        self.num_experts = old._parameters["down_proj"].shape[0]
        for name, parameter in module._parameters.items():
            if name in stacks and parameter is not None:
                stack = parameter.detach()
                stack = stack.transpose(1, 2).contiguous() if old.is_transposed else stack
                self._pack(name, stack, blocksize, compress_statistics, quant_type, quant_storage, scale_search)
            else:
                self.register_parameter(name, parameter)
        self.__dict__["is_transposed"] = False
        self.train(module.training)
        return self

    @property
    def _up_name(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def extra_repr(self) -> str:
        """Describe sizes and format."""
        down = self._packed()["down_proj"]
        _, hidden, intermediate = self._shape(down)
        return (
            f"num_experts={self.num_experts}, hidden_size={hidden}, intermediate_size={intermediate}, "
            f"{down.quant_type}, blocksize={down.blocksize}"
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

        Parameters
        ----------
        hidden_states
            ``[T, H]``, fp32, fp16 or bf16.
        top_k_index
            Experts of each token, int64 or int32 ``[T, k]``. Numbers outside 0 … E − 1 count as no expert.
        top_k_weights
            What they are weighted with, ``[T, k]``.

        Returns
        -------
        Tensor
            ``[T, H]`` of the hidden states' dtype.

        Raises
        ------
        ArgumentError
            If the weights are not quantized yet.
        """
        tokens, k = top_k_index.shape
        order, inverse, offsets = route(top_k_index, self.num_experts)
        rows = hidden_states.index_select(0, order // k if k > 1 else order)
        inner = self._multiply(self._up_name, rows, offsets, self._bias_of(self._up_name))
        inner = self._activated(inner)
        outer = self._multiply("down_proj", inner, offsets, self._bias_of("down_proj"))
        norm = self._modules.get("post_expert_norm")
        if norm is not None:
            outer = norm(outer)
        outer = outer.index_select(0, inverse).view(tokens, k, -1) * top_k_weights.unsqueeze(-1)
        return outer.sum(1).to(hidden_states.dtype)

    def _bias_of(self, name: str) -> Tensor | None:
        return self._parameters.get(f"{name}_bias")

    def _activated(self, x: Tensor) -> Tensor:
        act: Any = self.act_fn if self._gate is None else None
        if self._gate is not None:
            return cast("Tensor", self._gate(self, x))
        if not self.has_gate:
            return cast("Tensor", act(x))
        gate, up = x.chunk(2, dim=-1)
        return cast("Tensor", act(gate)) * up
