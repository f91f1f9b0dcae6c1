"""halfbyte in accelerate: its own loader of quantized models, ``load_and_quantize_model``, on a machine without a GPU.

accelerate swaps layers, loads and dispatches with bitsandbytes' classes, which are halfbyte's where halfbyte answers
for bitsandbytes (:mod:`halfbyte._dropin`). But it refuses to quantize to 4 bits on the CPU, and sends 8-bit weights
through GPU 0 on their way to the CPU or the disk, as if nothing could quantize elsewhere. Where torch has no
accelerator, both are done on the CPU; where it has one, everything is accelerate's. Tested with accelerate 1.15.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import bnb, modeling

from halfbyte.nn import Int8Params, Params4bit

if TYPE_CHECKING:
    from collections.abc import Callable

# Modules that bind the function at their import, some of them before this is.
_WITH_SETTER = ("accelerate.utils", "accelerate.utils.bnb", "accelerate.utils.modeling", "accelerate.hooks")

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def register() -> None:
    """Have accelerate quantize on the CPU where there is nothing else. May be called any number of times."""
    choose, put = bnb.get_quantized_model_device_map, modeling.set_module_tensor_to_device
    if getattr(choose, "of_halfbyte", False):
        return
    choose, setter = _choose_device_map(choose), _set_module_tensor(put)
    choose.of_halfbyte = True  # type: ignore[attr-defined]
    bnb.get_quantized_model_device_map = choose
    for name in _WITH_SETTER:
        module = sys.modules.get(name)
        if getattr(module, "set_module_tensor_to_device", None) is put:
            module.__dict__["set_module_tensor_to_device"] = setter


def _choose_device_map(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def choose(model: Any, config: Any, device_map: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not torch.accelerator.is_available():
            if device_map is None or (device_map in _AUTOMATIC and kwargs.get("max_memory") is None):
                return {"": "cpu"}
            if isinstance(device_map, dict) and {str(device) for device in device_map.values()} == {"cpu"}:
                return dict.fromkeys(device_map, "cpu")
        return original(model, config, device_map, *args, **kwargs)

    return choose


def _set_module_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def put(module: torch.nn.Module, tensor_name: str, device: Any, *args: Any, **kwargs: Any) -> Any:
        parameters, name = _place(module, tensor_name)
        old = parameters.get(name)
        if not torch.accelerator.is_available() and (device == 0 or (device == "cpu" and isinstance(old, Int8Params))):
            # For anything but the text "cpu", an 8-bit weight is quantized on the device that it is for.
            device = torch.device("cpu")
        result = original(module, tensor_name, device, *args, **kwargs)
        new = parameters.get(name)
        if isinstance(old, Params4bit) and isinstance(new, Params4bit) and new.is_meta and not new.bnb_quantized:
            # On its way to the disk accelerate makes a new one of the class alone, which would be FP4.
            new.__dict__.update(old.__dict__)
        return result

    return put


def _place(module: torch.nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the parameters of the module that has the tensor `name`, and what it is called there."""
    owner, _, last = name.rpartition(".")
    return module.get_submodule(owner)._parameters, last
