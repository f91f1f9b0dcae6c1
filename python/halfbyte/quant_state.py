"""What is needed beside packed bytes to decode them, and how it is written to checkpoints.

The serialized form is bitsandbytes' (0.50), to the byte. For a weight named ``w``:

=====================================  ==========================  =============================
key                                    dtype, shape                when
=====================================  ==========================  =============================
``w.absmax``                           fp32 ``[nblocks]``          plain statistics
``w.absmax``                           uint8 ``[nblocks]``         nested statistics
``w.quant_map``                        fp32 ``[16]``               always
``w.nested_absmax``                    fp32 ``[⌈nblocks / 256⌉]``  nested
``w.nested_quant_map``                 fp32 ``[256]``              nested
``w.quant_state.bitsandbytes__nf4``    uint8, UTF-8 JSON           always (``…__fp4`` for FP4)
=====================================  ==========================  =============================

A checkpoint is untrusted: :meth:`QuantState.from_dict` checks every entry and raises
:class:`~halfbyte.errors.CheckpointError` with the key at fault. Values are fp32 whatever torch's default dtype is.
"""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from halfbyte._tables import BLOCK_SIZES, QUANT_TYPES, code_4bit, dynamic_map
from halfbyte.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = tuple(_DTYPES.values())
_BLOB_MAX = 4096
"""Bytes of JSON that a state may have. bitsandbytes writes about 170."""
_NUMEL_MAX = 2**62
_TABLE_TOLERANCE = 2**-7
"""How far a stored table may be from the real one: a table rounded to bf16 is within 2⁻⁹."""


