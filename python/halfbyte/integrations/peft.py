"""halfbyte in peft: adapters on stacked 4-bit experts, through ``LoraConfig(target_parameters=[...])``.

Everything else that peft does with 4-bit layers goes through its own bitsandbytes classes, which find halfbyte's where
halfbyte answers for bitsandbytes (:mod:`halfbyte._dropin`). For a parameter, peft makes a dense weight of the size of
the whole stack at every call, and needs one to add it to; here the low-rank factors multiply the rows of their experts,
beside the packed product. Names and shapes of what is saved are peft's. Tested with peft 0.21.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import check_adapters_to_merge

from halfbyte.functional import dequantize_4bit
from halfbyte.nn import Experts4bit, Params4bit, StackedLinear4bit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class ParamWrapper(lora.ParamWrapper):  # type: ignore[misc]
    """LoRA on one stack of 4-bit experts. Has peft's name, by which peft knows its own."""

    def get_param(self) -> Tensor:
        """Return what stands for the stack: its logical shape, element type and device, and no memory."""
        weight = self.get_base_layer()._parameters[self.parameter_name]
        state = weight.quant_state
        shape, dtype = (weight.shape, weight.dtype) if state is None else (state.shape, state.dtype)
        return torch.empty((1,) * len(shape), dtype=dtype, device=weight.device).expand(*shape)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = self.get_base_layer().adapters
        before = adapters.get(self.parameter_name, [])
        own = [self.get_delta_factors(name) for name in active_adapters or () if name in self.lora_A]
        adapters[self.parameter_name] = before + own
        try:
            yield
        finally:
            adapters[self.parameter_name] = before

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the stack, which is quantized again."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._add(self.get_delta_weight(name), safe_merge, name)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters off the stack, which is quantized again: not exactly what it was before."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                self._add(-self.get_delta_weight(name), False, name)

    @torch.no_grad()
    def _add(self, delta: Tensor, check: bool, name: str) -> None:
        weight: Params4bit = self.get_base_layer()._parameters[self.parameter_name]
        dense = dequantize_4bit(weight.data, weight.quant_state).add_(delta)
        if check and not torch.isfinite(dense).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        fresh = weight.like(dense, bnb_quantized=False, quant_state=None)
        weight.data = fresh.to(weight.device)


def register() -> None:
    """Have peft wrap stacks of 4-bit experts in :class:`ParamWrapper`. May be called any number of times."""
    create = LoraModel._create_new_module
    if getattr(create, "of_halfbyte", False):
        return

    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        parameter = kwargs.get("parameter_name")
        base = target.get_base_layer() if isinstance(target, lora.LoraLayer) else target
        if isinstance(base, Experts4bit | StackedLinear4bit) and isinstance(
            base._parameters.get(parameter or ""), Params4bit
        ):
            kwargs.pop("parameter_name")
            return ParamWrapper(target, adapter_name, parameter_name=parameter, config=lora_config, **kwargs)
        return create(lora_config, adapter_name, target, **kwargs)

    create_new_module.of_halfbyte = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)
