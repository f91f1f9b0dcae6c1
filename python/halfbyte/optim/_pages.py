"""Memory for paged states: managed memory, which the driver moves between GPU and host as it is used.

Where states do not fit beside the model, their least used pages lie in host memory until a step needs them. One buffer
holds the states of many parameters: the driver is told what to bring ahead of use, and to tell it costs time a buffer.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from halfbyte import _native

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST: Final = 100_000
"""Parameters of fewer elements have ordinary states."""

_BUFFER_BYTES: Final = 64 << 20
_ALIGNMENT: Final = 256


class Pages:
    """Hands out zeroed pieces of managed memory. A piece lives as long as its tensor."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Any, int]] = {}

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a zeroed tensor that the GPU `device` and the CPU both reach; torch takes it for one on the CPU.

        Its attributes ``is_paged`` and ``page_deviceid`` are those that bitsandbytes sets.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        size = prod(shape) * dtype.itemsize
        buffer, start = self._open.get(index, (None, 0))
        if buffer is None or start + size > _BUFFER_BYTES:
            buffer, start = _native.PagedBuffer(max(size, _BUFFER_BYTES), index), 0
        end = start + -(-size // _ALIGNMENT) * _ALIGNMENT
        if end < _BUFFER_BYTES:
            self._open[index] = buffer, end
        else:
            self._open.pop(index, None)
        piece = torch.frombuffer(buffer, dtype=dtype, count=prod(shape), offset=start).view(tuple(shape))
        return marked(piece, index)


def marked(tensor: Tensor, index: int) -> Tensor:
    """Set on a tensor in managed memory what tells it from one in ordinary memory, and return it."""
    tensor.is_paged = True  # type: ignore[attr-defined]
    tensor.page_deviceid = index  # type: ignore[attr-defined]
    return tensor


def is_paged(tensor: Any) -> bool:
    """Whether `tensor` is one that :class:`Pages` made."""
    return getattr(tensor, "is_paged", False)
