"""The Rust core. Tensors are torch tensors or any object with ``__dlpack__``; outputs are allocated by the caller.

CPU or CUDA is chosen by where the tensors live; CUDA work goes to torch's current stream of that device. Everything is
checked before anything is written; errors are those of :mod:`halfbyte.errors`.
"""

from typing import Any

def quantize_4bit(
    a: Any, packed: Any, absmax: Any, quant_type: str, blocksize: int, scale_search: bool = False
) -> None: ...
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
) -> bool:
    """Write ``x @ w.T + bias`` to `out`. False, and nothing written, where a dense product is the better way."""

def eager_matmul_4bit(x: Any, packed: Any, state: Any, bias: Any | None = None) -> Any | None:
    """Return the product of the plain case; None for any other, and nothing is written then."""

def eager_linear_4bit(layer: Any, x: Any, forward: Any | None = None) -> Any | None:
    """Return the output of a ``Linear4bit`` in the plain case; None for any other, and nothing is written or set then.

    With the class's `forward`, it is the call of the layer that is asked for, and hooks make it another case.
    """

def matmul_4bit_group(x: Any, pieces: list[tuple[Any, ...]], quant_type: str, blocksize: int) -> bool: ...
def matmul_4bit_experts(
    x: Any,
    offsets: Any,
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
def route_experts(index: Any, offsets: Any, order: Any, inverse: Any) -> None: ...
def clear_expert_rows(offsets: Any, out: Any) -> None: ...
def capture_of(device: int, stream: int) -> int: ...
def quantize_blockwise(
    a: Any, code: Any, codes: Any, absmax: Any, blocksize: int, offset: Any | None = None, grid: bool = False
) -> None: ...
def dequantize_blockwise(
    codes: Any, code: Any, absmax: Any, out: Any, blocksize: int, offset: Any | None = None
) -> None: ...
def take_c_error() -> None:
    """Raise the error of this thread's last call of a C symbol, if nobody has taken it."""

def remember_code(address: int, quant_type: str) -> None:
    """Say that the table of a 4-bit type is at `address`, in device memory and for good."""

def code_values(quant_type: str) -> list[float]: ...
def dynamic_map(signed: bool) -> list[float]: ...
def set_num_threads(threads: int) -> None: ...
def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def build_info() -> dict[str, Any]: ...
def cuda_info() -> dict[str, Any]: ...
