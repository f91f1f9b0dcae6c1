"""Embeddings with an 8-bit table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from halfbyte import _int8_ops as int8_ops
from halfbyte import ops
from halfbyte.errors import ArgumentError
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.linear8bit import apply_with_weight

if TYPE_CHECKING:
    from collections.abc import Callable


class Embedding8bit(torch.nn.Embedding):
    """``nn.Embedding`` whose table is quantized to 8 bits, by rows, when it first moves to a device.

    Parameters
    ----------
    num_embeddings, embedding_dim
        Rows and columns of the table.
    device, dtype
        Where the float table is made, and of which dtype; results have that dtype.

    Notes
    -----
    A float table loads (``load_state_dict``) before the move. The table is not trained, and saving it is not
    implemented, as in bitsandbytes.

    Examples
    --------
    >>> table = Embedding8bit(100, 16).to("cpu")
    >>> table(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 16])
    """

    weight: Int8Params

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, requires_grad=False, has_fp16_weights=False)
        # Of the weight: torch.export and functional_call put plain tensors in its place.
        self._stats: Tensor | None = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise NotImplementedError("Saving an Embedding8bit is not implemented")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Embedding8bit:
        moved = cast("Embedding8bit", apply_with_weight(self, super()._apply, fn, recurse))
        self._stats = getattr(self.weight, "SCB", None)
        return moved

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Embedding's name
        """Return the rows that `input` names.

        Parameters
        ----------
        input
            Integers of any shape.

        Returns
        -------
        Tensor
            ``[*input.shape, embedding_dim]`` of the dtype of the float table.

        Raises
        ------
        ArgumentError
            If the table is not quantized yet.
        """
        weight: Any = self.weight
        stats = getattr(weight, "SCB", None)
        if stats is None:
            stats = self._stats
        if stats is None or weight.dtype != torch.int8:
            raise ArgumentError(
                "Embedding8bit.weight: not quantized yet; move the module to a device first, "
                f'module.to("{"cpu" if weight.is_meta else weight.device}")'
            )
        codes = getattr(weight, "CB", None)
        rows, scales = (weight if codes is None else codes)[input], stats[input]
        if torch.compiler.is_dynamo_compiling() or not ops.is_eager(rows):
            result: Tensor = torch.ops.halfbyte.int8_vectorwise_dequant.default(rows, scales)
            return result.to(self.dtype)
        return int8_ops.dequantize_rows(rows, scales, self.dtype)
