"""The option ``--device``."""

from __future__ import annotations

import torch

from halfbyte.errors import CudaUnavailableError, HalfbyteError


def pick_device(name: str) -> torch.device:
    """Return the device that ``--device`` names: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``, CUDA if there.

    Raises
    ------
    HalfbyteError
        If there is no such device, or halfbyte does not run on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise HalfbyteError(f"--device: there is no device {name!r}; cpu, cuda and cuda:N are known") from None
    if device.type not in ("cpu", "cuda"):
        raise HalfbyteError(f"--device: halfbyte runs on cpu and cuda, not on {device.type}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise CudaUnavailableError("--device: torch finds no CUDA GPU; see `halfbyte doctor`")
        if (device.index or 0) >= torch.cuda.device_count():
            raise HalfbyteError(f"--device: there is no {name}, this machine has {torch.cuda.device_count()} GPU(s)")
        torch.cuda.init()  # type: ignore[no-untyped-call]  # memory statistics cannot be reset before
        device = torch.device("cuda", device.index or 0)
    return device
