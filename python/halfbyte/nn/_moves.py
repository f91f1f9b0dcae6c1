"""What parameters that are quantized when they move have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch


class MovingParameter(torch.nn.Parameter):
    """A parameter whose ``to`` does more than move: each other way to a device ends there."""

    if TYPE_CHECKING:

        def to(self, *args: Any, **kwargs: Any) -> Self: ...

    def cpu(self) -> Self:  # type: ignore[override]
        """Move to the CPU; see :meth:`to`."""
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int | None = None, non_blocking: bool = False) -> Self:  # type: ignore[override]
        """Move to a CUDA device, by default the current one; see :meth:`to`."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device: torch.device | str | int | None = None, non_blocking: bool = False) -> Self:  # type: ignore[override]
        """Move to an XPU device; see :meth:`to`. There is no kernel for it: a float weight is refused."""
        return self.to(device="xpu" if device is None else device, non_blocking=non_blocking)
