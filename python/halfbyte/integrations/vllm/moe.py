"""Experts of vLLM's mixtures with packed weights: two grouped products that read only the experts in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation

from halfbyte import _grouped as grouped
from halfbyte import ops
from halfbyte.errors import ArgumentError
from halfbyte.integrations.vllm.storage import Storage
from halfbyte.nn.experts4bit import route

if TYPE_CHECKING:
    from torch import Tensor, nn
    from vllm.model_executor.layers.fused_moe import FusedMoEConfig

    from halfbyte.integrations.vllm.config import HalfbyteConfig


class HalfbyteMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """What makes, loads and multiplies the experts of one layer.

    The layer gets ``w13_weight`` (gate and up, ``[E, 2·I, H]``) and ``w2_weight`` (down, ``[E, H, I]``) as packed
    codes, with a buffer of scales each, for the rank's experts and its part of I.
    """

    def __init__(self, config: HalfbyteConfig, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.config = config
        self.storages: dict[str, Storage] = {}

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the rank's experts."""
        load = extra_weight_attrs.pop("weight_loader")
        gated = getattr(self.moe, "is_act_and_mul", True)
        up = intermediate_size_per_partition * (2 if gated else 1)
        cut = getattr(self.moe, "tp_size", 1) > 1
        where = getattr(layer, "layer_name", "experts")
        for name, rows, columns in (("w13", up, hidden_size), ("w2", hidden_size, intermediate_size_per_partition)):
            weight, shape = f"{name}_weight", (num_experts, rows, columns)
            self.storages[weight] = Storage(
                layer, weight, where, shape, params_dtype, self.config, cut, load, extra_weight_attrs
            )
            if self.moe.has_bias:
                bias = torch.nn.Parameter(torch.zeros(num_experts, rows, dtype=params_dtype), requires_grad=False)
                for key, value in {**extra_weight_attrs, "weight_loader": load}.items():
                    setattr(bias, key, value)
                layer.register_parameter(f"{name}_bias", bias)

    def process_weights_after_loading(self, layer: nn.Module) -> None:  # noqa: ARG002
        """Put codes and scales into the layer; what a checkpoint said of its format is known now."""
        for storage in self.storages.values():
            storage.finish()
        self.config.order.end()  # experts take long, and which are next is not known
        self.activation_options = self._activation_options()

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:  # noqa: ARG002
        """Return nothing: vLLM's own kernels do not see these weights."""
        return

    @property
    def supports_eplb(self) -> bool:
        """Whether experts may move between ranks while serving: scales would have to move with them."""
        return False

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Return the weighted sum of each token's experts, ``[T, H]`` of x's dtype.

        Shared experts, of which the arguments left out are, vLLM runs itself for a method without a modular kernel.
        """
        if layer.expert_map is not None:  # experts of other ranks are -1 in it: nobody's rows
            topk_ids = layer.expert_map[topk_ids]
        tokens, k = topk_ids.shape
        w13, w2 = self.storages["w13_weight"], self.storages["w2_weight"]
        if layer.apply_router_weight_on_input:
            if k != 1:
                raise ArgumentError(f"apply_router_weight_on_input: expected one expert a token, got {k}")
            x = x * topk_weights.to(x.dtype)
        order, inverse, offsets = route(topk_ids, w13.shape[0])
        rows = x.index_select(0, order // k if k > 1 else order)
        inner = self._activated(layer, self._multiply(layer, w13, rows, offsets, "w13_bias"))
        outer = self._multiply(layer, w2, inner, offsets, "w2_bias")
        outer = outer.index_select(0, inverse).view(tokens, k, -1)
        if not layer.apply_router_weight_on_input:
            outer = outer * topk_weights.unsqueeze(-1)
        return outer.sum(1).to(x.dtype)

    def _multiply(self, layer: Any, storage: Storage, x: Tensor, offsets: Tensor, bias_name: str) -> Tensor:
        bias = getattr(layer, bias_name, None)
        form = storage.form
        if form.is_int8:
            return _dense_product(storage, x, offsets, bias)
        eager = ops.is_eager(x)
        multiply: Any = grouped.run_matmul_4bit_experts if eager else torch.ops.halfbyte.matmul_4bit_experts.default
        product: Tensor = multiply(
            x, offsets, storage.codes, storage.shape, storage.scales, form.blocksize, form.scheme, bias
        )
        return product

    def _activated(self, layer: Any, x: Tensor) -> Tensor:
        activation = layer.activation
        if not isinstance(activation, MoEActivation):
            activation = MoEActivation.from_str(str(activation))
        out = x.new_empty(x.shape[0], x.shape[1] // 2 if activation.is_gated else x.shape[1])
        apply_moe_activation(activation, out, x, **self.activation_options)
        return out

    def _activation_options(self) -> dict[str, Any]:
        """Return limits and slopes of the activation, as the installed vLLM wants them."""
        try:
            from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig
            from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
        except ImportError:  # up to 0.27
            alpha, beta = getattr(self.moe, "swiglu_alpha", None), getattr(self.moe, "swiglu_beta", None)
            return {
                "clamp_limit": getattr(self.moe, "swiglu_limit", None),
                "alpha": 1.0 if alpha is None else alpha,
                "beta": 0.0 if beta is None else beta,
            }
        return {"activation_config": ApplyMoEActivationConfig.from_configs(self.moe, FUSED_MOE_UNQUANTIZED_CONFIG)}


def _dense_product(storage: Storage, x: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply rows by int8 experts, which are dequantized for it.

    In bf16 on CUDA, whatever the activations are: grouped products of other types wait for the device there.
    """
    dtype = torch.bfloat16 if x.is_cuda else x.dtype
    weight = storage.place().dense().to(dtype)
    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    expert = torch.searchsorted(offsets, row, right=True) - 1
    owned = ((expert >= 0) & (row < offsets[-1])).unsqueeze(1)
    rows = torch.where(owned, x, 0).to(dtype)
    out = F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:]).to(x.dtype)
    if bias is not None:
        out = out + bias[expert.clamp(0, weight.shape[0] - 1)]
    return torch.where(owned, out, 0)
