"""What layers with one packed ``weight`` share: moving it, saving it, loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from halfbyte.errors import ArgumentError, CheckpointError
from halfbyte.nn import sharded
from halfbyte.nn.params import Params4bit, check_packed, take_packed
from halfbyte.quant_state import QuantState

if TYPE_CHECKING:
    from collections.abc import Callable


class PackedWeight(nn.Module):
    """A module with a :class:`~halfbyte.nn.Params4bit` named ``weight``; stands before the class that makes it.

    A state dict has bitsandbytes' keys and loads into quantized, unquantized and meta layers alike; a float weight of
    the right shape loads as well, and is quantized if the layer was.
    """

    weight: Any
    quant_state: QuantState | None
    quant_storage: torch.dtype

    def _dense_shape(self) -> tuple[int, int]:
        """Return the shape of the weight before it was packed."""
        raise NotImplementedError

    def _state_of_module(self) -> QuantState:
        """Return the module's own state, for a weight that lost its one: FSDP puts plain tensors in its place."""
        state = self.quant_state
        weight = self.weight
        if state is None or weight.dim() != 2 or weight.shape[1] != 1:
            raise ArgumentError(
                f"{type(self).__name__}.weight: not quantized yet; move the layer to a device first, "
                f'layer.to("{"cpu" if weight.is_meta else weight.device}"), or load a quantized checkpoint'
            )
        if weight.dtype != self.quant_storage:
            raise ArgumentError(
                f"{type(self).__name__}.weight: expected packed bytes as {self.quant_storage}, got {weight.dtype}: "
                "a cast destroys them. Let the param_dtype of FSDP's MixedPrecision be quant_storage"
            )
        if not torch.compiler.is_dynamo_compiling() and torch._C._functorch.is_batchedtensor(weight):
            raise ArgumentError(
                f"{type(self).__name__}.weight: expected one packed weight, got a batch of them by vmap, and scales of "
                "one. Map over activations, or call each model"
            )
        if isinstance(weight, Params4bit) and not torch.compiler.is_dynamo_compiling():
            weight.quant_state = state
        return state

    # ---- moving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        weight = self._parameters.get("weight")
        if not isinstance(weight, Params4bit):
            return cast("PackedWeight", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]
        # nn.Module would wrap what comes back in a plain Parameter where it cannot put it into the old one (meta).
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            with torch.no_grad():
                applied = fn(weight)
        finally:
            self._parameters["weight"] = weight
        if applied is weight:
            return self
        if not isinstance(applied, Params4bit):
            applied = weight.around(applied)
        if torch.__future__.get_swap_module_params_on_conversion():
            torch.utils.swap_tensors(weight, applied)  # type: ignore[no-untyped-call]
        elif torch._has_compatible_shallow_copy_type(weight, applied):
            weight.data = applied
        else:
            self._parameters["weight"] = applied
        self.quant_state = self.weight.quant_state
        return self

    # ---- state dicts

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if sharded.shard_of(self.weight) is not None:
            destination.update({f"{prefix}weight{key}": value for key, value in sharded.entries(self.weight).items()})
            return
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

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
        key = prefix + "weight"
        entries = {k: v for k, v in state_dict.items() if k.startswith(key + ".")}
        data = state_dict.get(key)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        quantized = isinstance(self.weight, Params4bit) and self.weight.bnb_quantized
        dense = isinstance(data, Tensor) and data.is_floating_point() and data.shape == self._dense_shape()
        if isinstance(data, Tensor) and entries and sharded.shard_of(self.weight) is not None:
            sharded.load(self.weight, data, entries, key)
        elif isinstance(data, Tensor) and entries:
            self._load_packed(data, entries, key, assign, error_msgs)
        elif isinstance(data, Tensor) and dense and quantized:
            self._load_dense(data)
        else:
            if quantized and data is not None and strict:
                missing_keys.append(f"{key}.quant_state.bitsandbytes__{self.weight.quant_type}")
            template = self.weight
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if isinstance(template, Params4bit) and not isinstance(self.weight, Params4bit):  # assigned
                self.weight = template.like(self.weight.data)
            return
        rest = {k: v for k, v in state_dict.items() if k != key and k not in entries}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [k for k in missing if k != key]

    def _load_packed(
        self, data: Tensor, entries: dict[str, Any], key: str, assign: bool, error_msgs: list[str]
    ) -> None:
        old = self.weight
        device = data.device if assign or old.is_meta else old.device
        state = QuantState.from_dict(entries, device)
        check_packed(data, state, key)
        if tuple(state.shape or ()) != self._dense_shape():
            error_msgs.append(
                f"size mismatch for {key}: copying a quantized weight of {list(state.shape or ())} from checkpoint, "
                f"the shape in current model is {list(self._dense_shape())}."
            )
            return
        packed = take_packed(data, state, device, assign)
        if self._is_view_of_fsdp(old):
            packed = self._write_through(packed, key)
            if isinstance(old, Params4bit):
                old.adopt(packed, state)
        elif isinstance(old, Params4bit) and not old.is_meta and not assign:
            old.adopt(packed, state)
        else:
            self.weight = Params4bit(packed, module=self)
            self.weight.adopt(packed, state)
        self.quant_state = state
        self.quant_storage = packed.dtype

    def _is_view_of_fsdp(self, weight: Any) -> bool:
        """Whether `weight` is a view of the flat parameter of FullyShardedDataParallel, of the two kinds it makes."""
        if isinstance(weight, Params4bit):
            return getattr(weight, "_fsdp_flattened", False)
        return self.quant_state is not None and weight.dim() == 2 and weight.shape[1] == 1 and not weight.is_meta

    def _write_through(self, packed: Tensor, key: str) -> Tensor:
        """Copy packed bytes to where FullyShardedDataParallel takes them from."""
        held: Tensor = self.weight.data
        if (held.shape, held.dtype) != (packed.shape, packed.dtype):
            raise CheckpointError(
                f"checkpoint entry `{key}`: expected packed bytes {list(held.shape)} of {held.dtype}, as FSDP holds "
                f"them, got {list(packed.shape)} of {packed.dtype}"
            )
        return held.copy_(packed)

    def _load_dense(self, data: Tensor) -> None:
        template = self.weight
        fresh = template.like(data.detach(), bnb_quantized=False, quant_state=None)
        template.data = fresh.to(template.device)
