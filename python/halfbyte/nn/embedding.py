"""Embeddings: with a 4-bit table, and with a table that 8-bit optimizers keep in 32 bits."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.nn._packed import PackedWeight
from halfbyte.nn.params import Params4bit
from halfbyte.optim import GlobalOptimManager
from halfbyte.quant_state import QuantState

logger = logging.getLogger("halfbyte.nn")


class Embedding(nn.Embedding):
    """``nn.Embedding`` with Xavier values at first, whose table 8-bit optimizers update with 32-bit state.

    Few rows of a table get a gradient in a step, and those a large one: block-wise 8-bit state serves that badly
    (Dettmers et al. 2021, arXiv:2110.02861). Parameters are those of :class:`torch.nn.Embedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
        )
        _keep_state_in_32_bits(self)

    def reset_parameters(self) -> None:
        """Initialize with uniform Xavier values, and zeros for the padding."""
        _xavier(self)


class StableEmbedding(nn.Embedding):
    """:class:`Embedding` with layer normalization of what it looks up.

    The output has the table's dtype, whatever that of the normalization is. Other parameters are those of
    :class:`torch.nn.Embedding`. From Dettmers et al. 2021, arXiv:2110.02861.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)
        _keep_state_in_32_bits(self)

    def reset_parameters(self) -> None:
        """Initialize with uniform Xavier values, and zeros for the padding."""
        _xavier(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Embedding's name for it
        """Return the normalized rows of `input`, ``[..., embedding_dim]`` of the table's dtype."""
        rows = super().forward(input).to(self.norm.weight.dtype)
        return cast("Tensor", self.norm(rows).to(self.weight.dtype))


class Embedding4bit(PackedWeight, nn.Embedding):
    """``nn.Embedding`` whose table is quantized to 4 bits when it first moves to a device.

    Only the rows that are asked for are decoded. The table gets no gradient.

    Parameters
    ----------
    num_embeddings, embedding_dim
        Rows and columns of the table.
    dtype
        Of the table before it is quantized, and of the output.
    quant_type, quant_storage, blocksize
        See :func:`~halfbyte.functional.quantize_4bit`. Where `embedding_dim` is not a multiple of `blocksize`, rows
        share scales and are looked up more slowly; a warning says so.
    device
        Where the float table is made. Not a move: it is not quantized there yet.

    Notes
    -----
    A state dict can be made once the table is quantized (NotImplementedError before), and has the keys of
    :class:`~halfbyte.nn.Linear4bit`. It loads into quantized, unquantized and meta layers alike, as does a float table.

    Examples
    --------
    >>> table = Embedding4bit(1000, 64, quant_type="nf4").to("cpu")
    >>> table(torch.tensor([[1, 2, 999]])).shape
    torch.Size([1, 3, 64])
    """

    weight: Params4bit

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        blocksize: int = 64,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            blocksize=blocksize,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage
        if embedding_dim % blocksize:
            logger.warning(
                "Embedding size %d is not divisible by block size %d. This will lead to slow inference.",
                embedding_dim,
                blocksize,
            )

    def extra_repr(self) -> str:
        """Describe the layer as nn.Embedding does, with the format."""
        weight: Any = self.weight
        kind = f", {weight.quant_type}, blocksize={weight.blocksize}" if isinstance(weight, Params4bit) else ""
        return super().extra_repr() + kind

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Embedding's name for it
        """Return the rows of `input`.

        Parameters
        ----------
        input
            Numbers of rows, int32 or int64, of any shape.

        Returns
        -------
        Tensor
            ``[..., embedding_dim]`` of ``self.dtype``.

        Raises
        ------
        IndexError, RuntimeError
            If there is no such row: torch's own error on the CPU, an assertion on CUDA.
        ArgumentError
            If the table is not quantized yet.
        """
        weight: Any = self.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            state = self._state_of_module()
        return _rows(weight, state, input, self.embedding_dim).to(self.dtype)

    def _dense_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if getattr(self.weight, "quant_state", None) is None and self.quant_state is None:
            raise NotImplementedError(
                f"{type(self).__name__}: a state dict holds the table in 4 bits, and it is not quantized yet: "
                "move the layer to a device first"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="fp4"``; for the parameters see there."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        blocksize: int = 64,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device, blocksize)


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="nf4"``; for the parameters see there."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        blocksize: int = 64,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device, blocksize)


def _rows(packed: Tensor, state: QuantState, index: Tensor, width: int) -> Tensor:
    """Decode the rows `index` of a packed table with rows of `width`."""
    blocksize, dtype = cast("int", state.blocksize), cast("torch.dtype", state.dtype)
    stored = packed.detach().reshape(-1).view(torch.uint8)
    height = cast("torch.Size", state.shape)[0]
    blocks = width // blocksize
    row = index.unsqueeze(-1).long()
    if width % blocksize or width % 2:
        # Rows share bytes or scales: look up each element. The embedding is of nothing, and refuses numbers of no row.
        nothing = F.embedding(index, stored.new_zeros(()).expand(height, 1))
        place = row * width + torch.arange(width, device=stored.device) + nothing
        byte = stored[place >> 1].to(torch.int32)
        code = torch.where(place % 2 == 0, byte >> 4, byte & 15)
        values = cast("Tensor", state.code).to(torch.float32)[code]
        return (values * _scales(state, place // blocksize)).to(dtype)
    codes = F.embedding(index, stored[: height * width // 2].view(height, width // 2))
    scales = _scales(state, row * blocks + torch.arange(blocks, device=stored.device)).reshape(-1)
    decode: Any = ops.run_dequantize_4bit if ops.is_eager(codes) else torch.ops.halfbyte.dequantize_4bit.default
    rows: Tensor = decode(codes, scales, blocksize, state.quant_type, (*index.shape, width), dtype)
    return rows


def _scales(state: QuantState, block: Tensor) -> Tensor:
    """Return the scales of these blocks."""
    if not state.nested or state.state2 is None:
        return state.absmax[block]
    inner, offset = state.state2, cast("Tensor", state.offset)
    outer = inner.absmax[block // cast("int", inner.blocksize)]
    return cast("Tensor", inner.code)[state.absmax[block].to(torch.int32)] * outer + offset.to(torch.float32)


def _xavier(table: nn.Embedding) -> None:
    nn.init.xavier_uniform_(table.weight)
    if table.padding_idx is not None:
        with torch.no_grad():
            table.weight[table.padding_idx].fill_(0)


def _keep_state_in_32_bits(table: nn.Embedding) -> None:
    GlobalOptimManager.get_instance().register_module_override(table, "weight", {"optim_bits": 32})
