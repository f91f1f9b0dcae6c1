"""Memory for paged states: managed memory, which the driver moves between GPU and host as it is used.

Where states do not fit beside the model, their least used pages lie in host memory until a step needs them. One buffer
holds the states of many parameters: the driver is told what to bring ahead of use, and to tell it costs time a buffer.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST: Final = 100_000
"""Parameters of fewer elements have ordinary states."""

_BUFFER_BYTES: Final = 64 << 20
_ALIGNMENT: Final = 256


class _Memory:
    """A buffer of managed memory, as torch takes it for memory of its GPU; lives while a tensor on it does."""

    def __init__(self, size: int, index: int) -> None:
        self.buffer = _native.PagedBuffer(size, index)
        address = torch.frombuffer(self.buffer, dtype=torch.uint8).data_ptr()
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class Pages:
    """Hands out zeroed pieces of managed memory. A buffer, of `least` bytes or more, lives while a piece of it does."""

    def __init__(self, least: int = _BUFFER_BYTES) -> None:
        self._least = least
        self._open: dict[int, tuple[Tensor, Any, int]] = {}

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a zeroed tensor on a GPU, whose memory the driver may move to the host and back.

        Its attributes ``is_paged`` and ``page_deviceid`` are those that bitsandbytes sets; ``page_buffer`` is the whole
        buffer.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        size = prod(shape) * dtype.itemsize
        whole, buffer, start = self._open.get(index, (None, None, 0))
        if whole is None or start + size > whole.numel():
            memory = _Memory(max(size, self._least, 1), index)
            whole, buffer, start = torch.as_tensor(memory, device=torch.device("cuda", index)), memory.buffer, 0
        end = start + -(-size // _ALIGNMENT) * _ALIGNMENT
        if end < self._least:
            self._open[index] = whole, buffer, end
        else:
            self._open.pop(index, None)
        # Zeros here and not of the whole: this is in the order of the stream that asks for the piece.
        piece: Tensor = whole[start : start + size].view(dtype).view(tuple(shape)).zero_()
        piece.is_paged, piece.page_deviceid, piece.page_buffer = True, index, buffer  # type: ignore[attr-defined]
        return piece


def is_paged(tensor: Any) -> bool:
    """Whether `tensor` is one that :class:`Pages` made."""
    return getattr(tensor, "is_paged", False)


# ---- as bitsandbytes.functional has it


class GlobalPageManager:
    """Paged tensors of the process that :func:`get_paged` was told to keep; see :meth:`get_instance`."""

    _instance: ClassVar[GlobalPageManager | None] = None
    paged_tensors: list[Tensor]

    def __init__(self) -> None:
        raise RuntimeError("GlobalPageManager: call GlobalPageManager.get_instance() instead")

    @classmethod
    def get_instance(cls) -> GlobalPageManager:
        """Return the one instance of the process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget every tensor. Those that an optimizer has are not in the list: they go when it does."""
        self.paged_tensors = []

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Bring every tensor in the list to its GPU, or to the CPU."""
        for tensor in reversed(self.paged_tensors):
            prefetch_tensor(tensor, to_cpu)


def get_paged(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | int | None = None
) -> Tensor:
    """Return zeros in managed memory, as a tensor on the GPU `device`, or the current one."""
    return Pages(0).zeros(shape, dtype, torch.device("cuda" if device is None else device))


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Bring a paged tensor to its GPU, or to the CPU, ahead of its use; asynchronous.

    Raises
    ------
    ArgumentError
        If `A` is not paged.
    """
    if not is_paged(A):
        raise ArgumentError("A: expected a paged tensor, got one in ordinary memory")
    A.page_buffer.prefetch(-1 if to_cpu else A.page_deviceid)  # type: ignore[attr-defined]


def fill(A: Tensor, value: float, device: Any = None, prefetch: bool = True) -> None:  # noqa: ARG001
    """Fill a tensor, paged or not. The last two arguments are bitsandbytes' and change nothing."""
    A.fill_(value)


def _mul(A: Tensor, B: Tensor, device: Any = None) -> None:  # noqa: ARG001
    """Multiply a tensor by another in place. `device` is bitsandbytes' and changes nothing."""
    A.mul_(B)
