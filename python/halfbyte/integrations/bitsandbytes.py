"""halfbyte's kernels inside an installed bitsandbytes.

bitsandbytes calls :func:`halfbyte_backend.register` at the end of its own import, through its entry-point group
``bitsandbytes.backends``. That does nothing unless the environment variable ``HALFBYTE_BACKEND`` is set to something
other than ``0``; then bitsandbytes keeps its modules, functions and files, and its 4-bit and blockwise operations run
here, on CPU and CUDA. Bytes are the same, but for values halfway between two 8-bit codes on CUDA: on the CPU, 8-bit
codes are rounded by way of the levels that bitsandbytes uses.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.integrations._bitsandbytes_ops import IMPLEMENTATIONS

_library: Any = None


def take_over() -> None:
    """Take over the operations of bitsandbytes, which must have defined them. May be called any number of times."""
    global _library
    if _library is not None:
        return
    library: Any = torch.library.Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"(?s).*[Oo]verriding a previously registered kernel"
        )  # that is the point
        for name, run in IMPLEMENTATIONS.items():
            library.impl(name, run, "CUDA", allow_override=True)
            if not (name.startswith("gemv_4bit") and _repacks()):
                library.impl(name, _ON_CPU.get(name, run), "CPU", allow_override=True)
    _library = library


def _repacks() -> bool:
    """Whether bitsandbytes hands its CPU product weights in another order, as it does on some processors."""
    module = sys.modules.get("bitsandbytes.functional")
    asks = getattr(module, "has_avx512bf16", None)
    return asks is None or bool(asks())


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return ops.run_quantize_blockwise(A, code.to(torch.float32).contiguous(), blocksize, grid=True)


_ON_CPU = {"quantize_blockwise": _quantize_blockwise}
