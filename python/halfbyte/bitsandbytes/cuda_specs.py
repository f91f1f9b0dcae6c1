"""``bitsandbytes.cuda_specs``: what GPUs and which CUDA torch has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = [
    "CUDASpecs",
    "get_compute_capabilities",
    "get_cuda_specs",
    "get_cuda_version_string",
    "get_cuda_version_tuple",
    "get_rocm_gpu_arch",
]


@dataclass(frozen=True)
class CUDASpecs:
    """The newest GPU of the machine, and torch's CUDA version: ``"130"`` and ``(13, 0)``."""

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether the GPU has int8 tensor cores."""
        return self.highest_compute_capability >= (7, 5)


def get_compute_capabilities() -> list[tuple[int, int]]:
    """Return the compute capability of each visible GPU, lowest first."""
    return sorted(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


@lru_cache(None)
def get_cuda_version_tuple() -> tuple[int, int] | None:
    """Return torch's CUDA version, None in a torch without CUDA."""
    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def get_cuda_version_string() -> str | None:
    """Return torch's CUDA version without its dot, None in a torch without CUDA."""
    version = get_cuda_version_tuple()
    return None if version is None else f"{version[0]}{version[1]}"


def get_cuda_specs() -> CUDASpecs | None:
    """Return what there is; None where torch has no CUDA or sees no GPU."""
    version, text = get_cuda_version_tuple(), get_cuda_version_string()
    if version is None or text is None or not torch.cuda.is_available():
        return None
    return CUDASpecs(get_compute_capabilities()[-1], text, version)


def get_rocm_gpu_arch() -> str:
    """Return ``"unknown"``: there are no kernels for ROCm."""
    return "unknown"
