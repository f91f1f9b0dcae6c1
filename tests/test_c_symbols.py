"""The C symbols of bitsandbytes' library, called through ctypes as unsloth and axolotl call them."""

import ctypes as ct
import subprocess
import sys
import threading

import pytest
import torch

import halfbyte as hb
from halfbyte import _native
from halfbyte.bitsandbytes.cextension import BNBNativeLibrary, ErrorHandlerMockBNBNativeLibrary, lib
from halfbyte.bitsandbytes.functional import get_ptr
from halfbyte.errors import ArgumentError

F = hb.functional
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FLOATS = list(NAMES)


def stream(device):
    return ct.c_void_p(torch.cuda.current_stream().cuda_stream if device == "cuda" else None)


def quantized(n, dtype, kind, blocksize, device):
    a = torch.randn(n, dtype=dtype, device=device)
    return a, *F.quantize_4bit(a, blocksize=blocksize, quant_type=kind)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "blocksize"), [(1, 64), (63, 32), (4096, 64), (10001, 128), (70000, 4096)])
def test_four_bits_both_ways(device, dtype, kind, n, blocksize):
    a, packed, state = quantized(n, dtype, kind, blocksize, device)
    out, bytes_, absmax = torch.empty_like(a), torch.empty_like(packed), torch.empty_like(state.absmax)
    quantize = getattr(lib, f"cquantize_blockwise_{NAMES[dtype]}_{kind}")
    torch.cuda.synchronize() if device == "cuda" else None  # its stream is the default one
    quantize(None, get_ptr(a), get_ptr(absmax), get_ptr(bytes_), ct.c_int32(blocksize), ct.c_int(n))
    torch.cuda.synchronize() if device == "cuda" else None
    assert torch.equal(bytes_, packed)
    assert torch.equal(absmax, state.absmax)
    dequantize = getattr(lib, f"cdequantize_blockwise_{NAMES[dtype]}_{kind}")
    arguments = (get_ptr(packed), get_ptr(state.absmax), get_ptr(out), ct.c_int(blocksize), ct.c_int(n), stream(device))
    dequantize(None, *arguments)
    assert torch.equal(out, F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "blocksize"), [(1, 256), (1000, 256), (70000, 4096)])
