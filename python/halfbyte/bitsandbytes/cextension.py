"""``bitsandbytes.cextension``: the native library, for packages that call its C functions through :mod:`ctypes`.

The functions are exported by halfbyte's own native module, with bitsandbytes' names and arguments: the families
``cquantize_blockwise_*``, ``cdequantize_blockwise_*``, ``cgemm_4bit_inference_naive_*`` and ``cgemm_4bit_*``. They take
pointers of the host as well as of a GPU. One that fails raises an error of :mod:`halfbyte.errors`.
"""

from __future__ import annotations

import ctypes as ct
import logging
from pathlib import Path
from typing import Any, NoReturn

import torch

from halfbyte import _native
from halfbyte._dropin import SERVED_VERSION

from .consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR
from .cuda_specs import CUDASpecs, get_cuda_specs, get_cuda_version_tuple, get_rocm_gpu_arch

__all__ = [
    "BNB_BACKEND",
    "DYNAMIC_LIBRARY_SUFFIX",
    "HIP_ENVIRONMENT",
    "PACKAGE_DIR",
    "ROCM_GPU_ARCH",
    "BNBNativeLibrary",
    "CUDASpecs",
    "CudaBNBNativeLibrary",
    "ErrorHandlerMockBNBNativeLibrary",
    "get_available_cuda_binary_versions",
    "get_cuda_bnb_library_path",
    "get_cuda_specs",
    "get_cuda_version_tuple",
    "get_native_library",
    "get_rocm_gpu_arch",
    "lib",
    "parse_cuda_version",
]

logger = logging.getLogger("bitsandbytes.cextension")

HIP_ENVIRONMENT = False
ROCM_GPU_ARCH = get_rocm_gpu_arch()
BNB_BACKEND = "CUDA" if torch.cuda.is_available() else "CPU"


class BNBNativeLibrary:
    """The C functions as attributes.

    A name that the library does not have is a function that raises RuntimeError when it is called.
    """

    _lib: ct.CDLL
    compiled_with_cuda = False

    def __init__(self, lib: ct.CDLL) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._lib, name, None) if name.startswith("c") else None
        if function is None:
            if name.startswith("__"):
                raise AttributeError(name)
            return _missing(
                f"bitsandbytes {SERVED_VERSION} is served by halfbyte here, whose library has no function {name!r}"
            )
        function.errcheck = _raise_error
        setattr(self, name, function)
        return function


class CudaBNBNativeLibrary(BNBNativeLibrary):
    """The C functions, with kernels for CUDA behind them."""

    compiled_with_cuda = True


class ErrorHandlerMockBNBNativeLibrary(BNBNativeLibrary):
    """Stands for a library that could not be loaded: every function raises RuntimeError with `error_msg`."""

    def __init__(self, error_msg: str) -> None:
        self.error_msg = error_msg

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(self.error_msg)


def _missing(message: str) -> Any:
    def function(*args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG001
        raise RuntimeError(message)

    return function


def _raise_error(result: Any, function: Any, arguments: tuple[Any, ...]) -> Any:  # noqa: ARG001
    if result != 0:  # None, where someone has said that it returns nothing
        _native.take_c_error()
    return result


def get_cuda_bnb_library_path(cuda_specs: CUDASpecs) -> Path:  # noqa: ARG001
    """Return where the native library is: one file for every GPU and every CUDA version."""
    return Path(_native.__file__)


def get_available_cuda_binary_versions() -> list[str]:
    """Return the CUDA versions that there are libraries for: none, since the one there is needs none in particular."""
    return []


def parse_cuda_version(version_str: str) -> str:
    """Return ``"12.4"`` for ``"124"``, and what is no number as it is."""
    return f"{version_str[:-1]}.{version_str[-1]}" if version_str.isdigit() and len(version_str) > 1 else version_str


def get_native_library() -> BNBNativeLibrary:
    """Open the native library."""
    kind = CudaBNBNativeLibrary if _native.build_info()["cuda"] else BNBNativeLibrary
    return kind(ct.CDLL(_native.__file__))


lib = get_native_library()