class QuantState:
    """Statistics and metadata of a quantized tensor.

    Parameters
    ----------
    absmax
        Scale of each block, fp32 ``[nblocks]``; with `state2`, its 8-bit codes, uint8 ``[nblocks]``.
    shape
        Shape of the tensor before quantization. None for blockwise 8-bit, whose codes have that shape.
    code
        Values of the codes, fp32: ``[16]`` in code order (4-bit) or ``[256]`` ascending (8-bit).
    blocksize
        Elements that share a scale.
    quant_type
        ``"nf4"`` or ``"fp4"``; None for blockwise 8-bit.
    dtype
        Element type before quantization, which dequantization gives back.
    offset
        Mean of the scales before they were quantized, fp32 scalar; with `state2` only.
    state2
        State of `absmax` when that is quantized in turn (double quantization).

    Notes
    -----
    Attributes are plain and may be assigned. ``nested`` is set from `state2` at construction. ``state[i]`` reads the
    fields as the list ``[absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type]`` that bitsandbytes
    used before it had this class.
    """

    valid_quant_types: ClassVar[tuple[str, ...]] = ("fp4", "nf4")
    valid_qs_type_keys: ClassVar[list[str]] = ["bitsandbytes__fp4", "bitsandbytes__nf4"]
    valid_qs_keys: ClassVar[list[str]] = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]

    def __init__(
        self,
        absmax: Tensor,
        shape: Sequence[int] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __getitem__(self, index: int) -> Any:
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __repr__(self) -> str:
        kind = self.quant_type or "8-bit"
        shape = None if self.shape is None else tuple(self.shape)
        return (
            f"QuantState({kind}, shape={shape}, dtype={self.dtype}, blocksize={self.blocksize}, nested={self.nested})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        return (
            _same_shape(self.shape, other.shape)
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and _close(self.absmax, other.absmax)
            and _close(self.code, other.code)
            and _close(self.offset, other.offset)
            and self.state2 == other.state2
        )

    __hash__ = None  # type: ignore[assignment]

    # FSDP walks dotted state-dict keys with getattr, "quant_state.bitsandbytes__nf4" among them.
    @property
    def bitsandbytes__nf4(self) -> Tensor:
        """The JSON entry of an NF4 state, uint8 ``[bytes]``; AttributeError for other types."""
        return self._blob_attribute("nf4")

    @property
    def bitsandbytes__fp4(self) -> Tensor:
        """The JSON entry of an FP4 state, uint8 ``[bytes]``; AttributeError for other types."""
        return self._blob_attribute("fp4")

    def _blob_attribute(self, quant_type: str) -> Tensor:
        if self.quant_type != quant_type:
            raise AttributeError(
                f"'QuantState' of type {self.quant_type!r} has no attribute 'bitsandbytes__{quant_type}'"
            )
        blob: Tensor = self.as_dict(packed=True)[f"quant_state.bitsandbytes__{quant_type}"]
        return blob

    def to(self, device: torch.device | str | int) -> QuantState:
        """Move every tensor to `device`, in place, and return self."""
        for name in ("absmax", "code", "offset"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device))
        if self.state2 is not None:
            self.state2.to(device)
        return self

    def copy_to(self, device: torch.device | str | int) -> QuantState:
        """Return a state on `device`; this one stays as it is. Tensors already there are shared."""
        moved = QuantState.__new__(type(self))
        moved.__dict__.update(self.__dict__)
        if self.state2 is not None:
            moved.state2 = QuantState.__new__(type(self.state2))
            moved.state2.__dict__.update(self.state2.__dict__)
        return moved.to(device)

    def empty_on(self, device: torch.device | str | int) -> QuantState:
        """Return a state like this one on `device`, with the code tables of its type and scales that hold anything."""
        empty = QuantState.__new__(type(self))
        empty.__dict__.update(self.__dict__)
        for name in ("absmax", "code", "offset"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(empty, name, torch.empty_like(tensor, device=device))
        if self.quant_type is not None:
            empty.code = code_4bit(self.quant_type, torch.device(device))
        if self.state2 is not None:
            empty.state2 = self.state2.empty_on(device)
            empty.state2.code = dynamic_map(True, torch.device(device))
        return empty

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Return the state under its checkpoint keys.

        Parameters
        ----------
        packed
            Put everything but the tensors into one uint8 tensor of JSON, which is how checkpoints hold it. A state
            without `quant_type` is never packed.

        Returns
        -------
        dict
            Tensors on their device, the JSON tensor on the CPU. Code tables are copies: they are shared between
            weights, which safetensors refuses to save.
        """
        entries: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": None if self.code is None else self.code.detach().clone(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested and self.state2 is not None:
            nested_code = self.state2.code
            entries |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": None if nested_code is None else nested_code.detach().clone(),
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": 0.0 if self.offset is None else self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return entries
        tensors: dict[str, Any] = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
        values = {k: v for k, v in entries.items() if v is not None and not isinstance(v, Tensor)}
        blob = bytearray(json.dumps(values).encode())
        tensors[f"quant_state.bitsandbytes__{self.quant_type}"] = torch.frombuffer(blob, dtype=torch.uint8).clone()
        return tensors

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str | int) -> QuantState:
        """Build a state from checkpoint entries.

        Parameters
        ----------
        qs_dict
            What :meth:`as_dict` returned, packed or not, or a slice of a state dict; keys may carry any dotted prefix.
            It is left as it is.
        device
            Where the tensors shall be.

        Raises
        ------
        CheckpointError
            If an entry is missing, unknown, of the wrong type, dtype or size, or contradicts another.
        """
        return _Reader(qs_dict).state(cls, device)


def _same_shape(a: Sequence[int] | None, b: Sequence[int] | None) -> bool:
    return (None if a is None else tuple(a)) == (None if b is None else tuple(b))


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    return torch.allclose(a.float(), b.to(a.device).float(), atol=1e-6)


class _Reader:
    """One reading of untrusted checkpoint entries."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.names: dict[str, str] = {}  # last component of a key -> the key, for messages
        self.entries: dict[str, Any] = {}
        blob_key: str | None = None
        for key, value in entries.items():
            if not isinstance(key, str):
                raise CheckpointError(f"checkpoint entry {key!r}: expected a string as key")
            last = key.rpartition(".")[2]
            if "quant_state" in key.split(".")[-2:] and isinstance(value, Tensor):
                if blob_key is not None:
                    raise CheckpointError(f"checkpoint entry `{key}`: a second quant_state beside `{blob_key}`")
                blob_key = key
            elif last not in QuantState.valid_qs_keys:
                raise CheckpointError(f"checkpoint entry `{key}`: no such entry in a 4-bit quantization state")
            elif last in self.entries:
                raise CheckpointError(f"checkpoint entry `{key}`: given twice, also as `{self.names[last]}`")
            else:
                self.names[last], self.entries[last] = key, value
        if blob_key is not None:
            self._unpack(blob_key, entries[blob_key])
        elif "quant_type" not in self.entries:
            raise CheckpointError(
                "checkpoint entry `quant_state.bitsandbytes__*`: expected packed or unpacked quant_state items, "
                "found neither"
            )

    def _unpack(self, key: str, blob: Tensor) -> None:
        suffix = key.rpartition(".")[2]
        if suffix not in QuantState.valid_qs_type_keys:
            raise CheckpointError(
                f"checkpoint entry `{key}`: expected a name that ends in one of {QuantState.valid_qs_type_keys}, "
                f"got {suffix!r}"
            )
        if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.is_meta or not 2 <= blob.numel() <= _BLOB_MAX:
            raise CheckpointError(
                f"checkpoint entry `{key}`: expected JSON as uint8 [2 to {_BLOB_MAX}], got {_describe(blob)}"
            )
        try:
            values = json.loads(blob.cpu().contiguous().numpy().tobytes().decode())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"checkpoint entry `{key}`: not JSON in UTF-8: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"checkpoint entry `{key}`: expected a JSON object, got {type(values).__name__}")
        for name, value in values.items():
            where = f"{key}:{name}"
            if name not in QuantState.valid_qs_keys:
                raise CheckpointError(f"checkpoint entry `{where}`: no such entry in a 4-bit quantization state")
            if name in self.entries:
                raise CheckpointError(f"checkpoint entry `{where}`: given twice, also as `{self.names[name]}`")
            self.names[name], self.entries[name] = where, value
        if f"bitsandbytes__{values.get('quant_type')}" != suffix:
            raise CheckpointError(
                f"checkpoint entry `{key}:quant_type`: expected {suffix.removeprefix('bitsandbytes__')!r} "
                f"as the key says, got {values.get('quant_type')!r}"
            )

    def fail(self, name: str, expected: str, got: object) -> CheckpointError:
        shown = got if isinstance(got, str) else repr(got)
        shown = shown if len(shown) <= 200 else shown[:200] + "…"
        return CheckpointError(f"checkpoint entry `{self.names.get(name, name)}`: expected {expected}, got {shown}")

    def get(self, name: str, expected: str) -> Any:
        if name not in self.entries:
            raise self.fail(name, expected, "nothing: it is missing")
        return self.entries[name]

    def choice(self, name: str, allowed: Sequence[Any]) -> Any:
        expected = "one of " + ", ".join(map(str, allowed))
        value = self.get(name, expected)
        # `True == 1` and 64.0 == 64 must not pass for members of the list.
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise self.fail(name, expected, value)
        return value

    def integers(self, name: str) -> torch.Size:
        expected = "a list of non-negative integers"
        value = self.get(name, expected)
        if not isinstance(value, (list, tuple)) or any(type(n) is not int or not 0 <= n <= _NUMEL_MAX for n in value):
            raise self.fail(name, expected, value)
        if len(value) > 64 or prod(max(n, 1) for n in value) > _NUMEL_MAX:
            raise self.fail(name, f"at most 64 dimensions and {_NUMEL_MAX} elements", value)
        return torch.Size(value)

    def number(self, name: str) -> float:
        value = self.get(name, "a number")
        if type(value) not in (int, float):
            raise self.fail(name, "a number", value)
        try:
            return float(value)
        except OverflowError as error:
            raise self.fail(name, "a number in the range of fp32", "an integer beyond it") from error

    def positive(self, name: str) -> int:
        value = self.get(name, "a positive integer")
        if type(value) is not int or not 0 < value < 2**31:
            raise self.fail(name, "a positive integer", value)
        return value

    def tensor(self, name: str, numel: int | None, dtypes: Sequence[torch.dtype], device: torch.device) -> Tensor:
        expected = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} [{'n' if numel is None else numel}]"
        value = self.get(name, expected)
        if not isinstance(value, Tensor) or value.dtype not in dtypes or numel not in (None, value.numel()):
            raise self.fail(name, expected, _describe(value))
        if value.layout != torch.strided:
            raise self.fail(name, expected, f"layout {value.layout}")
        if value.is_meta and device.type != "meta":
            raise self.fail(name, expected, "a tensor on meta, which has no values")
        value = value.detach().reshape(-1)
        return value.to(device, torch.uint8 if value.dtype == torch.uint8 else torch.float32).contiguous()

    def table(self, name: str, real: Tensor, device: torch.device) -> Tensor:
        """Return a stored code table, or the real one where the stored is only a rounding of it."""
        # Whatever the default dtype of the process was that wrote it.
        dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        stored = self.tensor(name, real.numel(), dtypes, device)
        if stored.is_meta or torch.equal(stored, real):
            return real
        if not bool(((stored - real).abs() <= _TABLE_TOLERANCE).all()):
            raise self.fail(name, "the code table of this quant_type", "another one")
        return real

    def state(self, cls: type[QuantState], device: torch.device | str | int) -> QuantState:
        where = torch.device(device)
        if self.entries.get("quant_type", "") is None:
            return self.blockwise_state(cls, where)
        quant_type = self.choice("quant_type", QUANT_TYPES)
        blocksize = self.choice("blocksize", BLOCK_SIZES)
        dtype = _DTYPES[self.choice("dtype", tuple(_DTYPES))]
        shape = self.integers("shape")
        blocks = -(-prod(shape) // blocksize)
        code = self.table("quant_map", code_4bit(quant_type, where), where)
        nested = [name for name in self.entries if name.startswith("nested_")]
        if not nested:
            absmax = self.tensor("absmax", blocks, _FLOATS, where)
            return cls(absmax, shape, code, blocksize, quant_type, dtype)
        nested_blocksize = self.choice("nested_blocksize", BLOCK_SIZES)
        state2 = cls(
            absmax=self.tensor("nested_absmax", -(-blocks // nested_blocksize), _FLOATS, where),
            code=self.table("nested_quant_map", dynamic_map(True, where), where),
            blocksize=nested_blocksize,
            dtype=_DTYPES[self.choice("nested_dtype", tuple(_DTYPES))],
        )
        absmax = self.tensor("absmax", blocks, (torch.uint8,), where)
        offset = torch.tensor(self.number("nested_offset"), dtype=torch.float32, device=where)
        return cls(absmax, shape, code, blocksize, quant_type, dtype, offset, state2)

    def blockwise_state(self, cls: type[QuantState], where: torch.device) -> QuantState:
        """Return the state of blockwise 8-bit codes, which has a table of its own and is never packed."""
        shape = None if self.entries.get("shape") is None else self.integers("shape")
        dtype = _DTYPES[self.choice("dtype", tuple(_DTYPES))]
        code, blocksize = self.tensor("quant_map", 256, _FLOATS, where), self.positive("blocksize")
        if not any(name.startswith("nested_") for name in self.entries):
            absmax = self.tensor("absmax", None, _FLOATS, where)
            return cls(absmax, shape, code, blocksize, None, dtype)
        absmax = self.tensor("absmax", None, (torch.uint8,), where)
        nested_blocksize = self.positive("nested_blocksize")
        state2 = cls(
            absmax=self.tensor("nested_absmax", -(-absmax.numel() // nested_blocksize), _FLOATS, where),
            code=self.tensor("nested_quant_map", 256, _FLOATS, where),
            blocksize=nested_blocksize,
            dtype=_DTYPES[self.choice("nested_dtype", tuple(_DTYPES))],
        )
        offset = torch.tensor(self.number("nested_offset"), dtype=torch.float32, device=where)
        return cls(absmax, shape, code, blocksize, None, dtype, offset, state2)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
