"""Experts of one layer: stacked in the model, one by one in files.

A stack ``[E, N, K]`` is quantized as one tensor. Files from before transformers 5, and the loaders of vLLM, know each
expert's projections as linear layers of their own. As long as a projection is a whole number of blocks, packed bytes
and scales of the one form are those of the other, in order. Nested statistics are not: they have one offset a tensor,
and blocks of 256 scales. Where those do not fit, scales become fp32, exactly the numbers that they stood for; a stack
made of nested ones remembers the few numbers that they were nested with, and gives them back when it is taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit
from halfbyte.nn.params import check_packed
from halfbyte.quant_state import QuantState

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Route:
    """How transformers makes a stack from a checkpoint: the patterns of its parts' keys, and that of the stack's."""

    sources: tuple[str, ...]
    target: str

    def keys(self, key: str, expert: int) -> list[str] | None:
        """Return the keys of an expert's projections, in order, or None if `key` is not of such a stack."""
        if not key.endswith(self.target):
            return None
        prefix = key[: len(key) - len(self.target)]
        return [prefix + source.replace("*.", f"{expert}.") for source in self.sources]


def plain_scales(state: QuantState) -> Tensor:
    """Return the scales of `state` as fp32, denested if they are nested."""
    if state.state2 is None or state.offset is None:
        return state.absmax
    scales: Tensor = dequantize_blockwise(state.absmax, state.state2)
    return scales + state.offset


def merge(parts: Sequence[Sequence[tuple[Tensor, QuantState]]], key: str) -> tuple[Tensor, QuantState]:
    """Stack quantized projections ``[N_i, K]``: parts of each expert, expert after expert, into ``[E, ΣN_i, K]``.

    Raises
    ------
    CheckpointError
        If experts differ in shape or format.
    """
    first = parts[0][0][1]
    form = [(state.shape, state.blocksize, state.quant_type, state.dtype) for _, state in parts[0]]
    for number, expert in enumerate(parts):
        for (packed, state), wanted in zip(expert, form, strict=True):
            if (state.shape, state.blocksize, state.quant_type, state.dtype) != wanted:
                raise CheckpointError(f"checkpoint entry `{key}`: expert {number} has another form than expert 0")
            check_packed(packed, state, key)
    shapes = [tuple(shape or ()) for shape, *_ in form]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise CheckpointError(f"checkpoint entry `{key}`: expected projections [N, K] with K in common")
    shape = torch.Size([len(parts), sum(rows for rows, _ in shapes), shapes[0][1]])
    flat = [piece for expert in parts for piece in expert]
    blocksize = first.blocksize or 64
    if any(prod(state.shape or ()) % blocksize for _, state in flat):
        return _requantized(parts, first)
    packed = torch.cat([data.reshape(-1) for data, _ in flat]).unsqueeze(1)
    nested = _common_nesting([state for _, state in flat])
    merged = QuantState(
        torch.cat([plain_scales(state) if nested is None else state.absmax for _, state in flat]),
        shape,
        first.code,
        blocksize,
        first.quant_type,
        first.dtype,
        None if nested is None else first.offset,
        nested,
    )
    if nested is None and all(state.state2 is not None for _, state in flat):
        merged.__dict__["nested_parts"] = [(state.offset, state.state2) for _, state in flat]
    return packed, merged


def _nested_again(scales: Tensor, offset: Tensor, inner: QuantState) -> QuantState | None:
    """Undo :func:`plain_scales`: return codes for `scales` that stand for exactly them, or None if there are none."""
    size = inner.blocksize or 256
    outer, code = inner.absmax.to(scales.device), inner.code
    assert code is not None
    code, offset = code.to(scales.device), offset.to(scales.device)
    values = code * outer.unsqueeze(1) + offset  # ascending, as the code is
    filled = torch.nn.functional.pad(scales, (0, outer.numel() * size - scales.numel())).view(outer.numel(), size)
    codes = torch.searchsorted(values, filled).clamp_(max=code.numel() - 1)
    if not torch.equal(values.gather(1, codes).view(-1)[: scales.numel()], scales):
        return None
    codes = codes.view(-1)[: scales.numel()].to(torch.uint8)
    nested = QuantState(outer, code=code, blocksize=size, dtype=inner.dtype)
    return QuantState(codes, offset=offset, state2=nested)


