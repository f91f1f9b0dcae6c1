"""``bitsandbytes.nn.modules``: where the layers live in bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
    StableEmbedding,
    fix_4bit_weight_quant_state_from_module,
)
from halfbyte.optim import GlobalOptimManager
from halfbyte.quant_state import QuantState

from .._absent import absent
from ..functional import has_avx512bf16
from ..utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, OutlierTracer

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "GlobalOptimManager",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "OutlierTracer",
    "Params4bit",
    "QuantState",
    "StableEmbedding",
    "fix_4bit_weight_quant_state_from_module",
    "has_avx512bf16",
    "maybe_rearrange_weight",
]

__getattr__ = absent("bitsandbytes.nn.modules")

if __name__ == "bitsandbytes.nn.modules":
    Linear4bit._casts_bias = True


class OutlierAwareLinear(torch.nn.Linear):
    """A base for linear layers that treat some dimensions of their input apart.

    A subclass says how: :meth:`quantize_weight` and :meth:`forward_with_outliers`. Which dimensions,
    :class:`~bitsandbytes.utils.OutlierTracer` says; the weight is quantized at the first forward.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor | None) -> Tensor:
        """Multiply; to be written by the subclass."""
        raise NotImplementedError("Please override the `forward_with_outliers(self, x, outlier_idx)` function")

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        """Return the quantized weight, of the same shape; to be written by the subclass."""
        raise NotImplementedError("Please override the `quantize_weights(self, w, outlier_idx)` function")

    def forward(self, x: Tensor) -> Tensor:
        """Find the outlier dimensions and quantize the weight, if that has not been done, then multiply."""
        if self.outlier_dim is None:
            self.outlier_dim = OutlierTracer.get_instance().get_outliers(self.weight)
        if not self.is_quantized:
            self.weight.data.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],  # noqa: ARG001
    strict: bool,  # noqa: ARG001
    missing_keys: list[str],  # noqa: ARG001
    unexpected_keys: list[str],  # noqa: ARG001
    error_msgs: list[str],  # noqa: ARG001
) -> None:
    """Take the entry ``weight_format`` out of a state dict that is being loaded; a load pre-hook.

    Raises
    ------
    CheckpointError
        If the weight is in an order other than row by row, which bitsandbytes wrote until 0.44.
    """
    if state_dict.get(f"{prefix}weight") is None:
        return
    stored = state_dict.pop(f"{prefix}weight_format", "row")
    name = stored
    if isinstance(stored, Tensor):
        name = INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.get(int(stored), str(int(stored)))
    if name != "row":
        raise CheckpointError(f"checkpoint entry `{prefix}weight_format`: expected row, got {name}")
