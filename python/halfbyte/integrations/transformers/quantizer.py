"""The quantizers that transformers asks for: one implementation, for either configuration."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from halfbyte import _dropin, ops
from halfbyte import nn as layers
from halfbyte.errors import HalfbyteError
from halfbyte.functional import dequantize_4bit
from halfbyte.integrations.transformers import experts
from halfbyte.integrations.transformers.checkpoint import quantized_parameters
from halfbyte.integrations.transformers.config import METHOD, HalfbyteConfig, as_dtype, recipe
from halfbyte.integrations.transformers.operations import (
    STATISTICS,
    Deserialize4bit,
    Deserialize8bit,
    MergeExperts,
    Quantize,
)
from halfbyte.nn import Experts4bit, Linear4bit
from halfbyte.nn.sharded import shard_of

if TYPE_CHECKING:
    from collections.abc import Sequence

# LLM.int8() layers, where this halfbyte has them.
Linear8bitLt: Any = getattr(layers, "Linear8bitLt", None)

METHOD_4BIT: Final = "bitsandbytes_4bit"
METHOD_8BIT: Final = "bitsandbytes_8bit"
_MERGES: Final = ("MergeModulelist", "Concatenate")


class HalfbyteHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts halfbyte's layers into a transformers model, fills them, and writes them; for ``HalfbyteConfig``."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._routes: list[experts.Route] = []
        # Float modules, on meta, that stacked experts took the place of.
        self._originals: dict[str, nn.Module] = {}

    @property
    def _recipe(self) -> Any:
        return recipe(self.quantization_config)

    # ---- before anything is loaded

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Raise where the model cannot be loaded: no int8 layers here, or a device map with a disk in it."""
        if self._recipe.is_int8 and Linear8bitLt is None:
            raise HalfbyteError("scheme: this halfbyte has no LLM.int8() layers")
        device_map = kwargs.get("device_map")
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if not self._recipe.offload and places != {"cpu"} and places & {"cpu", "disk"}:
            raise ValueError(
                "device_map: some modules are on the CPU or the disk, others on a GPU. Quantized weights that are "
                "offloaded are not kept in 4 or 8 bits; give the model more GPUs, or put all of it on the CPU"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Put the model on the current GPU, or the CPU where there is none, unless told otherwise."""
        if device_map is None:
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Leave room for what quantizing takes."""
        return {key: value * 0.90 for key, value in max_memory.items()}

    def _process_model_before_weight_loading(
        self,
        model: Any,
        device_map: Any = None,
        checkpoint_files: Any = None,
        dtype: Any = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        config, chosen = self.quantization_config, self._recipe
        if not chosen.is_int8:
            ops.check_blocksize(chosen.blocksize)
            ops.check_quant_type(chosen.scheme)
        if isinstance(config, HalfbyteConfig) and config.compute_dtype is None and not self.pre_quantized:
            config.compute_dtype = dtype or model.dtype
            chosen = self._recipe
        stored = quantized_parameters(model, checkpoint_files) if self.pre_quantized else None
        left = self.get_modules_to_not_convert(
            model, chosen.skip, model._keep_in_fp32_modules, add_default_skips=chosen.add_default_skips
        )
        if chosen.offload and isinstance(device_map, dict):
            left += [name for name, place in device_map.items() if place in ("cpu", "disk")]
        self.modules_to_not_convert = left
        if isinstance(config, HalfbyteConfig):
            config._skipped = sorted(left)
        for name, module in list(model.named_modules()):
            linear = type(module) is nn.Linear or isinstance(module, Conv1D)
            if not linear and not (chosen.experts and Experts4bit.recognizes(module)):
                continue
            names = [f"{name}.{leaf}" for leaf in (("weight",) if linear else _stacks(module))]
            if stored is None:
                if not _skipped(name, left):
                    self._replace(model, name, module, chosen, {})
            elif any(parameter in stored for parameter in names):
                self._replace(model, name, module, chosen, {p.rpartition(".")[2]: stored.get(p) for p in names})

    def _replace(self, model: Any, name: str, old: Any, chosen: Any, stored: dict[str, torch.dtype | None]) -> None:
        new: Any
        with torch.device("meta"):
            if isinstance(old, nn.Linear | Conv1D):
                new = _linear(old, chosen)
                new.source_cls = type(old)
                # Tensor parallelism: transformers slices what it reads, and runs the layer on this process's slice. It
                # puts a DTensor in the parameter's place, which does not say how to quantize.
                new._hf_quantized_needs_local_tp = True
                new.__dict__["unsharded"] = new._parameters["weight"]
            else:
                new = Experts4bit.from_module(
                    old,
                    chosen.double_quant,
                    chosen.scheme,
                    chosen.quant_storage,
                    chosen.blocksize,
                    scale_search=chosen.scale_search,
                )
                new.source_is_transposed = old.is_transposed
                self._originals[name] = old
            new.requires_grad_(False)
            for leaf, dtype in stored.items():
                # Before transformers 5.23, entries are cast to the element type that is found here.
                if dtype is not None:
                    new._parameters[leaf].data = new._parameters[leaf].data.to(dtype)
        new.train(old.training)
        model.set_submodule(name, new)

    # ---- loading

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:  # noqa: ARG002
        """Whether the parameter is one that is quantized, or will be."""
        path, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Experts4bit):
            return leaf in _stacks(module)
        return leaf == "weight" and (
            isinstance(module, Linear4bit) or (Linear8bitLt is not None and isinstance(module, Linear8bitLt))
        )

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Return the bytes that an element of the parameter will take, its share of the scales included."""
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        chosen = self._recipe
        return 1.0 if chosen.is_int8 else 0.5 + (1.016 if chosen.double_quant else 4) / chosen.blocksize

    def get_quantize_ops(self) -> Quantize:
        """Return what quantizes one parameter."""
        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """Return what reads a quantized linear layer's entries."""
        if not self.pre_quantized:
            return []
        if self._recipe.is_int8:
            return [WeightConverter(["SCB", "weight_format", "weight"], "weight", [Deserialize8bit(self)])]
        sources = [*(f"weight{statistic}" for statistic in STATISTICS), "weight"]
        return [WeightConverter(sources, "weight", [Deserialize4bit(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:  # noqa: ARG002
        """Have the model's converters of experts take quantized ones, and learn from them how files name experts."""
        updated = []
        for converter in weight_conversions:
            route = _route(converter)
            if route is None or not self._originals:
                updated.append(converter)
                continue
            self._routes.append(route)
            if not self.pre_quantized:
                updated.append(converter)
                continue
            merge = MergeExperts(self, len(route.sources), converter.operations)
            taken = WeightConverter(MergeExperts.patterns(route.sources), route.target, [merge])
            taken.scope_prefix, taken.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
            updated.append(taken)
        if self.pre_quantized:
            updated += [self._stacked(ending) for ending in self._endings()]
        return updated + self.get_weight_conversions()

    def _endings(self) -> list[str]:
        """Return the ends of stacks' names, ``experts.gate_up_proj``, each once."""
        return sorted(
            {
                f"{name.rpartition('.')[2]}.{leaf}"
                for name, module in self._originals.items()
                for leaf in _stacks(module)
            }
        )

    def _stacked(self, ending: str) -> WeightConverter:
        sources = [*(f"{ending}{statistic}" for statistic in STATISTICS), ending]
        return WeightConverter(sources, ending, [Deserialize4bit(self)])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        # On saving, transformers runs every conversion of the load backwards. Ours have no way back and need none:
        # the layers' state dict is the checkpoint format.
        # Where experts are saved stacked, transformers must not take the stacks apart either.
        for module in model.modules():
            module.__dict__.pop("unsharded", None)
        stacked = self._split_names(model) is None
        conversions = getattr(model, "_weight_conversions", None)
        if conversions:
            kept = [back for conversion in conversions if (back := _for_saving(conversion)) is not None]
            model._weight_conversions = [c for c in kept if not (stacked and _route(c) is not None)]
        # Libraries import bitsandbytes where this says so.
        if importlib.util.find_spec("bitsandbytes") is not None:
            setattr(model, "is_loaded_in_8bit" if self._recipe.is_int8 else "is_loaded_in_4bit", True)
        if isinstance(self.quantization_config, HalfbyteConfig):
            self.quantization_config._stacked = stacked
        return model

    # ---- a loaded model

    def is_serializable(self) -> bool:
        """Whether the model can be saved: always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model: always."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the forward pass when the cache is static: halfbyte's layers can be."""
        return True

    def _split_names(self, model: Any) -> dict[str, list[list[str]]] | None:
        """Return, for the name of each stack, the keys of its experts' projections; None if some stack stays whole."""
        found: dict[str, list[list[str]]] = {}
        for name, module in model.named_modules():
            if not isinstance(module, Experts4bit):
                continue
            for leaf in _stacks(module):
                key = f"{name}.{leaf}"
                route = next((route for route in self._routes if route.keys(key, 0) is not None), None)
                weight: Any = module._parameters[leaf]
                if route is None or weight.quant_state is None:
                    return None
                keys = [route.keys(key, expert) or [] for expert in range(weight.quant_state.shape[0])]
                if not experts.can_split(weight.data, weight.quant_state, len(route.sources)):
                    return None
                found[key] = keys
        return found

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return what is saved: of stacked experts each one by itself, where the model's files have them so."""
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit) and _is_sliced(module):
                raise HalfbyteError(
                    f"{name}: a slice of a quantized weight, as tensor parallelism has it, cannot be saved"
                )
        names = self._split_names(model)
        if not names:
            return None, {}
        state_dict: dict[str, Tensor] = model.state_dict()
        for key, keys in names.items():
            path, _, leaf = key.rpartition(".")
            weight = model.get_submodule(path)._parameters[leaf]
            parts = experts.split(weight.data, weight.quant_state, len(keys[0]))
            for entry in [entry for entry in state_dict if entry == key or entry.startswith(f"{key}.")]:
                del state_dict[entry]
            for expert, expert_names in zip(parts, keys, strict=True):
                for (packed, part), written in zip(expert, expert_names, strict=True):
                    state_dict |= experts.entries(written, packed, part)
        return state_dict, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        before, dtype = as_dtype(model.config.dtype), as_dtype(dtype)
        for name, module in list(model.named_modules()):
            dense = self._dense(name, module, before)
            if dense is not None:
                _take_hook(module, dense)
                model.set_submodule(name, dense.train(module.training))
        if dtype is not None:
            # Biases, norms and embeddings follow, except what was kept in another dtype on purpose.
            for parameter in model.parameters():
                if parameter.dtype == before:
                    parameter.data = parameter.data.to(dtype)
            model.config.dtype = dtype
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        return model

    def _dense(self, name: str, module: Any, dtype: torch.dtype | None) -> nn.Module | None:
        """Return the float module that `module` stands for: 4-bit weights as what they were, int8 ones in `dtype`."""
        if isinstance(module, Experts4bit):
            original = self._originals[name]
            for leaf in _stacks(module):
                weight: Any = module._parameters[leaf]
                stack = dequantize_4bit(weight.data, weight.quant_state)
                if module.source_is_transposed:
                    stack = stack.transpose(1, 2).contiguous()
                original._parameters[leaf] = nn.Parameter(stack, requires_grad=False)
            for leaf, parameter in module._parameters.items():
                if leaf not in _stacks(module):
                    original._parameters[leaf] = parameter
            return original
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif Linear8bitLt is not None and isinstance(module, Linear8bitLt):
            scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
            weight = (module.weight.data * (scales.view(-1, 1) / 127)).to(dtype)
        else:
            return None
        dense: Any = Conv1D(*weight.shape) if issubclass(module.source_cls, Conv1D) else _empty_linear(module)
        dense._parameters["weight"] = nn.Parameter(
            weight.T.contiguous() if isinstance(dense, Conv1D) else weight, requires_grad=False
        )
        dense.bias = module.bias
        return dense  # type: ignore[no-any-return]


class Halfbyte4BitHfQuantizer(HalfbyteHfQuantizer, Bnb4BitHfQuantizer):  # type: ignore[misc]
    """The same, for ``BitsAndBytesConfig(load_in_4bit=True)`` where halfbyte answers for bitsandbytes.

    Attributes that only halfbyte knows may be set on the configuration: ``bnb_4bit_blocksize``,
    ``bnb_4bit_scale_search``, and ``bnb_4bit_experts = False`` to leave stacked experts in 16 bits.
    """


class Halfbyte8BitHfQuantizer(HalfbyteHfQuantizer, Bnb8BitHfQuantizer):  # type: ignore[misc]
    """The same, for ``BitsAndBytesConfig(load_in_8bit=True)`` where halfbyte answers for bitsandbytes."""


def _linear(old: Any, chosen: Any) -> nn.Module:
    inputs, outputs = old.weight.shape if isinstance(old, Conv1D) else (old.in_features, old.out_features)
    bias = old.bias is not None
    if chosen.is_int8:
        new: nn.Module = Linear8bitLt(
            inputs, outputs, bias, has_fp16_weights=chosen.has_fp16_weights, threshold=chosen.threshold
        )
    else:
        new = Linear4bit(
            inputs,
            outputs,
            bias,
            chosen.compute_dtype,
            chosen.double_quant,
            chosen.scheme,
            chosen.quant_storage,
            blocksize=chosen.blocksize,
            scale_search=chosen.scale_search,
        )
    return new


def _empty_linear(like: Any) -> nn.Linear:
    return nn.Linear(like.in_features, like.out_features, like.bias is not None, device="meta")


def _take_hook(old: Any, new: nn.Module) -> None:
    """Move accelerate's hook, which moves inputs between devices, from one module to another."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)


def _is_sliced(module: Any) -> bool:
    return hasattr(module.weight, "placements") and shard_of(module.weight) is None


def _stacks(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _skipped(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of `patterns` names the module: the start of its name up to a dot, as text or regex, or its end.

    transformers does it so since 5.23; before, ``model.layers.1`` also meant ``model.layers.11``.
    """
    return any(
        name.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None
        for pattern in patterns
    )


def _route(converter: Any) -> experts.Route | None:
    """Return how the converter stacks experts, or None if it does something else."""
    if not isinstance(converter, WeightConverter):
        return None
    kinds = [type(operation).__name__ for operation in converter.operations]
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    if kinds not in ([*_MERGES], [_MERGES[0]]) or len(targets) != 1 or not all("*." in source for source in sources):
        return None
    if converter.operations[0].dim != 0 or (len(kinds) == 2 and converter.operations[1].dim != 1):
        return None
    return experts.Route(tuple(sources), targets[0])


def _for_saving(conversion: Any) -> Any:
    """Return the conversion that saving undoes: none for one of ours, transformers' own for one that we took over."""
    merge = next(iter(getattr(conversion, "operations", ())), None)
    if isinstance(merge, Deserialize4bit | Deserialize8bit):
        return None
    if not isinstance(merge, MergeExperts):
        return conversion
    sources = conversion._original_source_patterns[-merge.projections :]
    own = WeightConverter(sources, list(conversion._original_target_patterns), list(merge.operations))
    own.scope_prefix, own.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return own


def _merged(quantization_config: Any, from_arguments: Any) -> Any:
    """Return halfbyte's own configuration for a bitsandbytes checkpoint, where the caller asks for halfbyte."""
    theirs = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    if not isinstance(from_arguments, HalfbyteConfig) or theirs.get("quant_method") not in ("bitsandbytes", None):
        return None
    return HalfbyteConfig.from_bitsandbytes(theirs)


def register() -> None:
    """Make :class:`HalfbyteConfig` known to transformers; serve ``BitsAndBytesConfig`` too where halfbyte shall.

    May be called any number of times. Leaves alone what another library has put in bitsandbytes' place.
    """
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(HalfbyteConfig)
        auto.register_quantizer(METHOD)(HalfbyteHfQuantizer)
        merge = auto.AutoHfQuantizer.merge_quantization_configs

        def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
            merged = _merged(quantization_config, quantization_config_from_args)
            return merge(quantization_config, quantization_config_from_args) if merged is None else merged

        auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)
    if not _dropin.is_active():
        return
    mapping = auto.AUTO_QUANTIZER_MAPPING
    if mapping.get(METHOD_4BIT) is Bnb4BitHfQuantizer:
        mapping[METHOD_4BIT] = Halfbyte4BitHfQuantizer
    if Linear8bitLt is not None and mapping.get(METHOD_8BIT) is Bnb8BitHfQuantizer:
        mapping[METHOD_8BIT] = Halfbyte8BitHfQuantizer
