"""Quantized checkpoints, entry by entry: what belongs to one weight becomes one :class:`PackedWeight`.

A 4-bit weight of bitsandbytes' format is five to seven entries (``X``, ``X.absmax``, ``X.quant_map``,
``X.nested_absmax``, ``X.nested_quant_map``, ``X.quant_state.bitsandbytes__nf4``), one of LLM.int8() two or three
(``P.weight``, ``P.SCB``, ``P.weight_format``). They come in any order, from any file. Each is handed on when it is
whole, and everything else as it comes, so that no more is held than is being put together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from halfbyte.errors import CheckpointError
from halfbyte.integrations.vllm.packed import from_rows, from_state
from halfbyte.quant_state import QuantState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

_PLAIN: Final = (".absmax", ".quant_map")
_NESTED: Final = (".nested_absmax", ".nested_quant_map")
_BLOB: Final = ".quant_state.bitsandbytes__"
_WEIGHT: Final = ".weight"
_SCB: Final = ".SCB"
_FORMAT: Final = ".weight_format"


def _of_4bit(name: str) -> tuple[str, str] | None:
    """Return the weight that `name` is a statistic of, and which."""
    if _BLOB in name:
        weight, _, rest = name.rpartition(_BLOB)
        return weight, _BLOB + rest
    for suffix in (*_NESTED, *_PLAIN):
        if name.endswith(suffix):
            return name[: -len(suffix)], suffix
    return None


def _could_be_packed(tensor: Tensor) -> bool:
    """Whether a tensor may be the bytes of a weight: packed ones are ``[n, 1]`` of any storage dtype."""
    return tensor.dtype == torch.int8 or (tensor.dim() == 2 and tensor.shape[1] == 1)


class _Pending:
    """Entries of one weight that have come."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.statistics: dict[str, Tensor] = {}
        self.scb: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        if self.weight is None:
            return False
        if self.scb is not None:
            return True
        here = self.statistics.keys()
        if not any(suffix.startswith(_BLOB) for suffix in here) or not here >= set(_PLAIN):
            return False
        nested = self.statistics[".absmax"].dtype == torch.uint8
        return not nested or here >= set(_NESTED)


def join(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of a checkpoint, those of a quantized weight as one under the weight's name.

    Parameters
    ----------
    weights
        Names and tensors as they are in the files.
    dtype
        What int8 weights look like; their entries do not say.

    Raises
    ------
    CheckpointError
        If something is missing at the end, or contradicts itself.
    """
    pending: dict[str, _Pending] = {}
    for name, tensor in weights:
        statistic = _of_4bit(name)
        if statistic is not None:
            weight, suffix = statistic
            pending.setdefault(weight, _Pending()).statistics[suffix] = tensor
        elif name.endswith(_SCB):
            weight = name.removesuffix(_SCB) + _WEIGHT
            pending.setdefault(weight, _Pending()).scb = tensor
        elif name.endswith(_FORMAT):
            _check_format(name, tensor)
            continue
        elif name in pending or _could_be_packed(tensor):
            weight = name
            pending.setdefault(name, _Pending()).weight = tensor
        else:
            yield name, tensor
            continue
        if pending[weight].is_whole:
            yield weight, _whole(weight, pending.pop(weight), dtype)
    for name, rest in pending.items():
        if rest.statistics or rest.scb is not None or rest.weight is None:
            raise CheckpointError(_missing(name, rest))
        yield name, rest.weight


def _whole(name: str, parts: _Pending, dtype: torch.dtype) -> Tensor:
    assert parts.weight is not None
    if parts.scb is not None:
        return from_rows(parts.weight, parts.scb, dtype)
    entries = {name + suffix: tensor for suffix, tensor in parts.statistics.items()}
    return from_state(
        parts.weight, QuantState.from_dict(entries, "cpu" if parts.weight.is_cpu else parts.weight.device)
    )


def _check_format(name: str, tensor: Tensor) -> None:
    """Refuse layouts of int8 weights that only old versions of bitsandbytes wrote and read."""
    if tensor.numel() != 1 or int(tensor) != 0:
        raise CheckpointError(f"checkpoint entry `{name}`: expected 0, the layout by rows, got {tensor.tolist()}")


def _missing(name: str, parts: _Pending) -> str:
    here = [name] * (parts.weight is not None) + [name + suffix for suffix in parts.statistics]
    wanted = [name, *(name + suffix for suffix in _PLAIN), f"{name}{_BLOB}…"]
    if parts.scb is not None:
        here, wanted = [name.removesuffix(_WEIGHT) + _SCB], [name]
    lacking = [entry for entry in wanted if entry not in here and not (entry.endswith("…") and _has_blob(parts))]
    if not lacking:
        lacking = [name + suffix for suffix in _NESTED if suffix not in parts.statistics]
    return f"checkpoint entries {', '.join(f'`{e}`' for e in here)}: {', '.join(f'`{e}`' for e in lacking)} missing"


def _has_blob(parts: _Pending) -> bool:
    return any(suffix.startswith(_BLOB) for suffix in parts.statistics)
