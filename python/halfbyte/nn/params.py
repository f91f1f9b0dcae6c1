"""``Params4bit``: a parameter that is quantized when it first moves to a device."""

from __future__ import annotations

import copy
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte._tables import STORAGE_DTYPES
from halfbyte.errors import CheckpointError
from halfbyte.functional import quantize_4bit
from halfbyte.nn._moves import MovingParameter
from halfbyte.quant_state import QuantState

if TYPE_CHECKING:
    from collections.abc import Mapping

_STATE_PROPERTIES = {
    "absmax": lambda state: state.absmax,
    "code": lambda state: state.code,
    "quant_map": lambda state: state.code,
    "offset": lambda state: state.offset,
    "state2": lambda state: state.state2,
    "nested_absmax": lambda state: state.state2.absmax,
    "nested_blocksize": lambda state: state.state2.blocksize,
    "nested_quant_map": lambda state: state.state2.code,
    "nested_dtype": lambda state: state.state2.dtype,
    "nested_offset": lambda state: state.offset,
}


class Params4bit(MovingParameter):
    """A weight of 4 bits an element, with the state that decodes it.

    Made from a float tensor, it stays that until it first moves to a device (``.to(device)``, ``.cuda()``, ``.cpu()``,
    also of the module that holds it; the meta device does not count): then it is quantized in place and becomes packed
    bytes, `quant_storage` ``[⌈⌈n/2⌉ / itemsize⌉, 1]``. From then on a change of dtype leaves it alone: the bytes are
    not numbers, even where they are stored as bf16, and ``.half()`` or ``module.to(torch.float16)`` would destroy them.

    Parameters
    ----------
    data
        Float weight, or packed bytes with `quant_state` and ``bnb_quantized=True``.
    requires_grad
        Whether the *float* weight requires a gradient. Packed bytes never get one.
    quant_state
        State of packed bytes.
    blocksize, compress_statistics, quant_type, quant_storage, scale_search
        How to quantize; see :func:`~halfbyte.functional.quantize_4bit`. `blocksize` None is 64.
    module
        The layer that holds this; gets its ``quant_state`` set when this is quantized.
    bnb_quantized
        Whether `data` is packed bytes.
    **kwargs
        Accepted and ignored, so that ``Params4bit(data, **old.__dict__)`` works, as libraries do it.

    Notes
    -----
    ``absmax``, ``code``, ``quant_map``, ``offset``, ``state2``, ``nested_absmax``, ``nested_blocksize``,
    ``nested_quant_map``, ``nested_dtype`` and ``nested_offset`` read the state; AttributeError where there is none.
    Deep copies and pickles carry the state; the copy belongs to the copied module, or to none.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Any
    scale_search: bool = False

    def __new__(  # noqa: D102  # the class says it
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Any = None,
        bnb_quantized: bool = False,
        *,
        scale_search: bool = False,
        **kwargs: Any,  # noqa: ARG004
    ) -> Params4bit:
        if data is None:
            data = torch.empty(0)
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        self.scale_search = scale_search
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int = "cuda",
        module: Any = None,
        **kwargs: Any,  # noqa: ARG003
    ) -> Params4bit:
        """Build a quantized parameter from checkpoint entries.

        Parameters
        ----------
        data
            Packed bytes, as stored.
        quantized_stats
            The other entries of the weight, for :meth:`QuantState.from_dict`; left as they are.
        requires_grad
            Only float storage can.
        device
            Where the parameter shall be.
        module
            The layer it will belong to, whose ``quant_state`` is set.
        **kwargs
            Accepted and ignored.

        Raises
        ------
        CheckpointError
            If the entries are not a 4-bit state, or `data` does not have the bytes that it describes.
        """
        state = QuantState.from_dict(quantized_stats, device)
        check_packed(data, state)
        if data.is_meta and torch.device(device).type != "meta":
            raise CheckpointError(
                "checkpoint entry `weight`: expected packed bytes, got a tensor on meta, which has none"
            )
        self = cls(
            data.detach().to(device),
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "fp4",
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )
        describe(module, state, self.quant_storage)
        return self

    # Module.to() and its kin end in `parameter.data = moved`, which must bring the moved state along.
    @property
    def data(self) -> Tensor:
        """The float weight or packed bytes, as a plain tensor. Assigning a Params4bit takes over its state as well."""
        data: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        if isinstance(value, Params4bit) and value is not self and value.bnb_quantized:
            self._take(value)

    def _take(self, other: Params4bit) -> None:
        self.__dict__.update({k: v for k, v in other.__dict__.items() if k != "module"})
        if other.quant_state is not None:
            describe(self.module, other.quant_state, other.quant_storage)

    # ---- moving

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Quantize, on the first move to a device other than meta; move, on later ones.

        Takes what :meth:`torch.Tensor.to` takes. A dtype counts only as long as the weight is neither quantized nor
        being quantized. The new parameter has its own state; this one keeps it as it is.
        """
        kwargs.pop("copy", None)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            if device is not None and device.type != "meta":
                return self._quantize(device, non_blocking)
            data = self.data
            moved = data.to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self if moved is data else self.like(moved)
        if device is None or device == self.device:
            return self
        moved = self.data.to(device=device, non_blocking=non_blocking)
        state = None if self.quant_state is None else self.quant_state.copy_to(device)
        return self.like(moved, quant_state=state)

    def type(self, dtype: Any = None, non_blocking: bool = False) -> Any:
        """Return the type's name, or convert a float weight; packed bytes stay as they are."""
        if dtype is None:
            return super().type()
        return self if self.bnb_quantized else self.like(self.data.type(dtype, non_blocking))

    def half(self) -> Params4bit:
        """Convert a float weight to fp16; packed bytes stay as they are."""
        return self.to(torch.float16)

    def bfloat16(self) -> Params4bit:
        """Convert a float weight to bf16; packed bytes stay as they are."""
        return self.to(torch.bfloat16)

    def float(self) -> Params4bit:
        """Convert a float weight to fp32; packed bytes stay as they are."""
        return self.to(torch.float32)

    def double(self) -> Params4bit:
        """Convert a float weight to fp64; packed bytes stay as they are."""
        return self.to(torch.float64)

    def _quantize(self, device: torch.device, non_blocking: bool = False) -> Params4bit:
        weight = self.data.to(device, non_blocking=non_blocking)
        packed, state = quantize_4bit(
            weight,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
            scale_search=self.scale_search,
        )
        self.adopt(packed, state)
        return self

    def adopt(self, packed: Tensor, state: QuantState) -> None:
        """Become the packed weight `packed`, described by `state`."""
        if self.requires_grad and not packed.is_floating_point():
            self.requires_grad_(False)
        self.data = packed
        self.quant_state = state
        self.quant_type = state.quant_type or self.quant_type
        self.blocksize = state.blocksize or self.blocksize
        self.compress_statistics = state.nested
        self.quant_storage = packed.dtype
        self.bnb_quantized = True
        describe(self.module, state, self.quant_storage)

    def like(self, data: Tensor, **changes: Any) -> Params4bit:
        """Return a parameter of this kind around `data`, with attributes of this one except for `changes`."""
        # accelerate's init_empty_weights leaves a "requires_grad" in __dict__.
        changes["requires_grad"] = self.requires_grad and data.is_floating_point()
        return type(self)(data, **{**self.__dict__, **changes})

    def around(self, data: Tensor) -> Params4bit:
        """Return a parameter of this kind around `data`, which something else than :meth:`to` made of this one.

        Its state is where `data` is. ``Module.to_empty`` gives memory to what was on meta: so does this to the state.
        """
        state = self.quant_state
        if state is not None and state.absmax.device != data.device:
            state = state.empty_on(data.device) if state.absmax.is_meta else state.copy_to(data.device)
        return self.like(data, quant_state=state)

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes = dict(state)
        data, requires_grad = attributes.pop("data"), attributes.pop("requires_grad")
        self.requires_grad_(False)
        self.data = data
        self.requires_grad_(requires_grad)
        self.__dict__.update(attributes)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Everything goes into the state, which is pickled after self is known: module and weight refer to each other.
        return _rebuild, (type(self), self.is_meta), self.__getstate__()

    def __copy__(self) -> Params4bit:
        return self.like(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        known = memo.get(id(self))
        if isinstance(known, Params4bit):
            return known
        twin = self.like(
            copy.deepcopy(self.data, memo),
            quant_state=copy.deepcopy(self.quant_state, memo),
            module=memo.get(id(self.module)),
        )
        memo[id(self)] = twin
        return twin

    # ---- what FSDP does to parameters

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Give the pieces of ``chunk`` and ``split`` this parameter's state; leave everything else to plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.new_zeros and isinstance(args[0], Params4bit):
                return sharded.blank(args[0], lambda: func(*args, **(kwargs or {})))
            result = func(*args, **(kwargs or {}))
        if func in _PIECES:
            kwargs = kwargs or {}
            whole = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
            if isinstance(whole, Params4bit):
                count = args[1] if len(args) > 1 else kwargs.get("chunks")
                if func in _PIECES[:2] and whole.bnb_quantized and count and len(args) < 3 and not kwargs.get("dim"):
                    return sharded.split(whole, result, count)
                return tuple(whole.like(piece) for piece in result)
        return result


def _state_property(name: str) -> property:
    def get(self: Params4bit) -> Any:
        state = self.quant_state
        if state is None or (name.startswith("nested_") and state.state2 is None):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}: it has no such statistics")
        return _STATE_PROPERTIES[name](state)

    return property(get, doc=f"``{name}`` of the quantization state; AttributeError where there is none.")


