"""Parameters of any module in 4 bits: dequantized when somebody reads them.

For weights that no layer of ours multiplies by, the 3-D experts of other people's modules among them:
``module.weight`` becomes a property that decodes packed bytes. During the module's own forward the decoded tensor is
kept, so that several reads decode once. State dicts have the keys of :class:`~halfbyte.nn.Linear4bit`, and load.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from halfbyte.errors import CheckpointError
from halfbyte.functional import dequantize_4bit, quantize_4bit
from halfbyte.nn.params import check_packed
from halfbyte.quant_state import QuantState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Bnb4bitParametrization(nn.Module):
    """Decodes packed bytes: what ``torch.nn.utils.parametrize`` puts before a parameter.

    Parameters
    ----------
    quant_state
        State of the packed bytes. Moves with the module.
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    def forward(self, quantized_param: Tensor) -> Tensor:
        """Return the weight that `quantized_param` packs, of ``quant_state.shape`` and ``dtype``, with no gradient."""
        return cast("Tensor", dequantize_4bit(quantized_param, self.quant_state))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bnb4bitParametrization:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Bytes say where to go, and no change of dtype does anything to them.
        with torch.no_grad():
            device = fn(torch.empty(0, dtype=torch.uint8, device=self.quant_state.absmax.device)).device
        if device != self.quant_state.absmax.device:
            self.quant_state = self.quant_state.copy_to(device)
        return self


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter where it is, and have it decoded when it is read.

    Parameters
    ----------
    module, param_name
        ``getattr(module, param_name)`` is the parameter; any shape, fp32, fp16 or bf16.
    compress_statistics, quant_type, blocksize
        See :func:`~halfbyte.functional.quantize_4bit`.

    Raises
    ------
    AttributeError
        If the module has no such attribute.
    TypeError
        If it is no parameter.
    ArgumentError, DtypeError, DeviceError
        What :func:`~halfbyte.functional.quantize_4bit` raises.
    """
    parameter = _parameter(module, param_name)
    packed, state = quantize_4bit(
        parameter.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    _replace(module, param_name, packed, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device
) -> None:
    """Have a parameter decoded when it is read, which holds packed bytes already.

    Parameters
    ----------
    module, param_name
        ``getattr(module, param_name)`` is the parameter, packed.
    qs_dict
        The other entries of the weight, for :meth:`QuantState.from_dict`; left as they are.
    device
        Where the state shall be.

    Raises
    ------
    AttributeError, TypeError
        As :func:`replace_parameter_4bit`.
    CheckpointError
        If the entries are not a 4-bit state, or the parameter does not have the bytes that it describes.
    """
    parameter = _parameter(module, param_name)
    state = QuantState.from_dict(qs_dict, device)
    check_packed(parameter.data, state, param_name)
    _replace(module, param_name, parameter.data, state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return parameter


def _replace(module: nn.Module, name: str, packed: Tensor, state: QuantState) -> None:
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    # Unsafe means that shape and dtype of what is read are not those of what is stored.
    P.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """Keep the decoded tensor during the module's forward, and the parametrization out of state dicts."""
    hooked: Any = module
    hooked.register_state_dict_post_hook(partial(_parametrized_state_dict_post_hook, param_name=param_name))
    hooked.register_load_state_dict_pre_hook(partial(_load_packed, param_name=param_name))
    module.register_forward_pre_hook(_enable_parametrization_cache)
    # Also where forward raises: activation checkpointing stops its second run of a forward that way.
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:  # noqa: ARG001
    if not torch.compiler.is_compiling():  # a compiler sees for itself what is decoded twice
        P._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    if torch.compiler.is_compiling():
        return
    P._cache_enabled = max(P._cache_enabled - 1, 0)
    if not P._cache_enabled:
        P._cache = {}


def _parametrized_state_dict_post_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,  # noqa: ARG001
    *,
    param_name: str = "weight",
    **kwargs: Any,  # noqa: ARG001
) -> None:
    """Write the packed bytes under the parameter's own name, with the entries of their state beside them."""
    stored = f"{prefix}parametrizations.{param_name}.original"
    if stored not in state_dict:
        return
    state_dict[prefix + param_name] = state_dict.pop(stored)
    parametrizations: Any = module.parametrizations
    for parametrization in parametrizations[param_name]:
        if isinstance(parametrization, Bnb4bitParametrization):
            for key, value in parametrization.quant_state.as_dict(packed=True).items():
                state_dict[f"{prefix}{param_name}.{key}"] = value


def _load_packed(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *args: Any,  # noqa: ARG001
    param_name: str = "weight",
) -> None:
    """Undo :func:`_parametrized_state_dict_post_hook` in a state dict that is being loaded."""
    key = prefix + param_name
    entries = {k: v for k, v in state_dict.items() if k.startswith(key + ".")}
    if key not in state_dict or not entries:
        return
    parametrizations: Any = module.parametrizations
    for parametrization in parametrizations[param_name]:
        if isinstance(parametrization, Bnb4bitParametrization):
            old = parametrization.quant_state
            state = QuantState.from_dict(entries, old.absmax.device)
            check_packed(state_dict[key], state, key)
            if tuple(state.shape or ()) != tuple(old.shape or ()):
                raise CheckpointError(
                    f"checkpoint entry `{key}`: expected a weight of {list(old.shape or ())}, "
                    f"got one of {list(state.shape or ())}"
                )
            parametrization.quant_state = state
    for name in entries:
        del state_dict[name]
    state_dict[f"{prefix}parametrizations.{param_name}.original"] = state_dict.pop(key)
