"""``bitsandbytes.diagnostics.cuda``: the GPUs, as text."""

from __future__ import annotations

from halfbyte import _native
from halfbyte.errors import HalfbyteError

from ..cextension import HIP_ENVIRONMENT, get_cuda_bnb_library_path
from ..cuda_specs import CUDASpecs
from .utils import print_dedented

__all__ = [
    "HIP_ENVIRONMENT",
    "CUDASpecs",
    "get_cuda_bnb_library_path",
    "print_dedented",
    "print_diagnostics",
    "print_runtime_diagnostics",
]


def print_diagnostics(cuda_specs: CUDASpecs) -> None:
    """Print torch's CUDA version and the newest GPU."""
    major, minor = cuda_specs.highest_compute_capability
    print(f"CUDA of torch: {cuda_specs.cuda_version_tuple[0]}.{cuda_specs.cuda_version_tuple[1]}")
    print(f"Highest compute capability: {major}.{minor}")
    print_runtime_diagnostics()


def print_runtime_diagnostics() -> None:
    """Print the driver, and which kernels each GPU uses. No CUDA library besides the driver's is needed."""
    try:
        info = _native.cuda_info()
    except HalfbyteError as error:
        print(f"CUDA: {error}")
        return
    print(f"CUDA of the driver: {info['driver_cuda']}")
    for device in info["devices"]:
        print(f"{device['name']}: compute capability {device['capability']}, kernels {device['images']}")
