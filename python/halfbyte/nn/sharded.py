"""4-bit parameters in pieces: what FSDP2 (``fully_shard``) makes of :class:`~halfbyte.nn.Params4bit`.

``fully_shard`` splits a parameter with ``chunk`` and copies its own piece into ``new_zeros``; both give what is in here
instead of plain tensors, so that scales are split, gathered, saved and loaded along with packed bytes:

=====================  =================================================================================================
:class:`Shard4bit`     a rank's piece: packed bytes and the rank's share of the scales; the local tensor of the DTensor
:class:`Gathered4bit`  the whole parameter, put together for a forward or backward pass; a ``Params4bit``
:class:`Scales`        the scales of one parameter, split or not yet; shared by all views of a piece
=====================  =================================================================================================

Pieces of scales need not fit pieces of bytes: each is split evenly by itself, and only ever used when all are together.
FSDP gathers bytes whatever the mixed-precision policy says, and casts nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from halfbyte import ops
from halfbyte.errors import CheckpointError
from halfbyte.nn.params import Params4bit
from halfbyte.quant_state import QuantState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_aten: Any = torch.ops.aten

# Into how many pieces a parameter was last split, and which piece of how many another one is. Not attributes: what a
# parameter has in its __dict__ is passed on to new ones.
_counts: Any = WeakIdKeyDictionary()
_places: Any = WeakIdKeyDictionary()


class Scales:
    """The scales of one parameter, of which a rank keeps its share once it is known which one it is.

    Parameters
    ----------
    state
        The whole parameter's state.
    rows
        Rows of the whole packed tensor.
    module
        The layer whose ``quant_state`` would keep all scales alive.
    """

    def __init__(self, state: QuantState, rows: int, module: Any) -> None:
        self.state, self.rows, self.module = state, rows, module
        self.rank: int | None = None
        self.blocks = state.absmax.numel()
        self.outer = 0 if state.state2 is None else state.state2.absmax.numel()
        self.absmax = state.absmax
        self.nested = None if state.state2 is None else state.state2.absmax
        self.count = 1

    def keep(self, rank: int, count: int) -> None:
        """Keep the share of one of `count` ranks, and let go of the rest."""
        if self.rank is not None:
            return
        self.rank, self.count = rank, count
        self.absmax = _share(self.absmax, rank, count)
        self.nested = None if self.nested is None else _share(self.nested, rank, count)
        self.state = self._with(self.absmax.new_empty(0), None if self.nested is None else self.nested.new_empty(0))
        if self.module is not None:
            self.module.quant_state = None

    def own(self) -> dict[str, tuple[Tensor, int]]:
        """Return this rank's scales without padding, and how many there are in all, by the key's last part."""
        rank = self.rank or 0
        found = {"absmax": (_unpadded(self.absmax, self.blocks, rank), self.blocks)}
        if self.nested is not None:
            found["nested_absmax"] = (_unpadded(self.nested, self.outer, rank), self.outer)
        return found

    def whole(self, absmax: Tensor, nested: Tensor | None) -> QuantState:
        """Return the state of the whole parameter, from shares of all ranks, one after another."""
        return self._with(
            absmax.reshape(-1)[: self.blocks], None if nested is None else nested.reshape(-1)[: self.outer]
        )

    def _with(self, absmax: Tensor, nested: Tensor | None) -> QuantState:
        state = self.state.copy_to(absmax.device)
        state.absmax = absmax
        if state.state2 is not None and nested is not None:
            state.state2.absmax = nested
        return state

    def to(self, device: torch.device, non_blocking: bool = False) -> Scales:
        """Return scales on `device`."""
        if self.absmax.device == device:
            return self
        moved = Scales.__new__(Scales)
        moved.__dict__.update(self.__dict__)
        moved.state = self.state.copy_to(device)
        moved.absmax = self.absmax.to(device, non_blocking=non_blocking)
        moved.nested = None if self.nested is None else self.nested.to(device, non_blocking=non_blocking)
        return moved

    def pinned(self) -> Scales:
        """Return scales in pinned memory."""
        moved = Scales.__new__(Scales)
        moved.__dict__.update(self.__dict__)
        moved.absmax = self.absmax.pin_memory()
        moved.nested = None if self.nested is None else self.nested.pin_memory()
        return moved


def _share(values: Tensor, rank: int, count: int) -> Tensor:
    """Return the rank's piece of `values`, padded to the size of the first rank's, in memory of its own."""
    size = -(-values.numel() // count)
    piece = values.reshape(-1)[rank * size : (rank + 1) * size]
    padded = values.new_zeros(size)
    padded[: piece.numel()].copy_(piece)
    return padded


def _unpadded(share: Tensor, total: int, rank: int) -> Tensor:
    return share[: max(0, min(share.numel(), total - rank * share.numel()))]


class Shard4bit(Tensor):
    """A rank's piece of a 4-bit parameter. To every operation but those that FSDP does to it, its packed bytes."""

    packed: Tensor
    scales: Scales

    @staticmethod
    def __new__(cls: type[Shard4bit], packed: Tensor, scales: Scales) -> Shard4bit:  # noqa: D102  # the class says it
        self: Shard4bit = torch.Tensor._make_wrapper_subclass(
            cls,
            packed.size(),
            strides=packed.stride(),
            storage_offset=packed.storage_offset(),
            dtype=packed.dtype,
            device=packed.device,
        )
        self.packed, self.scales = packed, scales
        return self

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Shard4bit({list(self.shape)}, {self.scales.state})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation on packed bytes; results of what FSDP does to pieces are pieces again."""
        kwargs = kwargs or {}
        plain_args, plain_kwargs = pytree.tree_map_only(Shard4bit, lambda shard: shard.packed, (args, kwargs))
        source = args[1] if func is _aten.copy_.default else args[0] if args else None
        if func is _aten.copy_.default and isinstance(args[0], Shard4bit):
            _note_source(args[0], source)
        result = func(*plain_args, **plain_kwargs)
        if func is _aten.copy_.default:
            return args[0]
        if func not in _PIECE_OF_PIECE or not isinstance(source, Shard4bit):
            return result
        scales = source.scales
        if func is _aten._to_copy.default:
            if result.dtype != source.dtype:  # bytes are not numbers
                return source
            scales = scales.to(result.device, bool(kwargs.get("non_blocking", False)))
        elif func is _aten._pin_memory.default:
            scales = scales.pinned()
        return Shard4bit(result, scales)

    # ---- what FSDP calls. One argument: with five, it wants every input to have the size of the packed piece.

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Scales]:
        """Return what each rank gives: its packed bytes and scales, padded to the same size on all."""
        scales = self.scales
        scales.keep(mesh.get_local_rank(), mesh.size())
        rows = -(-scales.rows // scales.count)
        packed = self.packed
        if packed.shape[0] != rows:
            packed = packed.new_zeros(rows, 1)
            packed[: self.packed.shape[0]].copy_(self.packed)
        return (packed, scales.absmax, *(() if scales.nested is None else (scales.nested,))), scales

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Scales,
        param_dtype: torch.dtype,  # noqa: ARG002
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the whole parameter; views of what was gathered, which later calls fill again."""
        if out is not None:
            held = getattr(out, "quant_state", None)
            if held is not None:  # another checkpoint may have been loaded meanwhile
                held.offset, held.dtype = metadata.state.offset, metadata.state.dtype
            return None
        packed, *gathered = all_gather_outputs
        if not gathered:  # one process alone: FSDP hands over the first of the inputs only
            gathered = [metadata.absmax, *(() if metadata.nested is None else (metadata.nested,))]
        absmax, *nested = gathered
        state = metadata.whole(absmax, nested[0] if nested else None)
        return Gathered4bit.of(packed[: metadata.rows], state), ()