# Properties and not __getattr__, which torch.compile cannot trace on a tensor.
for _name in _STATE_PROPERTIES:
    setattr(Params4bit, _name, _state_property(_name))

_PIECES = (torch.chunk, Tensor.chunk, torch.split, Tensor.split)

ops.PLAIN_TENSORS.add(Params4bit)


def _rebuild(cls: type[Params4bit], on_meta: bool = False) -> Params4bit:
    return cls(torch.empty(0, device="meta" if on_meta else "cpu"))


def describe(module: Any, state: QuantState, storage: torch.dtype) -> None:
    """Tell the layer of a packed weight, if there is one, what FSDP makes the weight itself forget."""
    if module is not None:
        module.quant_state, module.quant_storage = state, storage


def check_packed(data: Tensor, state: QuantState, key: str = "weight") -> None:
    """Raise CheckpointError naming `key` unless `data` has the bytes that `state` describes."""
    numel = prod(state.shape or ())
    needed = (numel + 1) // 2
    stored = data.numel() * data.itemsize
    fits = needed <= stored < needed + data.itemsize
    if data.dtype not in STORAGE_DTYPES or data.layout != torch.strided or not fits:
        raise CheckpointError(
            f"checkpoint entry `{key}`: expected {needed} packed bytes for a weight of {list(state.shape or ())}, "
            f"got {str(data.dtype).removeprefix('torch.')} {list(data.shape)}"
        )


def take_packed(data: Tensor, state: QuantState, device: torch.device, assign: bool) -> Tensor:
    """Return packed bytes of a checkpoint on `device`; unless `assign`, they and `state` get memory of their own."""
    if assign:
        return data.detach()
    state.absmax = state.absmax.clone()
    if state.state2 is not None:
        state.state2.absmax = state.state2.absmax.clone()
    return data.detach().to(device, copy=True)


from halfbyte.nn import sharded  # noqa: E402  # of which pieces are made, and which is made of this
