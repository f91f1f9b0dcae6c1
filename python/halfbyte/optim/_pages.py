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
    from collections.abc import Callable, Sequence

LEAST: Final = 100_000
"""Parameters of fewer elements have ordinary states."""

_BUFFER_BYTES: Final = 64 << 20
_ALIGNMENT: Final = 256


class Pages:
    """Hands out zeroed pieces of managed memory. A buffer, of `least` bytes or more, lives while a piece of it does."""

    def __init__(self, least: int = _BUFFER_BYTES) -> None:
        self._least = least
        self._open: dict[int, tuple[Any, int]] = {}

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a zeroed tensor that the GPU `device` and the CPU both reach; torch takes it for one on the CPU.

        Its attributes ``is_paged`` and ``page_deviceid`` are those that bitsandbytes sets; ``page_buffer`` is the whole
        buffer.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        size = prod(shape) * dtype.itemsize
        buffer, start = self._open.get(index, (None, 0))
        if buffer is None or start + size > self._least:
            buffer, start = _native.PagedBuffer(max(size, self._least), index), 0
        end = start + -(-size // _ALIGNMENT) * _ALIGNMENT
        if end < self._least:
            self._open[index] = buffer, end
        else:
            self._open.pop(index, None)
        piece = torch.frombuffer(buffer, dtype=dtype, count=prod(shape), offset=start).view(tuple(shape))
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
    """Return zeros in managed memory, a tensor that torch takes for one on the CPU.

    Parameters
    ----------
    device
        The GPU that reaches it too. Default: the current one.
    """
    where = torch.device("cuda" if device is None else device)
    return Pages(0).zeros(shape, dtype, where)


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
    _in_place(A, A.fill_, value)


def _mul(A: Tensor, B: Tensor, device: Any = None) -> None:  # noqa: ARG001
    """Multiply a tensor by another in place. `device` is bitsandbytes' and changes nothing."""
    _in_place(A, A.mul_, B)


def _in_place(A: Tensor, change: Callable[[Any], Tensor], value: Any) -> None:
    """Let the host write to a tensor once the GPU has done with it."""
    if is_paged(A):
        torch.cuda.synchronize(A.page_deviceid)  # type: ignore[attr-defined]
    change(value)