def _common_nesting(states: Sequence[QuantState]) -> QuantState | None:
    """Return the nested statistics of all `states` as one, or None where they cannot be."""
    inner = [state.state2 for state in states]
    first = inner[0]
    if first is None or first.blocksize is None or states[0].offset is None:
        return None
    for state, nested in zip(states, inner, strict=True):
        if (
            nested is None
            or nested.blocksize != first.blocksize
            or state.offset is None
            or not torch.equal(state.offset, states[0].offset)
            or not torch.equal(nested.code, first.code)  # type: ignore[arg-type]
            or state.absmax.numel() % first.blocksize
        ):
            return None
    absmax = torch.cat([nested.absmax for nested in inner if nested is not None])
    return QuantState(absmax, code=first.code, blocksize=first.blocksize, dtype=first.dtype)


def _requantized(parts: Sequence[Sequence[tuple[Tensor, QuantState]]], first: QuantState) -> tuple[Tensor, QuantState]:
    """Stack projections of which a block would span two: there is no other way than to quantize again."""
    dense = torch.stack([torch.cat([dequantize_4bit(*piece) for piece in expert]) for expert in parts])
    return quantize_4bit(
        dense,
        blocksize=first.blocksize,
        compress_statistics=first.nested,
        quant_type=first.quant_type or "nf4",
        quant_storage=parts[0][0][0].dtype,
    )


def can_split(packed: Tensor, state: QuantState, parts: int) -> bool:
    """Whether :func:`split` can part the stack: it does not part a block, nor an element of packed bytes."""
    if len(state.shape or ()) != 3:
        return False
    _, rows, width = state.shape  # type: ignore[misc]
    numel = rows // parts * width
    return bool(rows % parts == 0 and numel % (state.blocksize or 64) == 0 and numel % (packed.itemsize * 2) == 0)


def split(packed: Tensor, state: QuantState, parts: int) -> list[list[tuple[Tensor, QuantState]]]:
    """Undo :func:`merge`: return, for each expert, its `parts` projections of the same height."""
    count, rows, width = state.shape  # type: ignore[misc]
    height, blocksize = rows // parts, state.blocksize or 64
    blocks, elements = height * width // blocksize, height * width // (packed.itemsize * 2)
    inner = state.state2
    outer = 0 if inner is None or blocks % (inner.blocksize or 256) else blocks // (inner.blocksize or 256)
    scales = torch.split(state.absmax if outer else plain_scales(state), blocks)
    bytes_ = torch.split(packed.reshape(-1), elements)
    nested: list[QuantState | None] = [None] * (count * parts)
    if outer and inner is not None:
        nested = [
            QuantState(absmax.clone(), code=inner.code, blocksize=inner.blocksize, dtype=inner.dtype)
            for absmax in torch.split(inner.absmax, outer)
        ]
    remembered = state.__dict__.get("nested_parts")
    if remembered is not None and len(remembered) == len(nested):
        again = [_nested_again(scale, *known) for scale, known in zip(scales, remembered, strict=True)]
    else:
        again = [None] * len(nested)
    projections = [
        (
            data.clone().unsqueeze(1),
            QuantState(
                absmax.clone() if known is None else known.absmax,
                torch.Size([height, width]),
                state.code,
                blocksize,
                state.quant_type,
                state.dtype,
                known.offset if known is not None else None if within is None else state.offset,
                within if known is None else known.state2,
            ),
        )
        for data, absmax, within, known in zip(bytes_, scales, nested, again, strict=True)
    ]
    return [projections[first : first + parts] for first in range(0, count * parts, parts)]


def entries(key: str, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
    """Return the entries of a checkpoint for one quantized weight."""
    written: dict[str, Any] = {key: packed}
    written |= {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}
    return written
