"""What is measured: torch's dense product, bitsandbytes where it is installed, halfbyte."""

from __future__ import annotations

import copy
import importlib
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

import halfbyte
from halfbyte import _dropin
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

PLAIN, DOUBLE = "nf4", "nf4 dq"
"""NF4 with fp32 scales, and with double quantization; block 64 where nothing else is said."""
_NESTED_BLOCK = 256


def weight_bytes(elements: int, form: str, block: int = 64) -> int:
    """Bytes of a weight in memory: bf16, or codes and scales."""
    if form == "bf16":
        return 2 * elements
    scales = -(-elements // block)
    return (elements + 1) // 2 + (4 * scales if form == PLAIN else scales + 4 * -(-scales // _NESTED_BLOCK))


class Peer(ABC):
    """A library, and how its weights are made and multiplied with. `form` is one of its `forms`."""

    name: str
    forms: tuple[str, ...]

    @abstractmethod
    def pack(self, weight: Tensor, form: str) -> Any:
        """Return a weight as :meth:`product` wants it, at an address of its own."""

    @abstractmethod
    def product(self, x: Tensor, packed: Any) -> Tensor:
        """Return ``x · wᵀ``."""

    @abstractmethod
    def layer(self, weight: Tensor, form: str) -> torch.nn.Module:
        """Return a linear layer of that weight."""

    def packs(self, weight: Tensor, form: str, count: int) -> list[Any]:
        """Return copies of a weight. On the CPU they are copied, since bitsandbytes quantizes slowly there."""
        first = self.pack(weight, form)
        if weight.is_cuda:
            return [first, *(self.pack(weight, form) for _ in range(count - 1))]
        return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


class Dense(Peer):
    """torch in bf16: cuBLAS on a GPU."""

    name = "torch"
    forms = ("bf16",)

    def pack(self, weight: Tensor, form: str) -> Any:
        """Return a copy."""
        assert form in self.forms
        return weight.clone()

    def product(self, x: Tensor, packed: Any) -> Tensor:
        """Return ``x · wᵀ``."""
        return torch.nn.functional.linear(x, packed)

    def layer(self, weight: Tensor, form: str) -> torch.nn.Module:
        """Return an ``nn.Linear``."""
        n, k = weight.shape
        made = torch.nn.Linear(k, n, bias=False, device="meta")
        made.weight = torch.nn.Parameter(self.pack(weight, form), requires_grad=False)
        return made


class FourBit(Peer):
    """A library with bitsandbytes' functions."""

    forms = (PLAIN, DOUBLE)

    def __init__(self, name: str, library: Any) -> None:
        self.name = name
        self.library = library
        self.functional = library.functional

    def pack(self, weight: Tensor, form: str, block: int = 64) -> Any:
        """Return packed bytes and state."""
        return self.functional.quantize_4bit(
            weight, quant_type="nf4", blocksize=block, compress_statistics=form == DOUBLE
        )

    def product(self, x: Tensor, packed: Any) -> Tensor:
        """Return ``x · wᵀ`` from the packed weight."""
        codes, state = packed
        product: Tensor = self.library.matmul_4bit(x, codes.t(), state)
        return product

    def layer(self, weight: Tensor, form: str) -> torch.nn.Module:
        """Return a ``Linear4bit``, quantized."""
        n, k = weight.shape
        nn, scales = self.library.nn, {"compress_statistics": form == DOUBLE, "quant_type": "nf4"}
        made: torch.nn.Module = nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, device="meta", **scales)
        made.weight = nn.Params4bit(weight, requires_grad=False, **scales)
        return made.to(weight.device)  # which quantizes


def bitsandbytes() -> Any | None:
    """Return the real bitsandbytes; None if it is absent or broken, or halfbyte stands in for it."""
    if _dropin.is_active() or _dropin.installed_version() is None:
        return None
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # its import runs native code and reads the machine: anything can go wrong
        print(f"bitsandbytes is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def find(names: Sequence[str] | None) -> list[Peer]:
    """Return the peers to measure, in this order: torch, bitsandbytes, halfbyte.

    Parameters
    ----------
    names
        Which; None for all that are there.

    Raises
    ------
    HalfbyteError
        If bitsandbytes is asked for by name and not there.
    """
    found: list[Peer] = [Dense()] if names is None or "torch" in names else []
    if names is None or "bitsandbytes" in names:
        real = bitsandbytes()
        if real is not None:
            found.append(FourBit("bitsandbytes", real))
        elif names is not None:
            raise HalfbyteError("--peers: there is no bitsandbytes here that can be measured")
    if names is None or "halfbyte" in names:
        found.append(FourBit("halfbyte", halfbyte))
    return found
