"""Linear layers of vLLM with packed weights: fused q/k/v and gate/up are one matrix and one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from halfbyte import _int8_ops as int8_ops
from halfbyte import ops
from halfbyte._gated import run_matmul_4bit_gated
from halfbyte.integrations.vllm.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from halfbyte.integrations.vllm.config import HalfbyteConfig


class HalfbyteLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """What makes, loads and multiplies the weight of one linear layer.

    The layer gets a parameter ``weight`` with codes (uint8 ``[N, K/2]``, int8 ``[N, K]``) and a buffer
    ``weight_scales``, for the rank's part of the matrix.
    """

    storage: Storage

    def __init__(self, config: HalfbyteConfig) -> None:
        super().__init__()
        self.config = config

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the rank's part of the matrix; vLLM says what is cut."""
        load = extra_weight_attrs.pop("weight_loader")
        shape = (sum(output_partition_sizes), input_size_per_partition)
        cut = input_size_per_partition != input_size or shape[0] != output_size
        where = getattr(layer, "prefix", type(layer).__name__)
        attributes = {**extra_weight_attrs, "input_dim": 1, "output_dim": 0}
        self.storage = Storage(layer, "weight", where, shape, params_dtype, self.config, cut, load, attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put codes and scales into the layer; what a checkpoint said of its format is known now.

        vLLM goes through layers in the order of their definition, which is the one in which decoders run them.
        """
        self.storage.finish()
        self.shape, self.form = self.storage.shape, self.storage.form
        if self.form.is_int8:
            self.config.order.end()
        else:
            self.config.order.add(layer.weight, layer.weight_scales, self.shape[0])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias``, ``[..., N]`` of x's dtype."""
        eager = ops.is_eager(x)
        weight, scales = layer.weight, layer.weight_scales
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if self.form.is_int8:
            linear: Any = int8_ops.run_linear if eager else torch.ops.halfbyte.int8_linear.default
            product: Tensor = linear(x, weight, scales, bias, self.config.threshold)
            return product
        multiply: Any = ops.run_matmul_4bit if eager else torch.ops.halfbyte.matmul_4bit.default
        result: Tensor = multiply(x, weight, self.shape, scales, self.form.blocksize, self.form.scheme, bias)
        return result

    def apply_gated(self, layer: Any, x: Tensor, gate: str) -> Tensor:
        """Return ``gate(a) * b`` of the halves of ``x @ W.T + bias``, ``[..., N / 2]`` of x's dtype; 4 bits only."""
        weight, scales, bias = layer.weight, layer.weight_scales, layer.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        multiply: Any = run_matmul_4bit_gated if ops.is_eager(x) else torch.ops.halfbyte.matmul_4bit_gated.default
        form = self.form
        result: Tensor = multiply(x, weight, self.shape, scales, form.blocksize, form.scheme, gate, bias)
        return result

    def dequantize_weight(self, layer: nn.Module) -> Tensor:  # noqa: ARG002
        """Return the float weight ``[N, K]``."""
        return self.storage.place().dense()
