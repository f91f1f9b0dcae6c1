"""The Rust core. Tensors are torch tensors or any object with ``__dlpack__``; outputs are allocated by the caller.

CPU or CUDA is chosen by where the tensors live; CUDA work goes to torch's current stream of that device. Everything is
checked before anything is written; errors are those of :mod:`halfbyte.errors`.
"""

from typing import Any

MATMUL_4BIT_MAX_M: int
"""Most rows of ``x`` that :func:`matmul_4bit` takes on CUDA."""

def quantize_4bit(a: Any, packed: Any, absmax: Any, quant_type: str, blocksize: int) -> None: ...
def quantize_4bit_search(a: Any, packed: Any, absmax: Any, quant_type: str, blocksize: int) -> None: ...
def encode_4bit(
    a: Any,
    packed: Any,
    absmax: Any,
    quant_type: str,
    blocksize: int,
    nested_absmax: Any | None = None,
    nested_code: Any | None = None,
    nested_offset: Any | None = None,
    nested_blocksize: int = 256,
) -> None: ...
def dequantize_4bit(
    packed: Any,
    absmax: Any,
    out: Any,
    quant_type: str,
    blocksize: int,
    nested_absmax: Any | None = None,
    nested_code: Any | None = None,
    nested_offset: Any | None = None,
    nested_blocksize: int = 256,
) -> None: ...
def matmul_4bit(
    x: Any,
    packed: Any,
    absmax: Any,
    out: Any,
    quant_type: str,
    blocksize: int,
    bias: Any | None = None,
    nested_absmax: Any | None = None,
    nested_code: Any | None = None,
    nested_offset: Any | None = None,
    nested_blocksize: int = 256,
) -> None: ...
def quantize_blockwise(
    a: Any, code: Any, codes: Any, absmax: Any, blocksize: int, offset: Any | None = None, grid: bool = False
) -> None: ...
def dequantize_blockwise(
    codes: Any, code: Any, absmax: Any, out: Any, blocksize: int, offset: Any | None = None
) -> None: ...
def code_values(quant_type: str) -> list[float]: ...
def dynamic_map(signed: bool) -> list[float]: ...
def set_num_threads(threads: int) -> None: ...
def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def build_info() -> dict[str, Any]: ...
def cuda_info() -> dict[str, Any]: ...