def test_eight_bits_both_ways(device, dtype, n, blocksize):
    a = torch.randn(n, dtype=dtype, device=device)
    code = F.create_dynamic_map().to(device)
    codes, state = F.quantize_blockwise(a, code, blocksize=blocksize)
    bytes_, absmax, out = torch.empty_like(codes), torch.empty_like(state.absmax), torch.empty_like(a)
    torch.cuda.synchronize() if device == "cuda" else None
    getattr(lib, f"cquantize_blockwise_{NAMES[dtype]}")(
        get_ptr(code), get_ptr(a), get_ptr(absmax), get_ptr(bytes_), ct.c_int32(blocksize), ct.c_int(n)
    )
    torch.cuda.synchronize() if device == "cuda" else None
    assert torch.equal(bytes_, codes)
    assert torch.equal(absmax, state.absmax)
    pointers = (get_ptr(code), get_ptr(codes), get_ptr(state.absmax), get_ptr(out))
    getattr(lib, f"cdequantize_blockwise_{NAMES[dtype]}")(*pointers, ct.c_int(blocksize), ct.c_int(n), stream(device))
    assert torch.equal(out, F.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("table", ["shared", "copied"])
def test_the_old_product_of_one_row(device, dtype, kind, table):
    n, k = 96, 320
    _, packed, state = quantized(n * k, dtype, kind, 64, device)
    state.shape = torch.Size((n, k))
    x = torch.randn(1, k, dtype=dtype, device=device)
    code = state.code if table == "shared" else state.code.clone()
    if table == "shared" and device == "cuda":
        from halfbyte._tables import code_4bit

        code = code_4bit(kind, device)
    out = torch.empty(1, n, dtype=dtype, device=device)
    pointers = [get_ptr(t) for t in (x, packed, state.absmax, code, out)]
    sizes = [ct.c_int32(v) for v in (n, (k + 1) // 2, n, 64)]
    multiply = getattr(lib, f"cgemm_4bit_inference_naive_{NAMES[dtype]}")
    multiply(ct.c_int32(n), ct.c_int32(1), ct.c_int32(k), *pointers, *sizes, stream(device))
    assert torch.equal(out, hb.matmul_4bit(x, packed, state))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("m", [1, 5, 70])
def test_the_product(device, dtype, kind, double, has_bias, m):
    n, k = 72, 256
    weight = torch.randn(n, k, dtype=dtype, device=device)
    packed, state = F.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    x = torch.randn(m, k, dtype=dtype, device=device)
    bias = torch.randn(n, dtype=dtype, device=device) if has_bias else None
    out = torch.empty(m, n, dtype=dtype, device=device)
    scales = (state.state2.absmax, state.absmax, state.state2.code, state.offset) if double else (state.absmax,)
    pointers = [get_ptr(t) for t in (x, packed, *scales, *[None] * (4 - len(scales)), out, bias)]
    sizes = [ct.c_int(v) for v in (m, n, k, 64, {"fp4": 1, "nf4": 2}[kind])]
    getattr(lib, f"cgemm_4bit_{NAMES[dtype]}")(*pointers, *sizes, stream(device))
    reference = torch.nn.functional.linear(
        x.double(), F.dequantize_4bit(packed, state).double(), None if bias is None else bias.double()
    )
    # Weights are not rounded to dtype on the way, where dequantizing does it: two roundings of a sum of k products.
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    torch.testing.assert_close(out.double(), reference, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(out, hb.matmul_4bit(x, packed, state, bias=bias), atol=tolerance, rtol=tolerance)


def test_errors_are_exceptions_and_nothing_is_written():
    a, packed, state = quantized(256, torch.float32, "nf4", 64, "cpu")
    out = torch.full_like(a, 7)
    pointers = (None, get_ptr(packed), get_ptr(state.absmax), get_ptr(out))
    dequantize = lib.cdequantize_blockwise_fp32_nf4
    for block, n, message in ((63, 256, "blocksize"), (64, -1, "n: expected"), (-64, 256, "blocksize")):
        with pytest.raises(ArgumentError, match=message):
            dequantize(*pointers, ct.c_int(block), ct.c_int(n), None)
    with pytest.raises(ArgumentError, match="absmax: expected an address"):
        dequantize(None, get_ptr(packed), None, get_ptr(out), ct.c_int(64), ct.c_int(256), None)
    x, code = torch.randn(1, 64), torch.zeros(16)
    arguments = [get_ptr(t) for t in (x, packed, state.absmax, code, out)]
    sizes = [ct.c_int(v) for v in (4, 32, 4, 64)]
    with pytest.raises(ArgumentError, match="code: expected the table of nf4 or fp4"):
        lib.cgemm_4bit_inference_naive_fp32(ct.c_int(4), ct.c_int(1), ct.c_int(64), *arguments, *sizes, None)
    arguments[3] = get_ptr(state.code)
    with pytest.raises(ArgumentError, match="n: expected 1"):
        lib.cgemm_4bit_inference_naive_fp32(ct.c_int(4), ct.c_int(2), ct.c_int(64), *arguments, *sizes, None)
    with pytest.raises(ArgumentError, match="quant_type"):
        lib.cgemm_4bit_fp32(
            *[get_ptr(t) for t in (x, packed, state.absmax, None, None, None, out, None)],
            *[ct.c_int(v) for v in (1, 4, 64, 64, 3)],
            None,
        )
    assert bool((out == 7).all())
    assert _native.take_c_error() is None
    # Nothing to do is no error, whatever the addresses.
    dequantize(None, None, None, None, ct.c_int(64), ct.c_int(0), None)


def test_an_error_belongs_to_the_thread_that_made_it():
    raw = ct.CDLL(_native.__file__).cdequantize_blockwise_fp32_nf4

    def fail():
        assert raw(None, None, None, None, ct.c_int(64), ct.c_int(1), None) == 1

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert _native.take_c_error() is None
    fail()
    with pytest.raises(ArgumentError):
        _native.take_c_error()


def test_what_returns_nothing_still_raises():
    function = BNBNativeLibrary(ct.CDLL(_native.__file__)).cdequantize_blockwise_bf16_nf4
    function.restype = None
    with pytest.raises(ArgumentError):
        function(None, None, None, None, ct.c_int(64), ct.c_int(1), None)


def test_names_that_are_not_there_fail_when_they_are_called():
    with pytest.raises(RuntimeError, match=r"served by halfbyte.*cnothing"):
        lib.cnothing()
    with pytest.raises(RuntimeError, match="no library"):
        ErrorHandlerMockBNBNativeLibrary("no library").cgemm_4bit_fp32()
    assert not hasattr(lib, "__wrapped__")


def test_they_are_exported_from_the_native_module():
    symbols = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({_native.__file__!r}).cgemm_4bit_bf16"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert symbols.returncode == 0, symbols.stderr
