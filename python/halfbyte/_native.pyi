"""The Rust core. Tensors are torch tensors or any object with ``__dlpack__``; outputs are allocated by the caller.

CPU or CUDA is chosen by where the tensors live; CUDA work goes to torch's current stream of that device. Everything is
checked before anything is written; errors are those of :mod:`halfbyte.errors`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

class Conversion:
    """A conversion of a checkpoint. Constructors plan it; nothing is written before the first :meth:`next`."""

    @staticmethod
    def quantize(
        source: Path,
        destination: Path,
        scheme: str,
        *,
        double_quant: bool,
        blocksize: int,
        scale_search: bool,
        storage: str,
        dtype: str | None,
        compute_dtype: str | None,
        skip: Callable[[str], bool],
        stacked_experts: bool,
        shard_size: int,
        existing: str,
        device: str,
    ) -> Conversion: ...
    @staticmethod
    def dequantize(
        source: Path, destination: Path, *, dtype: str | None, shard_size: int, existing: str
    ) -> Conversion: ...
    def items(self) -> list[tuple[str, str, str, list[int], int]]:
        """Return name, action, reason or dtype, shape and bytes of each item."""
    def next(self) -> int | None:
        """Return the number of the item to convert now; None after the last."""
    def convert(self, mean: Callable[[bytes], float]) -> None: ...
    def read(self, out: Any) -> None: ...
    def write(self, parts: list[tuple[str, str, bytes]]) -> None: ...
    def finish(self) -> tuple[int, int, int]:
        """Write what is no tensor; return files, bytes read and bytes written."""

def inspect_checkpoint(path: Path) -> list[dict[str, Any]]: ...
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

def matmul_4bit_gated(
    x: Any,
    packed: Any,
    absmax: Any,
    out: Any,
    quant_type: str,
    blocksize: int,
    gate: str,
    bias: Any | None = None,
    nested_absmax: Any | None = None,
    nested_code: Any | None = None,
    nested_offset: Any | None = None,
    nested_blocksize: int = 256,
) -> bool:
    """Write ``gate(a) * b`` of the halves of ``x @ w.T + bias``. False, and nothing written, where it takes two."""

def gate(a: Any, out: Any, gate: str) -> None:
    """Write ``gate(a[..., :N]) * a[..., N:]`` to `out`, on CUDA."""

def settle_4bit(packed: int, settled: bool) -> None: ...
def read_next_4bit(packed: int, following: Sequence[tuple[int, int, int]] | None, most: int) -> None: ...
def matmul_4bit_large(
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
    tokens: int = 0,
    blocks: int = 0,
) -> bool:
    """Do :func:`matmul_4bit` by the CUDA kernel for many rows, whatever M.

    Return False, with nothing written, where it does not fit. For tests and measurements: `tokens` of a tile (128, 256)
    and `blocks` of threads that have the tiles, of which they share some along K, are the plan's where 0.
    """

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
def int8_quantize_rows(x: Any, q: Any, stats: Any, threshold: float = 0.0, outliers: Any | None = None) -> None: ...
def int8_zero_columns(q: Any, outliers: Any) -> None: ...
def int8_outlier_columns(outliers: Any, columns: Any, count: Any) -> None: ...
def int8_outlier_bitmap(columns: Any, outliers: Any, k: int) -> None: ...
def int8_column_stats(x: Any, stats: Any, threshold: float = 0.0) -> None: ...
def int8_quantize_columns(x: Any, stats: Any, q: Any, threshold: float = 0.0) -> None: ...
def int8_matmul_int32(a: Any, b: Any, out: Any) -> None: ...
def int8_matmul(
    q: Any,
    row_stats: Any,
    w: Any,
    col_stats: Any,
    out: Any,
    bias: Any | None = None,
    x: Any | None = None,
    outliers: Any | None = None,
) -> None: ...
def int8_mm_dequant(acc: Any, row_stats: Any, col_stats: Any, out: Any, bias: Any | None = None) -> None: ...
def int8_dequantize_rows(q: Any, stats: Any, out: Any) -> None: ...
def int8_linear_workspace(x: Any, n: int, threshold: float) -> int:
    """Return the bytes of workspace that ``int8_linear`` wants; 0 on the CPU."""

def int8_linear(
    x: Any,
    w: Any,
    col_stats: Any,
    out: Any,
    workspace: Any | None = None,
    bias: Any | None = None,
    threshold: float = 0.0,
) -> None: ...
def int8_levels() -> list[str]: ...
def eager_linear_int8(layer: Any, x: Any, forward: Any | None = None) -> Any | None:
    """Return the output of a ``Linear8bitLt`` in the plain case; None for any other, and nothing is written then.

    With the class's `forward`, it is the call of the layer that is asked for, and hooks make it another case.
    """

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
def cuda_kernels(device: int) -> list[tuple[str, str, bool]]: ...

class OptimPlan:
    """Parameters of one device that are updated together, and their states: kept by reference, read at every step."""

    def __init__(
        self, rule: str, params: list[Any], states: list[dict[str, Any]], capturable: bool = False
    ) -> None: ...
    def step(
        self,
        lr: Any,
        beta1: float = 0.9,
        beta2: float = 0.999,
        beta3: float = 0.0,
        alpha: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> int: ...

def optim_grad_norm(plans: list[OptimPlan], out: Any, grads: list[Any] | None = None) -> None: ...
def same_items(kept: list[Any], now: Any) -> bool: ...
def same_values(kept: list[Any], now: Any) -> bool: ...
def all_filled(dicts: list[Any]) -> bool: ...

class PagedBuffer:
    """Managed memory, which holds anything at first, with the buffer protocol; freed when the last user lets go."""

    def __init__(self, nbytes: int, device: int) -> None: ...
    def prefetch(self, device: int) -> None: ...