def _note_source(target: Shard4bit, source: Any) -> None:
    """Learn whose piece `target` is from what is copied into it."""
    place = _places.get(source) if isinstance(source, Params4bit) else None
    if place is not None:
        target.scales.keep(*place)


_PIECE_OF_PIECE: Final = {
    _aten.view.default,
    _aten.slice.Tensor,
    _aten.detach.default,
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.new_zeros.default,
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten._pin_memory.default,
}


class Gathered4bit(Params4bit):
    """A whole 4-bit parameter that FSDP has put together. Views of it are of its kind."""

    @classmethod
    def of(cls, packed: Tensor, state: QuantState) -> Gathered4bit:
        """Return packed bytes and their state as a parameter."""
        return cls(
            packed,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "fp4",
            quant_storage=packed.dtype,
            bnb_quantized=True,
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Give views the state of what they are of."""
        result = super().__torch_function__(func, types, args, kwargs)
        whole = args[0] if args else None
        if func in _VIEWS and isinstance(whole, Gathered4bit) and type(result) is Tensor:
            return whole.like(result)
        return result


_VIEWS: Final = {torch.as_strided, Tensor.as_strided, Tensor.detach, torch.detach}

ops.PLAIN_TENSORS.add(Gathered4bit)


# ---- state dicts


def shard_of(weight: Any) -> Shard4bit | None:
    """Return the rank's piece, if `weight` is a DTensor of a split 4-bit parameter."""
    local = getattr(weight, "_local_tensor", None)
    return local if isinstance(local, Shard4bit) else None


def _place(weight: Any) -> tuple[int, int]:
    """Return this rank's place among the pieces of a DTensor."""
    for dimension, placement in enumerate(weight.placements):
        if placement.is_shard():
            return weight.device_mesh.get_local_rank(dimension), weight.device_mesh.size(dimension)
    return 0, 1


def _like(weight: Any, local: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a DTensor of `local`, split as `weight` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=torch.Size(size),
        stride=(1,) * len(size),
    )


def entries(weight: Any) -> dict[str, Tensor]:
    """Return the entries of a state dict for a split parameter, by what follows the key of the weight (``""``, …).

    Packed bytes and scales are DTensors, and can be loaded into; tables and the JSON entry, whose size is a multiple of
    256, are whole on every rank.
    """
    shard = cast("Shard4bit", shard_of(weight))
    scales = shard.scales
    scales.keep(*_place(weight))
    found: dict[str, Tensor] = {"": _like(weight, shard.packed.detach(), (scales.rows, 1))}
    described = {f".{key}": value for key, value in scales.state.as_dict(packed=True).items()}
    blob = f".quant_state.bitsandbytes__{scales.state.quant_type}"
    described[blob] = _padded(described[blob])
    for key, (share, total) in scales.own().items():
        described[f".{key}"] = _like(weight, share, (total,))
    # torch.distributed.checkpoint follows the dots of keys with getattr.
    weight.__dict__.update({key[1:]: value for key, value in described.items() if "." not in key[1:]})
    weight.__dict__["quant_state"] = SimpleNamespace(**{blob.rpartition(".")[2]: described[blob]})
    return found | described


def _padded(blob: Tensor) -> Tensor:
    """Return JSON with spaces behind it, to a length that does not depend on its numbers.

    torch.distributed.checkpoint reads a tensor into one of the same size; readers of JSON pass over spaces.
    """
    return torch.cat([blob, blob.new_full((-blob.numel() % 256,), ord(" "))])


def load(weight: Any, data: Tensor, stored: Mapping[str, Any], key: str) -> None:
    """Load a split parameter: `data` and the other entries are whole, or split like it.

    Raises
    ------
    CheckpointError
        If they are not of a weight of the same shape and format.
    """
    shard = cast("Shard4bit", shard_of(weight))
    scales = shard.scales
    scales.keep(*_place(weight))
    # Read whole: shares would not have the sizes that the state says. DTensors are checked by their own.
    absent = {name: value for name, value in stored.items() if not _is_share(name)}
    blank = {
        name: torch.zeros(tuple(value.shape), dtype=value.dtype) for name, value in stored.items() if _is_share(name)
    }
    state = QuantState.from_dict({**absent, **blank}, shard.device)
    mine = scales.state
    wanted = (mine.shape, mine.blocksize, mine.quant_type, mine.nested)
    found = (state.shape, state.blocksize, state.quant_type, state.nested)
    if found != wanted or tuple(data.shape) != (scales.rows, 1) or data.dtype != shard.dtype:
        raise CheckpointError(
            f"checkpoint entry `{key}`: expected {mine} as {scales.rows} rows of {shard.dtype}, "
            f"got {state} as {list(data.shape)} of {data.dtype}"
        )
    with torch.no_grad():
        _copy_share(shard.packed, data, weight)
        for name, value in stored.items():
            share = {"absmax": scales.absmax, "nested_absmax": scales.nested}.get(name.rpartition(".")[2])
            if share is not None:
                own = scales.own()[name.rpartition(".")[2]][0]
                _copy_share(own, value, weight)
    state.absmax = mine.absmax
    if state.state2 is not None and mine.state2 is not None:
        state.state2.absmax = mine.state2.absmax
    scales.state = state


def _is_share(name: str) -> bool:
    return name.rpartition(".")[2] in ("absmax", "nested_absmax")


def _copy_share(target: Tensor, value: Any, weight: Any) -> None:
    if hasattr(value, "placements"):
        if tuple(value.placements) == tuple(weight.placements) and value.device_mesh == weight.device_mesh:
            local = value.to_local()
            target.copy_(local.packed if isinstance(local, Shard4bit) else local)
            return
        value = value.full_tensor()
    rank, count = _place(weight)
    size = -(-value.shape[0] // count)
    target.copy_(value[rank * size : rank * size + target.shape[0]])


def split(whole: Params4bit, pieces: tuple[Tensor, ...], count: int) -> tuple[Params4bit, ...]:
    """Return pieces of ``chunk`` as parameters that know their place; the next ``new_zeros`` makes FSDP's own."""
    made = []
    for rank, piece in enumerate(pieces):
        part = whole.like(piece)
        _places[part] = (rank, count)
        made.append(part)
    _counts[whole] = count
    return tuple(made)


def blank(whole: Params4bit, zeros: Callable[[], Tensor]) -> Tensor:
    """Return what FSDP copies its piece into: `zeros` of its size, with the scales of the whole parameter."""
    state = whole.quant_state
    count = _counts.pop(whole, None)
    made = zeros()
    if count is None or state is None or made.dim() != 2 or made.shape[0] != -(-whole.shape[0] // count):
        return made
    return Shard4bit(made, Scales(state, whole.shape[0], whole.module))
