"""``prefetch_linears``: what a 4-bit product fetches into the GPU's L2 for the product after it.

Between two layers of a decoder a GPU's memory has little to do: norms, rotations, activations and attention of a few
tokens read next to nothing. A kernel that knows which weight will be read next asks the L2 for the begin of it once it
has asked for all that it reads itself. A hint that is wrong costs time, never a result.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from halfbyte import _native
from halfbyte.errors import ArgumentError
from halfbyte.nn.linear4bit import Linear4bit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

MOST_BYTES: Final = 12 * 2**20
"""How much is fetched ahead: what memory delivers between two products, and a quarter of an H200's L2."""

# Builds without CUDA lack them.
_read_next: Any = getattr(_native, "read_next_4bit", None)
_settle: Any = getattr(_native, "settle_4bit", None)


def prefetch_linears(model: nn.Module, most_bytes: int = MOST_BYTES) -> int:
    """Let each 4-bit layer of a decoder fetch the begin of the next one's weight while it ends.

    Parameters
    ----------
    model
        A module with quantized :class:`~halfbyte.nn.Linear4bit` layers on a GPU, defined in the order in which they
        run, as models of transformers are.
    most_bytes
        How much a layer fetches at most, in bytes; 0 undoes it.

    Returns
    -------
    int
        Number of layers that fetch for another.

    Raises
    ------
    ArgumentError
        If `most_bytes` is negative.

    Notes
    -----
    For decoding (up to 16 rows) in CUDA graphs on GPUs of compute capability 9.0 and later; elsewhere nothing happens.
    Results are the same, bit for bit. It holds for the weights as they are: call it again when they have been moved or
    quantized anew.

    Examples
    --------
    >>> import halfbyte
    >>> layers = [halfbyte.nn.LinearNF4(64, 64, bias=False) for _ in range(2)]
    >>> halfbyte.prefetch_linears(torch.nn.Sequential(*layers).to("cpu"))  # not on a GPU
    0
    """
    if most_bytes < 0:
        raise ArgumentError(f"most_bytes: expected 0 or more, got {most_bytes}")
    order = Order(most_bytes)
    made = 0
    for layer in model.modules():
        weight: Any = layer.weight if isinstance(layer, Linear4bit) else None
        state = getattr(weight, "quant_state", None)
        if state is not None:
            made += order.add(weight, state.absmax, state.shape[0])
    return made


def _when_gone(tensors: Iterable[Tensor], call: Any, *arguments: Any) -> None:
    """Call when the first of these is gone, and again with each other, but not when the interpreter ends."""
    for tensor in tensors:
        weakref.finalize(tensor, call, *arguments).atexit = False


class Order:
    """Weights in the order in which they are multiplied: each is told what comes after it.

    Parameters
    ----------
    most_bytes
        How much is fetched ahead at most.
    settled
        Whether nothing on the GPU writes these weights any more: products then read them while the kernel ahead still
        runs.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, *, settled: bool = False) -> None:
        self.most_bytes = most_bytes
        self.settled = settled
        self._last: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies begin anew: vLLM sends its configuration to other processes."""
        return partial(Order, settled=self.settled), (self.most_bytes,)

    def add(self, packed: Tensor, scales: Tensor, rows: int) -> bool:
        """Let a weight of `rows` rows be fetched by products with the one before it.

        Parameters
        ----------
        packed, scales
            Its codes and its scales (or their codes), row by row.
        rows
            N of ``[N, K]``.

        Returns
        -------
        bool
            Whether there is one before it, on the same GPU.
        """
        last = self._last() if self._last is not None else None
        self._last = weakref.ref(packed)
        if self.settled and _settle is not None and packed.device.type == "cuda":
            _settle(packed.data_ptr(), True)
            _when_gone((packed, scales), _settle, packed.data_ptr(), False)
        if last is None or _read_next is None or last.device != packed.device or packed.device.type != "cuda":
            return False
        most = min(self.most_bytes, torch.cuda.get_device_properties(packed.device).L2_cache_size // 4)
        address = last.data_ptr()
        _read_next(address, [(t.data_ptr(), rows, t.nbytes // rows) for t in (packed, scales)], most)
        # Whichever of them goes first: its memory may be anybody's then.
        _when_gone((last, packed, scales), _read_next, address, None, 0)
        return most > 0

    def end(self) -> None:
        """Let nothing be fetched by products with the last weight."""
        self._last = None
