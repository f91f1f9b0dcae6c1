"""``bitsandbytes.autograd._functions``: where the products live in bitsandbytes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from halfbyte import MatmulLtState, matmul, matmul_4bit
from halfbyte._matmul import matmul_as_is, statistics
from halfbyte.errors import ArgumentError
from halfbyte.quant_state import QuantState

from .._absent import absent

__all__ = ["GlobalOutlierPooler", "MatMul4Bit", "MatmulLtState", "matmul", "matmul_4bit"]

__getattr__ = absent("bitsandbytes.autograd._functions")


class MatMul4Bit(torch.autograd.Function):
    """``A @ W.T + bias`` with gradients to `A` and `bias`.

    Kept for callers of bitsandbytes' class of that name; :func:`~halfbyte.matmul_4bit` compiles as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        """Multiply; the parameters are those of :func:`~halfbyte.matmul_4bit`."""
        if quant_state is None:
            raise ArgumentError("quant_state: MatMul4Bit requires the quantization state of B")
        ctx.state = quant_state
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(B)
        return matmul_as_is(A, B, quant_state, out, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of A and of the bias."""
        grad_A = grad_bias = None
        state: QuantState = ctx.state
        if ctx.needs_input_grad[0]:
            (B,) = ctx.saved_tensors
            absmax, nested = statistics(state, grad_output.device)
            grad_A = torch.ops.halfbyte.matmul_4bit_grad_input.default(
                grad_output, B, tuple(state.shape or ()), absmax, state.blocksize, state.quant_type, *nested
            )
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return grad_A, None, None, grad_bias, None


class GlobalOutlierPooler:
    """A singleton that pools the outlier dimensions of all layers of one width."""

    _instance: ClassVar[GlobalOutlierPooler | None] = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget everything."""
        self.outliers: set[int] = set()
        self.model_dim: int | None = None

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        """Return the one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Add dimensions of a layer of width `feature_dim`. The first width that comes is the one that counts."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        """Return the pooled dimensions, int64."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)
