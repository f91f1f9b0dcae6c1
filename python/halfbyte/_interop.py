"""Tensors of other libraries: taken through DLPack, given back the same way."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.errors import DtypeError

if TYPE_CHECKING:
    from collections.abc import Callable


def to_torch(value: Any, name: str) -> Tensor:
    """Return a torch view of `value`: itself, a NumPy array, or any object with ``__dlpack__``.

    Raises
    ------
    DtypeError
        If it is none of these, or of an element type that torch or DLPack does not have.
    """
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__dlpack__"):
        raise DtypeError(f"{name}: expected a torch tensor or an object with __dlpack__, got {type(value).__name__}")
    try:
        if type(value).__module__ == "numpy":
            # Not DLPack: NumPy exports no read-only arrays. What comes in here is only read.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                return torch.from_numpy(value)
        tensor: Tensor = torch.utils.dlpack.from_dlpack(value)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise DtypeError(f"{name}: torch cannot take this {type(value).__name__}: {error}") from error
    return tensor


def giver_back(value: Any) -> Callable[[Tensor], Any]:
    """Return what turns a torch tensor into one of the library that `value` is from.

    Objects that do not say their library (``__array_namespace__``) get torch tensors. The function raises DtypeError
    for an element type that the library does not have: bfloat16 in NumPy.
    """
    if isinstance(value, Tensor) or not hasattr(value, "__array_namespace__"):
        return _as_is
    library = value.__array_namespace__()

    def give_back(tensor: Tensor) -> Any:
        try:
            return library.from_dlpack(tensor.detach())
        except (TypeError, ValueError, BufferError, RuntimeError) as error:
            raise DtypeError(f"result: {library.__name__} cannot take a tensor of {tensor.dtype}: {error}") from error

    return give_back


def _as_is(tensor: Tensor) -> Tensor:
    return tensor
