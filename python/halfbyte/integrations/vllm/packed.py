"""``PackedWeight``: quantized weights that loaders cut, hand on and copy as if they were dense.

A model's loader in vLLM knows which rows and columns of a checkpoint's matrix a rank needs, and where they go in the
fused matrix of a layer: it narrows the one, narrows the other and copies. With this tensor as both, all of that
knowledge holds for packed weights too. What a cut does to codes and statistics, for blocks of 64 weights along K:

    dense   [..., N, K]       slice rows r0:r1          slice columns c0:c1 (multiples of 64)
    codes   [..., N, K/2]     r0:r1                     c0/2:c1/2
    scales  [..., N, K/64]    r0:r1                     c0/64:c1/64

Where K is no multiple of the block size, blocks run across the ends of rows: `unit` rows together, the fewest that hold
whole blocks, are then what is cut (``codes [..., N/unit, unit·K/2]``). LLM.int8() has one scale a row. Statistics of
statistics are decoded when a weight is read, because groups of 256 scales do not survive a cut.

An operation that is none of these sees the dequantized numbers, so that code which does something else with a
checkpoint's tensor (transposes it, adds to it, copies it into a dense parameter) still gets what it means.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from halfbyte import _int8_ops as int8_ops
from halfbyte import ops
from halfbyte._int8 import quantized
from halfbyte._tables import FLOAT_DTYPES
from halfbyte.errors import DtypeError, ShapeError
from halfbyte.functional import dequantize_blockwise, quantize_4bit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from halfbyte.quant_state import QuantState

aten = torch.ops.aten


@dataclass(frozen=True)
class Format:
    """How weights are stored: ``"nf4"`` or ``"fp4"`` in blocks of `blocksize`, or ``"int8"`` by rows."""

    scheme: str
    blocksize: int = 64

    @property
    def is_int8(self) -> bool:
        """Whether these are LLM.int8()'s rows."""
        return self.scheme == "int8"

    def unit(self, shape: Sequence[int]) -> int:
        """Return how many rows together hold whole blocks.

        Raises
        ------
        ShapeError
            If the matrix has no whole number of such units.
        """
        rows, columns = shape[-2:]
        if self.is_int8:
            return 1
        unit = self.blocksize // gcd(self.blocksize, columns)
        if rows % unit or unit * columns % 2:
            raise ShapeError(
                f"a matrix of {rows} rows and {columns} columns does not end with a whole block of {self.blocksize} "
                "weights: choose a smaller blocksize, or leave the layer out (skip)"
            )
        return unit

    def empty(self, shape: Sequence[int], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Return codes and scales of zeros, which are weights of zero."""
        *outer, rows, columns = shape
        if self.is_int8:
            codes = torch.zeros(*outer, rows, columns, dtype=torch.int8, device=device)
            return codes, torch.zeros(*outer, rows, dtype=torch.float32, device=device)
        unit = self.unit(shape)
        units, width = rows // unit, unit * columns
        codes = torch.zeros(*outer, units, width // 2, dtype=torch.uint8, device=device)
        return codes, torch.zeros(*outer, units, width // self.blocksize, dtype=torch.float32, device=device)


class PackedWeight(Tensor):
    """Codes and scales that look like the ``[..., N, K]`` float weights that they stand for.

    Attributes
    ----------
    codes
        4 bits: uint8 ``[..., N/unit, unit·K/2]``; int8: ``[..., N, K]``.
    scales
        fp32, ``[..., N/unit, unit·K/blocksize]`` or ``[..., N]``.
    format, unit
        See :class:`Format`.
    stored
        Called with the number of weights after each copy into this tensor or a cut of it.
    """

    codes: Tensor
    scales: Tensor
    format: Format
    unit: int
    stored: Callable[[int], None] | None

    @staticmethod
    def __new__(  # noqa: D102  # the class says it
        cls: type[PackedWeight],
        codes: Tensor,
        scales: Tensor,
        format: Format,  # noqa: A002
        dtype: torch.dtype,
        unit: int = 1,
        stored: Callable[[int], None] | None = None,
    ) -> PackedWeight:
        *outer, units, width = codes.shape
        columns = width if format.is_int8 else width * 2 // unit
        self: PackedWeight = Tensor._make_wrapper_subclass(
            cls, (*outer, units * unit, columns), dtype=dtype, device=codes.device, requires_grad=False
        )
        self.codes, self.scales, self.format, self.unit, self.stored = codes, scales, format, unit, stored
        return self

    # Parameter subclasses of vLLM answer for themselves only; this one leaves everything to the dispatcher.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, {self.format}, {self.dtype}, device={self.device})"

    def like(self, codes: Tensor, scales: Tensor) -> PackedWeight:
        """Return the same with other contents."""
        return PackedWeight(codes, scales, self.format, self.dtype, self.unit, self.stored)

    def both(self, change: Callable[[Tensor], Tensor]) -> PackedWeight:
        """Return what becomes of it when `change`, which knows nothing of the last two dimensions, is done to it."""
        return self.like(change(self.codes), change(self.scales))

    def dense(self) -> Tensor:
        """Return the numbers, of this tensor's shape and dtype."""
        shape = tuple(self.shape)
        if not self.format.is_int8:
            codes, scales = self.codes.contiguous().view(-1, 1), self.scales.contiguous().view(-1)
            return ops.run_dequantize_4bit(codes, scales, self.format.blocksize, self.format.scheme, shape, self.dtype)
        rows = self.codes.reshape(self.scales.numel(), shape[-1])
        return int8_ops.dequantize_rows(rows, self.scales.reshape(-1), self.dtype).view(shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what cuts and copies mean; let anything else see the numbers."""
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], PackedWeight):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable and isinstance(args[0], PackedWeight):  # made-up weights of a dummy model, say
            dense = args[0].dense()
            func(dense, *_seen(args[1:]), **_seen(kwargs))
            return _copy(args[0], dense)
        return func(*_seen(args), **_seen(kwargs))


def _seen(arguments: Any) -> Any:
    return tree_map_only(PackedWeight, PackedWeight.dense, arguments)


# ---- from and to what checkpoints hold


def from_state(packed: Tensor, state: QuantState) -> PackedWeight:
    """Return the 4-bit weight of a checkpoint, its statistics decoded.

    Raises
    ------
    ShapeError
        If it is not of whole blocks.
    """
    scheme, blocksize, shape = state.quant_type, state.blocksize, state.shape
    if scheme is None or blocksize is None or shape is None or len(shape) < 2:
        raise ShapeError(f"quant_state: expected that of a 4-bit matrix, got {state!r}")
    ops.check_packed("weight", packed, shape)
    absmax = state.absmax
    if state.state2 is not None and state.offset is not None:
        absmax = dequantize_blockwise(absmax, state.state2).float() + state.offset.float()
    form = Format(scheme, blocksize)
    unit = form.unit(shape)
    units = (*shape[:-2], shape[-2] // unit)
    width = unit * shape[-1]
    used = packed.contiguous().view(-1).view(torch.uint8)[: prod(shape) // 2]
    dtype = state.dtype if state.dtype in FLOAT_DTYPES else torch.bfloat16
    return PackedWeight(
        used.view(*units, width // 2), absmax.float().view(*units, width // blocksize), form, dtype, unit
    )


def from_rows(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Return the int8 weight of a checkpoint: ``codes [..., N, K]``, ``SCB`` fp32 of N numbers."""
    if codes.dtype != torch.int8 or codes.dim() < 2:
        raise DtypeError(f"weight: expected int8 [N, K], got {codes.dtype} {list(codes.shape)}")
    if scb.numel() != codes.shape[:-1].numel():
        raise ShapeError(f"SCB: expected {codes.shape[:-1].numel()} numbers, one a row, got {list(scb.shape)}")
    return PackedWeight(codes, scb.float().reshape(codes.shape[:-1]), Format("int8"), dtype)


def quantize(weight: Tensor, form: Format, double_quant: bool = False) -> PackedWeight:
    """Quantize float weights ``[..., N, K]``, as a checkpoint of them would have been.

    With `double_quant`, scales are what is left of them after being quantized too, over the whole of `weight`.
    """
    if form.is_int8:
        codes, scb = quantized(weight.reshape(-1, weight.shape[-1]))
        return from_rows(codes.view(weight.shape), scb.view(weight.shape[:-1]), weight.dtype)
    packed, state = quantize_4bit(
        weight, blocksize=form.blocksize, compress_statistics=double_quant, quant_type=form.scheme
    )
    return from_state(packed, state)


# ---- what can be done with one


def _span(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    first, last, _ = slice(start, end).indices(size)
    return first, max(last - first, 0)


def _slice(x: PackedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    dim %= x.dim()
    size = x.shape[dim]
    first, length = _span(size, start, end)
    if length == size and step == 1:
        return x.both(lambda t: t)
    if step != 1:
        return NotImplemented
    if dim < x.dim() - 2:
        return x.both(lambda t: t.narrow(dim, first, length))
    if dim == x.dim() - 2:
        _check_cut("rows", first, length, x.unit, size, x.format)
        return x.both(lambda t: t.narrow(dim, first // x.unit, length // x.unit))
    if x.format.is_int8:
        return x.like(x.codes.narrow(dim, first, length), x.scales)
    _check_cut("columns", first, length, x.format.blocksize if x.unit == 1 else size, size, x.format)
    block = x.format.blocksize
    return x.like(x.codes.narrow(dim, first // 2, length // 2), x.scales.narrow(dim, first // block, length // block))


def _check_cut(what: str, first: int, length: int, step: int, size: int, form: Format) -> None:
    if first % step or length % step:
        raise ShapeError(
            f"{what} {first} to {first + length} of {size} do not begin and end with blocks of {form.blocksize} "
            f"weights, which share a scale: {what} can be cut at multiples of {step} only. Use fewer tensor-parallel "
            "ranks, or quantize the original model while loading"
        )


def _select(x: PackedWeight, dim: int, index: int) -> Any:
    dim %= x.dim()
    return x.both(lambda t: t.select(dim, index)) if dim < x.dim() - 2 else NotImplemented


def _unbind(x: PackedWeight, dim: int = 0) -> Any:
    dim %= x.dim()
    return [_select(x, dim, i) for i in range(x.shape[dim])] if dim < x.dim() - 2 else NotImplemented


def _split(x: PackedWeight, size: int, dim: int = 0) -> list[PackedWeight]:
    return [_slice(x, dim, start, start + size) for start in range(0, x.shape[dim], size)]


def _split_sizes(x: PackedWeight, sizes: Sequence[int], dim: int = 0) -> list[PackedWeight]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_slice(x, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _unsqueeze(x: PackedWeight, dim: int) -> Any:
    if dim < 0:
        dim += x.dim() + 1
    return x.both(lambda t: t.unsqueeze(dim)) if dim <= x.dim() - 2 else NotImplemented


def _squeeze(x: PackedWeight, dim: int) -> Any:
    dim %= x.dim()
    if dim >= x.dim() - 2 or x.shape[dim] != 1:
        return NotImplemented
    return x.both(lambda t: t.squeeze(dim))


def _view(x: PackedWeight, shape: Sequence[int]) -> Any:
    return x.both(lambda t: t) if tuple(shape) == tuple(x.shape) else NotImplemented


def _alias(x: PackedWeight, *_: Any, **__: Any) -> PackedWeight:
    return x.both(lambda t: t)


def _clone(x: PackedWeight, **_: Any) -> PackedWeight:
    return _unheard(x.both(torch.clone))


def _unheard(x: PackedWeight) -> PackedWeight:
    """Let nobody hear of what is stored in a copy."""
    x.stored = None
    return x


def _to_copy(x: PackedWeight, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any) -> Any:
    if dtype is not None and dtype != x.dtype:
        return NotImplemented
    return _unheard(x.both(lambda t: t.to(device=device, copy=True)))


def _copy(place: PackedWeight, source: Tensor, non_blocking: bool = False) -> PackedWeight:  # noqa: ARG001
    if source.shape != place.shape:
        raise ShapeError(f"expected weights {list(place.shape)}, got {list(source.shape)}")
    if not isinstance(source, PackedWeight) or (source.format, source.unit) != (place.format, place.unit):
        dense = source.dense() if isinstance(source, PackedWeight) else source
        source = quantize(dense.to(place.device, place.dtype).contiguous(), place.format)
    place.codes.copy_(source.codes)
    place.scales.copy_(source.scales)
    if place.stored is not None:
        place.stored(place.numel())
    return place


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.view.default: _view,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
}
