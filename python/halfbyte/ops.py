"""Every ``torch.ops.halfbyte`` operation: schema, implementation, fake and autograd.

The functions named ``run_*`` are the implementations. Eager code calls them directly when :func:`is_eager` allows,
which saves the dispatcher's few microseconds; everything that traces, transforms or needs a gradient goes through the
ops.
All tensors of a call are on one device, CPU or CUDA; CUDA work goes to torch's current stream.

==========================  ==========================================================================================
``quantize_4bit``           float tensor → packed ``[⌈⌈n/2⌉ / itemsize⌉, 1]``, absmax fp32 ``[nblocks]``
``quantize_4bit_search``    the same with scales by least squared error, which may be negative
``encode_4bit``             float tensor, its packed codes and statistics → codes chosen again, for those statistics
``dequantize_4bit``         packed and statistics → float tensor of `shape`
``matmul_4bit``             ``A [..., K]`` × packed ``[N, K]``ᵀ + bias → ``[..., N]``; gradient to `A` and `bias`
``matmul_4bit_grad_input``  ``grad [..., N]`` × packed ``[N, K]`` → ``[..., K]``; the backward of the one above
``quantize_blockwise``      float tensor → uint8 codes of its shape, absmax fp32 ``[nblocks]``
``dequantize_blockwise``    codes and statistics → float tensor of the codes' shape
==========================  ==========================================================================================

Nested statistics (double quantization) are four trailing arguments: with them `absmax` is uint8 codes, and the scale of
block i is ``nested_code[absmax[i]] * nested_absmax[i // nested_blocksize] + nested_offset``.
"""

# ruff: noqa: ARG001  # fakes and autograd functions take what their op takes
from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from halfbyte import _native
from halfbyte._tables import BLOCK_SIZES, FLOAT_DTYPES, NESTED_BLOCKSIZE, QUANT_TYPES, STORAGE_DTYPES
from halfbyte.errors import ArgumentError, DeviceError, DtypeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

