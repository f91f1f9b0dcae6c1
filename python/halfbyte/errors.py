"""Exceptions of halfbyte.

Each names the argument (or checkpoint entry) at fault, what was expected and what was there, and is raised before
anything is written. All derive from :class:`HalfbyteError` and from the built-in exception a caller would expect.
"""

from __future__ import annotations


class HalfbyteError(Exception):
    """Base of everything halfbyte raises on purpose."""


class ArgumentError(HalfbyteError, ValueError):
    """An argument outside its domain: a block size that does not exist, an unknown quantization type."""


class DtypeError(ArgumentError, TypeError):
    """A tensor of the wrong element type."""


class ShapeError(ArgumentError):
    """Tensors whose sizes do not fit together, or that are not contiguous where they must be."""


class DeviceError(ArgumentError):
    """Tensors of one call on different devices, or on a device that halfbyte does not serve."""


class UnsupportedError(ArgumentError, NotImplementedError):
    """An argument that has a meaning which halfbyte does not implement."""


class CheckpointError(HalfbyteError, ValueError):
    """A checkpoint that is truncated, contradicts itself, or is of another format."""


class FileError(HalfbyteError, OSError):
    """A file or folder that cannot be read or written, or that something stands in the way of."""


class CudaUnavailableError(HalfbyteError, RuntimeError):
    """CUDA was asked for where there is no driver, no GPU, or no CUDA support in this build."""


class UnsupportedGpuError(CudaUnavailableError):
    """A GPU that no kernel image serves, or a driver that is too old for the images."""


class CudaError(HalfbyteError, RuntimeError):
    """A CUDA driver call failed."""
