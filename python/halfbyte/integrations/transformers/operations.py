"""What transformers' loader does to one parameter: quantize it, or put it together from a checkpoint's entries.

Errors raised here end up in the loader's report, with the parameter's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import CheckpointError
from halfbyte.integrations.transformers import experts
from halfbyte.nn import Linear4bit, Params4bit
from halfbyte.nn.params import describe
from halfbyte.quant_state import QuantState

if TYPE_CHECKING:
    from collections.abc import Sequence

STATISTICS: Final = (
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_map",
    ".absmax",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)


class _Operation(ConversionOps):  # type: ignore[misc]
    """An operation that the loader copies for each parameter, with nothing in it that should be copied."""

    def __init__(self, hf_quantizer: Any) -> None:
        # The loader takes this attribute for a sign that entries keep the element type that they have in the file.
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        return self


def _owner(model: Any, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _only(value: Any) -> Tensor:
    only: Tensor = value[0] if isinstance(value, list) else value
    return only


class Quantize(_Operation):
    """Float values of a parameter → the quantized parameter, on the values' device."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002
        """Do it; see the class."""
        return {name: self._quantized(*_owner(model, name), _only(value)) for name, value in input_dict.items()}

    def _quantized(self, module: Any, leaf: str, value: Tensor) -> Tensor:
        template = module._parameters[leaf]
        if hasattr(template, "placements"):  # sliced for tensor parallelism
            template = module.unsharded
        if issubclass(getattr(module, "source_cls", torch.nn.Linear), Conv1D):
            value = value.T.contiguous()
        if getattr(module, "source_is_transposed", False):
            value = value.transpose(1, 2).contiguous()
        options = {k: v for k, v in template.__dict__.items() if k not in ("CB", "SCB")}
        fresh: Tensor = type(template)(value, requires_grad=False, **options).to(value.device)
        module._is_hf_initialized = True
        return fresh


class Deserialize4bit(_Operation):
    """Packed bytes and their state → the parameter. What has no state is passed on as it is."""

    def convert(
        self,
        input_dict: dict[str, Any],
        target_patterns: Sequence[str] = ("weight",),
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Do it; see the class."""
        if len(input_dict) == 1:
            return input_dict
        values = {key: _only(value) for key, value in input_dict.items()}
        packed = values.pop(target_patterns[0], None)
        if packed is None:
            raise CheckpointError(f"checkpoint entry `{full_layer_name}`: missing beside its statistics")
        module, leaf = _owner(model, full_layer_name)
        if hasattr(module._parameters[leaf], "placements"):
            raise CheckpointError(
                f"checkpoint entry `{full_layer_name}`: expected a float weight, as tensor parallelism slices weights "
                "before they are quantized, got a quantized one"
            )
        linear = isinstance(module, Linear4bit)
        wanted = (module.out_features, module.in_features) if linear else tuple(module._parameters[leaf].shape)
        parameter = Params4bit.from_prequantized(packed, values, device=packed.device)
        state = parameter.quant_state
        if state is None or tuple(state.shape or ()) != wanted:
            raise CheckpointError(
                f"checkpoint entry `{full_layer_name}`: expected a quantized weight of {list(wanted)}, "
                f"got one of {list((state and state.shape) or ())}"
            )
        if linear:
            parameter.module = module
            describe(module, state, parameter.quant_storage)
        module._is_hf_initialized = True
        return {target_patterns[0]: parameter}


class Deserialize8bit(_Operation):
    """int8 weight and its row scales → the parameter. What has no scales is passed on as it is."""

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Do it; see the class."""
        if len(input_dict) == 1:
            return input_dict
        values = {key: _only(value) for key, value in input_dict.items()}
        module, leaf = _owner(model, full_layer_name)
        template = module._parameters[leaf]
        options = {**template.__dict__, "SCB": values["SCB"]}
        parameter = type(template)(values["weight"], requires_grad=False, **options).to(values["weight"].device)
        module._is_hf_initialized = True
        return {"weight": parameter}


class MergeExperts(_Operation):
    """Quantized projections of one expert after another → the stack. Float ones take transformers' own way."""

    def __init__(self, hf_quantizer: Any, projections: int, operations: Sequence[Any]) -> None:
        super().__init__(hf_quantizer)
        self.projections = projections
        self.operations = tuple(operations)

    @staticmethod
    def patterns(sources: Sequence[str]) -> list[str]:
        """Return the patterns that a converter with this operation has for projections of the patterns `sources`."""
        # The longer ones first: before transformers 5.23 the first that matches wins.
        return [source + statistic for statistic in STATISTICS for source in sources] + list(sources)

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str] = (),
        target_patterns: Sequence[str] = (),
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Do it; see the class."""
        plain = list(source_patterns)[-self.projections :]
        if not input_dict.keys() - set(plain):
            for operation in self.operations:
                input_dict = operation.convert(
                    input_dict,
                    source_patterns=plain,
                    target_patterns=list(target_patterns),
                    full_layer_name=full_layer_name,
                    model=model,
                    **kwargs,
                )
            return input_dict
        projections = [
            self._projection(input_dict, source_patterns[number :: self.projections], full_layer_name)
            for number in range(self.projections)
        ]
        if len({len(projection) for projection in projections}) != 1:
            raise CheckpointError(f"checkpoint entry `{full_layer_name}`: not as many gates as ups")
        packed, state = experts.merge(list(zip(*projections, strict=True)), full_layer_name)
        module, leaf = _owner(model, full_layer_name)
        wanted = module._parameters[leaf].shape
        if torch.Size(state.shape or ()) != wanted:
            raise CheckpointError(
                f"checkpoint entry `{full_layer_name}`: expected experts of {list(wanted)}, "
                f"got {list(state.shape or ())}"
            )
        parameter = Params4bit(packed)
        parameter.adopt(packed, state)
        module._is_hf_initialized = True
        return {target_patterns[0]: parameter}

    @staticmethod
    def _projection(input_dict: dict[str, Any], patterns: Sequence[str], name: str) -> list[tuple[Tensor, QuantState]]:
        *statistics, weight = (input_dict.pop(pattern, []) for pattern in patterns)
        found = {name: values for name, values in zip(STATISTICS, statistics, strict=True) if values}
        if any(len(values) != len(weight) for values in found.values()):
            raise CheckpointError(f"checkpoint entry `{name}`: statistics for some experts, but not for all")
        return [
            (packed, QuantState.from_dict({key[1:]: values[i] for key, values in found.items()}, packed.device))
            for i, packed in enumerate(weight)
        ]