_library = torch.library.Library("halfbyte", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


PLAIN_TENSORS: Final[set[type]] = {Tensor, torch.nn.Parameter}
"""Types whose memory is what it says. Other subclasses may wrap, fake or shard; they go through the dispatcher."""

_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_tracing_state: Callable[[], Any] = torch._C._get_tracing_state


def is_eager(tensor: Tensor) -> bool:
    """Whether `tensor` is real memory that no tracer, mode or function transform is watching."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and type(tensor) in PLAIN_TENSORS
        and (tensor.is_cuda or tensor.is_cpu)
        and _dispatch_modes() == 0
        and not _functorch_active()
        and forward_ad._current_level < 0
        and _tracing_state() is None
    )


# ---- checks, also run by the fakes, so that compiled code raises what eager code raises


def check_blocksize(blocksize: int) -> None:
    """Raise ArgumentError unless `blocksize` is one of the 4-bit block sizes."""
    if blocksize not in BLOCK_SIZES:
        raise ArgumentError(f"blocksize: expected one of {', '.join(map(str, BLOCK_SIZES))}, got {blocksize}")


def check_quant_type(quant_type: str) -> None:
    """Raise ArgumentError unless the kernels know `quant_type`."""
    if quant_type not in QUANT_TYPES:
        raise ArgumentError(f"quant_type: expected one of {', '.join(map(repr, QUANT_TYPES))}, got {quant_type!r}")


def check_dtype(name: str, dtype: torch.dtype | None, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Raise DtypeError naming argument `name` unless `dtype` is allowed."""
    if dtype not in allowed:
        raise DtypeError(f"{name}: expected dtype {' or '.join(str(d) for d in allowed)}, got {dtype}")


def check_device(name: str, tensor: Tensor) -> None:
    """Raise an error naming argument `name` unless `tensor` is dense and on the CPU, on CUDA or on meta."""
    check_strided(name, tensor)
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise DeviceError(f"{name}: expected a tensor on cpu or cuda, got one on {tensor.device}")


def check_strided(name: str, tensor: Tensor) -> None:
    """Raise ArgumentError naming argument `name` if `tensor` is sparse or of another layout without strides."""
    if tensor.layout != torch.strided:
        raise ArgumentError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def check_packed(name: str, packed: Tensor, shape: Sequence[int]) -> None:
    """Raise an error naming argument `name`, or the shape, unless `packed` can hold the weights of `shape`.

    To be called before anything of that shape is allocated.
    """
    if any(not isinstance(n, (int, torch.SymInt)) for n in shape):
        raise ArgumentError(f"quant_state.shape: expected integers, got {shape!r}")
    if any(n < 0 for n in shape):
        raise ShapeError(f"quant_state.shape: expected no negative size, got {list(shape)}")
    check_dtype(name, packed.dtype, STORAGE_DTYPES)
    check_strided(name, packed)
    needed = (prod(shape) + 1) // 2
    stored = packed.numel() * packed.itemsize
    if stored < needed:
        raise ShapeError(f"{name}: expected {needed} packed bytes for shape {list(shape)}, got {stored}")


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ShapeError(f"shape: expected the [N, K] of a matrix, got {list(shape)}")
    return shape[0], shape[1]


def _check_matmul(name: str, x: Tensor, outer: int, inner: int, bias: Tensor | None) -> None:
    check_dtype(name, x.dtype)
    if x.dim() < 1 or x.shape[-1] != inner:
        raise ShapeError(f"{name}: expected shape [..., {inner}], got {list(x.shape)}")
    if bias is not None:
        if bias.dtype != x.dtype:
            raise DtypeError(f"bias: expected dtype {x.dtype} like {name}, got {bias.dtype}")
        if bias.dim() != 1 or bias.shape[0] != outer:
            raise ShapeError(f"bias: expected shape [{outer}], got {list(bias.shape)}")


def _sync_threads() -> None:
    """Let CPU kernels use as many threads as torch does."""
    _native.set_num_threads(torch.get_num_threads())


# ---- quantize_4bit

_define(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
)


def empty_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Check the arguments and return what the result is written to."""
    check_dtype("A", A.dtype)
    check_blocksize(blocksize)
    check_quant_type(quant_type)
    check_dtype("quant_storage", quant_storage, STORAGE_DTYPES)
    n = A.numel()
    packed_bytes = (n + 1) // 2
    rows = (packed_bytes + quant_storage.itemsize - 1) // quant_storage.itemsize
    packed = torch.empty((rows, 1), dtype=quant_storage, device=A.device)
    absmax = torch.empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32, device=A.device)
    return packed, absmax


def run_quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize a float tensor; see the module's table."""
    packed, absmax = empty_4bit(A, blocksize, quant_type, quant_storage)
    quantize_4bit_into(A, packed, absmax, quant_type, blocksize)
    return packed, absmax


def quantize_4bit_into(
    A: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, scale_search: bool = False
) -> None:
    """Quantize into given contiguous tensors. Bytes of `packed` beyond ``⌈n/2⌉`` become 0."""
    n = A.numel()
    if n == 0:
        return
    if A.is_cpu:
        _sync_threads()
    _native.quantize_4bit(A.contiguous(), packed, absmax, quant_type, blocksize, scale_search)
    used = (n + 1) // 2
    if packed.numel() * packed.itemsize > used:
        packed.view(-1).view(torch.uint8)[used:].zero_()


# ---- quantize_4bit_search, encode_4bit

_NESTED = "Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? nested_offset=None, int nested_blocksize=256"

_define(
    "quantize_4bit_search(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
)
_define(
    f"encode_4bit(Tensor A, Tensor B, Tensor absmax, int blocksize, str quant_type, {_NESTED}) -> Tensor",
)


def run_quantize_4bit_search(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize a float tensor with scales by least squared error; see the module's table."""
    packed, absmax = empty_4bit(A, blocksize, quant_type, quant_storage)
    quantize_4bit_into(A, packed, absmax, quant_type, blocksize, scale_search=True)
    return packed, absmax


def run_encode_4bit(
    A: Tensor,
    B: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> Tensor:
    """Choose codes again; see the module's table. Those of blocks whose scale is 0 or not finite stay as in `B`."""
    check_dtype("A", A.dtype)
    check_blocksize(blocksize)
    check_quant_type(quant_type)
    check_packed("B", B, A.shape)
    packed = B.clone(memory_format=torch.contiguous_format)
    encode_4bit_into(
        A, packed, absmax, quant_type, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize
    )
    return packed


def encode_4bit_into(
    A: Tensor,
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> None:
    """Choose codes in a given contiguous tensor again. Those of blocks whose scale is 0 or not finite stay."""
    if A.numel() == 0:
        return
    if A.is_cpu:
        _sync_threads()
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    _native.encode_4bit(A.contiguous(), packed, absmax, quant_type, blocksize, *nested)


# ---- dequantize_4bit

_define(
    "dequantize_4bit(Tensor B, Tensor absmax, int blocksize, str quant_type, SymInt[] shape, ScalarType dtype, "
    f"{_NESTED}) -> Tensor",
)


def run_dequantize_4bit(
    B: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> Tensor:
    """Dequantize to a new tensor; see the module's table."""
    check_dtype("dtype", dtype)
    check_packed("A", B, shape)
    out = torch.empty(tuple(shape), dtype=dtype, device=B.device)
    dequantize_4bit_into(
        B, absmax, out, blocksize, quant_type, nested_absmax, nested_code, nested_offset, nested_blocksize
    )
    return out


def dequantize_4bit_into(
    B: Tensor,
    absmax: Tensor,
    out: Tensor,
    blocksize: int,
    quant_type: str,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> None:
    """Dequantize into a given contiguous tensor, whose dtype and size say what is wanted."""
    check_blocksize(blocksize)
    check_quant_type(quant_type)
    if out.numel() == 0:
        return
    if B.is_cpu:
        _sync_threads()
    _native.dequantize_4bit(
        B.contiguous(),
        absmax,
        out,
        quant_type,
        blocksize,
        nested_absmax,
        nested_code,
        nested_offset,
        nested_blocksize,
    )


# ---- matmul_4bit and its backward

_define(
    "matmul_4bit(Tensor A, Tensor B, SymInt[] shape, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    f"{_NESTED}) -> Tensor",
)
_define(
    "matmul_4bit_grad_input(Tensor grad, Tensor B, SymInt[] shape, Tensor absmax, int blocksize, str quant_type, "
    f"{_NESTED}) -> Tensor",
)


def run_matmul_4bit(
    A: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply by a packed weight; see the module's table. `out` is contiguous, of A's dtype and ``[..., N]``."""
    n, k = _matrix(shape)
    _check_matmul("A", A, n, k, bias)
    A = A.contiguous()
    statistics = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    product = A.new_empty((*A.shape[:-1], n)) if out is None else out
    if k == 0:
        return product.zero_() if bias is None else product.copy_(bias.expand_as(product))
    if not product.numel():
        return product
    # On the CPU, packed bytes are faster for any number of rows. 4096², two cores with AVX2, against dequantizing and
    # F.linear: 1.8 ms to 37 for one row, 28 to 61 for 128, 205 to 226 for 1024 in fp32; 27 to 217 for 128 in bf16.
    if A.is_cpu:
        _sync_threads()
    B = B.contiguous()
    contiguous_bias = None if bias is None else bias.contiguous()
    if _native.matmul_4bit(A, B, absmax, product, quant_type, blocksize, contiguous_bias, *statistics):
        return product
    del product  # its memory is free for the dense one
    weight = run_dequantize_4bit(B, absmax, blocksize, quant_type, (n, k), A.dtype, *statistics)
    with _no_autocast(A), _exact_fp32(A):
        dense = F.linear(A, weight, bias)
    return dense if out is None else out.copy_(dense)


def run_matmul_4bit_grad_input(
    grad: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> Tensor:
    """Multiply by the weight itself, not its transpose; see the module's table."""
    n, k = _matrix(shape)
    _check_matmul("grad", grad, k, n, None)
    statistics = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    dtype = _dense_dtype(grad)
    weight = run_dequantize_4bit(B, absmax, blocksize, quant_type, (n, k), dtype, *statistics)
    with _no_autocast(grad), _exact_fp32(weight):
        return torch.matmul(grad.contiguous().to(dtype), weight).to(grad.dtype)


def _dense_dtype(x: Tensor) -> torch.dtype:
    """Return what to multiply `x` by a dense weight in: fp32 on CPUs that have no instructions for half precision."""
    return torch.float32 if x.is_cpu and not _cpu_has_half() else x.dtype


@cache
def _cpu_has_half() -> bool:
    tests = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(test is not None and test() for test in tests)


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from changing the dtype of an operation inside an op, whose fake knows nothing of it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@contextmanager
def _exact_fp32(x: Tensor) -> Iterator[None]:
    """Let fp32 products be fp32: no TF32 (nor bf16, on the CPU) however the process is set."""
    flags: Any = torch.backends.cuda.matmul if x.is_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = flags.fp32_precision
    if x.dtype != torch.float32 or before == "ieee":  # "none" is whatever the process has for everything
        yield
        return
    flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = before


# ---- quantize_blockwise, dequantize_blockwise

_define(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize, Tensor? offset=None, bool grid=False) "
    "-> (Tensor, Tensor)",
)
_define(
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, "
    "Tensor? offset=None) -> Tensor",
)


def empty_blockwise(A: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Check the arguments and return what the result is written to."""
    check_dtype("A", A.dtype)
    if blocksize < 1:
        raise ArgumentError(f"blocksize: expected a positive number, got {blocksize}")
    codes = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    absmax = torch.empty(((A.numel() + blocksize - 1) // blocksize,), dtype=torch.float32, device=A.device)
    return codes, absmax


def run_quantize_blockwise(
    A: Tensor, code: Tensor, blocksize: int, offset: Tensor | None = None, grid: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize ``A - offset`` to 8 bits; see the module's table. `grid` is that of ``_native.quantize_blockwise``."""
    codes, absmax = empty_blockwise(A, blocksize)
    quantize_blockwise_into(A, code, codes, absmax, blocksize, offset, grid)
    return codes, absmax


def quantize_blockwise_into(
    A: Tensor,
    code: Tensor,
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    offset: Tensor | None = None,
    grid: bool = False,
) -> None:
    """Quantize to 8 bits into given contiguous tensors."""
    if A.numel() == 0:
        return
    if A.is_cpu:
        _sync_threads()
    _native.quantize_blockwise(A.contiguous(), code, codes, absmax, blocksize, offset, grid)


def run_dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, offset: Tensor | None = None
) -> Tensor:
    """Dequantize 8-bit codes; see the module's table."""
    check_dtype("dtype", dtype)
    out = torch.empty(A.shape, dtype=dtype, device=A.device)
    dequantize_blockwise_into(A, absmax, code, out, blocksize, offset)
    return out


def dequantize_blockwise_into(
    A: Tensor, absmax: Tensor, code: Tensor, out: Tensor, blocksize: int, offset: Tensor | None = None
) -> None:
    """Dequantize 8-bit codes into a given contiguous tensor."""
    if out.numel() == 0:
        return
    if A.is_cpu:
        _sync_threads()
    _native.dequantize_blockwise(A.contiguous(), code, absmax, out, blocksize, offset)


# ---- registration

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": run_quantize_4bit,
    "quantize_4bit_search": run_quantize_4bit_search,
    "encode_4bit": run_encode_4bit,
    "dequantize_4bit": run_dequantize_4bit,
    "matmul_4bit": run_matmul_4bit,
    "matmul_4bit_grad_input": run_matmul_4bit_grad_input,
    "quantize_blockwise": run_quantize_blockwise,
    "dequantize_blockwise": run_dequantize_blockwise,
}
for _name, _run in _IMPLEMENTATIONS.items():
    _library.impl(_name, _run, "CPU")  # type: ignore[no-untyped-call]
    _library.impl(_name, _run, "CUDA")  # type: ignore[no-untyped-call]


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    register: Callable[[Callable[..., Any]], Callable[..., Any]]
    register = torch.library.register_fake(f"halfbyte::{name}", lib=_library)
    return register


@_fake("quantize_4bit")
def _(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    return empty_4bit(A, blocksize, quant_type, quant_storage)


_fake("quantize_4bit_search")(empty_4bit)


@_fake("encode_4bit")
def _(A: Tensor, B: Tensor, absmax: Tensor, blocksize: int, quant_type: str, *nested: Any) -> Tensor:
    check_dtype("A", A.dtype)
    check_blocksize(blocksize)
    check_quant_type(quant_type)
    check_packed("B", B, A.shape)
    return torch.empty_like(B, memory_format=torch.contiguous_format)


@_fake("dequantize_4bit")
def _(
    B: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, *nested: Any
) -> Tensor:
    check_blocksize(blocksize)
    check_quant_type(quant_type)
    check_dtype("dtype", dtype)
    return torch.empty(tuple(shape), dtype=dtype, device=B.device)


@_fake("matmul_4bit")
def _(
    A: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    *nested: Any,
) -> Tensor:
    check_blocksize(blocksize)
    check_quant_type(quant_type)
    n, k = _matrix(shape)
    _check_matmul("A", A, n, k, bias)
    return torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device)


@_fake("matmul_4bit_grad_input")
def _(
    grad: Tensor, B: Tensor, shape: Sequence[int], absmax: Tensor, blocksize: int, quant_type: str, *nested: Any
) -> Tensor:
    n, k = _matrix(shape)
    _check_matmul("grad", grad, k, n, None)
    return torch.empty((*grad.shape[:-1], k), dtype=grad.dtype, device=grad.device)


@_fake("quantize_blockwise")
def _(
    A: Tensor, code: Tensor, blocksize: int, offset: Tensor | None = None, grid: bool = False
) -> tuple[Tensor, Tensor]:
    return empty_blockwise(A, blocksize)


@_fake("dequantize_blockwise")
def _(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, offset: Tensor | None = None
) -> Tensor:
    check_dtype("dtype", dtype)
    return torch.empty(A.shape, dtype=dtype, device=A.device)


# ---- autograd: gradients go through the matmul to A and bias, and nowhere else. The packed weight and its statistics
# are saved through save_for_backward, as they are; a dense weight exists only inside the backward op.


def _save(ctx: Any, B: Tensor, absmax: Tensor, nested: Sequence[Any]) -> None:
    nested_absmax, nested_code, nested_offset, ctx.nested_blocksize = nested
    ctx.save_for_backward(B, absmax, nested_absmax, nested_code, nested_offset)


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, B, shape, absmax, blocksize, quant_type, bias, *nested = inputs
    ctx.shape, ctx.blocksize, ctx.quant_type, ctx.has_bias = shape, blocksize, quant_type, bias is not None
    if ctx.needs_input_grad[0]:
        _save(ctx, B, absmax, nested)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_A = grad_bias = None
    if ctx.needs_input_grad[0]:
        B, absmax, nested_absmax, nested_code, nested_offset = ctx.saved_tensors
        grad_A = torch.ops.halfbyte.matmul_4bit_grad_input.default(
            grad,
            B,
            ctx.shape,
            absmax,
            ctx.blocksize,
            ctx.quant_type,
            nested_absmax,
            nested_code,
            nested_offset,
            ctx.nested_blocksize,
        )
    if ctx.has_bias and ctx.needs_input_grad[6]:
        grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
    return (grad_A, None, None, None, None, None, grad_bias, None, None, None, None)


def _grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, B, shape, absmax, blocksize, quant_type, *nested = inputs
    ctx.shape, ctx.blocksize, ctx.quant_type = shape, blocksize, quant_type
    _save(ctx, B, absmax, nested)


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    B, absmax, nested_absmax, nested_code, nested_offset = ctx.saved_tensors
    grad_grad = torch.ops.halfbyte.matmul_4bit.default(
        grad,
        B,
        ctx.shape,
        absmax,
        ctx.blocksize,
        ctx.quant_type,
        None,
        nested_absmax,
        nested_code,
        nested_offset,
        ctx.nested_blocksize,
    )
    return (grad_grad, *[None] * 9)


def _no_gradient(inputs: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Autograd of an op that gives none: its outputs require no gradient, whatever goes in."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return (None,) * inputs

    return backward, setup


_register = torch.library.register_autograd
_register("halfbyte::matmul_4bit", _matmul_backward, setup_context=_matmul_setup, lib=_library)
_register("halfbyte::matmul_4bit_grad_input", _grad_input_backward, setup_context=_grad_input_setup, lib=_library)
for _name, _inputs in (
    ("quantize_4bit", 4),
    ("quantize_4bit_search", 4),
    ("encode_4bit", 9),
    ("dequantize_4bit", 10),
    ("quantize_blockwise", 5),
    ("dequantize_blockwise", 6),
):
    _backward, _setup = _no_gradient(_inputs)
    _register(f"halfbyte::{_name}", _backward, setup_context=_setup, lib=_library)
