"""CUDA kernels against the CPU, which the Rust tests hold to the scalar reference, and against fp64."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from halfbyte import _native, errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["nf4", "fp4"]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SIZES = [1, 2, 7, 63, 64, 65, 255, 257, 4095, 4096, 4097, 12345, 3 * 4096 + 17, 1 << 18]


def blocks_of(n: int, block: int) -> int:
    return -(-n // block)


def quantize(a: torch.Tensor, kind: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    n = a.numel()
    packed = torch.full(((n + 1) // 2,), 0xA5, dtype=torch.uint8, device=a.device)
    absmax = torch.full((blocks_of(n, block),), -7.0, device=a.device)
    _native.quantize_4bit(a, packed, absmax, kind, block)
    return packed, absmax


def nest(absmax: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Double quantization of scales, with the kernels under test."""
    offset = absmax.mean()
    code = torch.tensor(_native.dynamic_map(True), device=absmax.device)
    codes = torch.empty(absmax.numel(), dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(blocks_of(absmax.numel(), 256), device=absmax.device)
    _native.quantize_blockwise(absmax, code, codes, nested, 256, offset)
    return codes, {"nested_absmax": nested, "nested_code": code, "nested_offset": offset}


def dequantize(packed, absmax, n, kind, block, dtype, **nested):
    out = torch.full((n,), float("nan"), dtype=dtype, device=packed.device)
    _native.dequantize_4bit(packed, absmax, out, kind, block, **nested)
    return out


def to_cpu(nested: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.cpu() for key, value in nested.items()}


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    p = packed.cpu()
    return torch.stack([p >> 4, p & 15], 1).flatten()


def decision_points(kind: str) -> torch.Tensor:
    codes = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], dtype=torch.uint8)
    values = dequantize(codes, torch.ones(1), 16, kind, 64, torch.float32).sort().values
    return ((values[1:] + values[:-1]) / 2).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_quantize_equals_cpu(kind, dtype, block):
    for n in SIZES:
        a = torch.randn(n).to(dtype)
        packed, absmax = quantize(a.cuda(), kind, block)
        want, want_absmax = quantize(a, kind, block)
        assert torch.equal(absmax.cpu(), want_absmax)
        got, want = nibbles(packed), nibbles(want)
        # Allowed to differ: the sign of FP4's zero, and values within an ulp or two of a decision point.
        differs = (got != want)[:n]
        if kind == "fp4":
            differs &= ~((got % 8 == 0) & (want % 8 == 0))[:n]
        scale = absmax.cpu().repeat_interleave(block)[:n]
        from_point = ((a.float() / scale).double()[:, None] - decision_points(kind)).abs().amin(1)
        assert not (differs & (from_point > 2**-21)).any(), n


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_special_values(dtype):
    a = torch.randn(8 * 64).to(dtype)
    a[0:64] = 0
    a[64] = float("nan")
    a[128] = float("inf")
    a[192:256] = torch.finfo(dtype).tiny / 8 if dtype != torch.float16 else 2**-24
    packed, absmax = quantize(a.cuda(), "nf4", 64)
    y = dequantize(packed, absmax, a.numel(), "nf4", 64, torch.float32).cpu()
    assert (y[:64] == 0).all()
    assert y[64:128].isnan().all()
    assert absmax[2].item() == float("inf")
    assert y[192:].isfinite().all()
    assert torch.equal(absmax.cpu().nan_to_num(-1), quantize(a, "nf4", 64)[1].nan_to_num(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_equals_cpu(kind, dtype, nested):
    for block in (32, 64, 4096):
        for n in SIZES:
            packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
            absmax = torch.rand(blocks_of(n, block)) + 0.1
            stats, extra = absmax.cuda(), {}
            if nested:
                stats, extra = nest(stats)
            got = dequantize(packed.cuda(), stats, n, kind, block, dtype, **extra)
            want = dequantize(packed, stats.cpu(), n, kind, block, dtype, **to_cpu(extra))
            assert torch.equal(got.cpu(), want), (block, n)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views(offset, dtype):
    """Tensors that begin anywhere: 16-byte paths must step aside."""
    n = 5000
    a = torch.randn(n + offset).to(dtype)
    on_gpu = a.cuda()[offset:]
    packed, absmax = quantize(on_gpu, "nf4", 64)
    _, want_absmax = quantize(a[offset:].clone(), "nf4", 64)
    assert torch.equal(absmax.cpu(), want_absmax)
    shifted = torch.empty(packed.numel() + offset, dtype=torch.uint8, device="cuda")[offset:]
    shifted.copy_(packed)
    out = torch.empty(n + offset, dtype=dtype, device="cuda")[offset:]
    _native.dequantize_4bit(shifted, absmax, out, "nf4", 64)
    want_out = torch.empty(n, dtype=dtype)
    _native.dequantize_4bit(packed.cpu(), absmax.cpu(), want_out, "nf4", 64)
    assert torch.equal(out.cpu(), want_out)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 7, 64, 100, 256, 4096, 10000])
def test_blockwise_8bit_equals_cpu(signed, dtype, block):
    code = torch.tensor(_native.dynamic_map(signed))
    for n in (1, 5, 255, 256, 257, 4096, 70001):
        a = (torch.randn(n) * torch.exp(torch.randn(n) * 4)).clamp(-6e4, 6e4).to(dtype)
        if not signed:
            a = a.abs()
        for offset in (None, torch.tensor(0.25)):
            results = []
            for device in ("cpu", "cuda"):
                codes = torch.full((n,), 3, dtype=torch.uint8, device=device)
                absmax = torch.full((blocks_of(n, block),), -1.0, device=device)
                shift = None if offset is None else offset.to(device)
                _native.quantize_blockwise(a.to(device), code.to(device), codes, absmax, block, shift)
                out = torch.empty(n, dtype=dtype, device=device)
                _native.dequantize_blockwise(codes, code.to(device), absmax, out, block, shift)
                results.append((codes.cpu(), absmax.cpu(), out.cpu()))
            (c0, s0, y0), (c1, s1, y1) = results
            assert torch.equal(s0, s1)
            off = (c0.int() - c1.int()).abs()
            assert off.max() <= 1 and (off != 0).sum() <= n * 1e-3 + 1
            assert torch.equal(y0[off == 0], y1[off == 0])


def test_blockwise_8bit_any_rising_map():
    """Maps that the search table was not made for: even, with repeated entries, all in one bucket."""
    for code in (
        torch.linspace(-1, 1, 256),
        torch.cat([torch.linspace(-1, 0, 100), torch.zeros(56), torch.linspace(0, 1, 100)]),
        torch.linspace(0.9, 0.91, 256),
    ):
        a = torch.randn(10000)
        found = []
        for device in ("cpu", "cuda"):
            codes = torch.empty(a.numel(), dtype=torch.uint8, device=device)
            absmax = torch.empty(blocks_of(a.numel(), 256), device=device)
            _native.quantize_blockwise(a.to(device), code.to(device), codes, absmax, 256)
            found.append(code[codes.cpu().long()])
        assert (found[0] != found[1]).sum() <= 3


def check_matmul(m, n, k, dtype, kind="nf4", block=64, nested=False, bias=False, seed=0):
    torch.manual_seed(seed)
    w = torch.randn(n, k, device="cuda") * 0.02
    x = torch.randn(m, k, device="cuda").to(dtype)
    b = torch.randn(n, device="cuda").to(dtype) if bias else None
    packed, absmax = quantize(w.flatten(), kind, block)
    extra = {}
    if nested:
        absmax, extra = nest(absmax)
    out = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
    _native.matmul_4bit(x, packed, absmax, out, kind, block, bias=b, **extra)
    dense = dequantize(packed, absmax, n * k, kind, block, torch.float32, **extra).view(n, k).double()
    want = x.double() @ dense.t()
    # What the terms may add up to at the most: the scale that rounding errors are relative to.
    reach = x.double().abs() @ dense.abs().t()
    if bias:
        want = want + b.double()
    error = (out.double() - want).abs()
    eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}[dtype]
    table = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4, torch.float32: 0.0}[dtype]
    limit = eps * want.abs() + (table + 3e-6) * reach / max(k, 1) ** 0.5 * 4 + 1e-6 * reach + 1e-12
    assert out.isfinite().all()
    assert (error <= limit).all(), (m, n, k, dtype, kind, block, nested, float((error / limit).max()))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matmul_shapes(dtype, nested, kind):
    for m in (1, 2, 3, 8, 9, 16, 17, 25, 32):
        for n, k in (
            (16, 64),
            (17, 128),
            (1, 64),
            (100, 192),
            (129, 320),
            (256, 1024),
            (4096, 256),
            (33, 14336),
            (520, 8256),
            (40, 11008),
        ):
            check_matmul(m, n, k, dtype, kind, 64, nested, bias=n % 2 == 0, seed=m * n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_blocks(dtype):
    for block in BLOCKS:
        for n, k in ((48, 4096), (64, 192), (40, 4160)):
            check_matmul(5, n, k, dtype, "nf4", block, nested=block % 128 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_odd_shapes(dtype):
    """K that no kernel likes: rows that begin inside a byte, blocks across rows."""
    for k in (1, 2, 3, 7, 33, 63, 65, 100, 127, 1001):
        for m in (1, 4, 13):
            check_matmul(m, 37, k, dtype, "fp4", 64, nested=False, bias=True)


def test_matmul_large_rows_in_several_passes():
    check_matmul(16, 132 * 16 * 12 + 5, 512, torch.bfloat16)
    check_matmul(8, 132 * 16 * 30, 256, torch.float16, nested=True)


def test_matmul_is_repeatable():
    outs = [check_matmul(7, 4096, 4096, torch.bfloat16, nested=True) for _ in range(3)]
    assert all(torch.equal(outs[0], other) for other in outs[1:])


def test_matmul_of_no_rows_and_of_too_many():
    packed, absmax = quantize(torch.randn(64 * 64, device="cuda"), "nf4", 64)
    empty = torch.empty(0, 64, dtype=torch.bfloat16, device="cuda")
    assert _native.matmul_4bit(empty, packed, absmax, torch.empty_like(empty), "nf4", 64)
    many = torch.empty(1 << 20, 64, device="cuda")
    out = torch.full_like(many, 7.0)
    assert not _native.matmul_4bit(many, packed, absmax, out, "nf4", 64)
    assert (out == 7).all()


def test_devices_must_agree():
    packed, absmax = quantize(torch.randn(64 * 64, device="cuda"), "nf4", 64)
    out = torch.zeros(64 * 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(errors.DeviceError, match="absmax: expected device cuda:0, got cpu"):
        _native.dequantize_4bit(packed, absmax.cpu(), out, "nf4", 64)
    assert (out == 0).all()


def test_runs_on_the_current_stream():
    """A kernel queued behind a slow one on a side stream must see what that one wrote."""
    side = torch.cuda.Stream()
    a = torch.randn(1 << 16, device="cuda")
    want, _ = quantize(a, "nf4", 64)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        b = torch.zeros_like(a)
        torch.cuda._sleep(200_000_000)
        b.copy_(a)
        got, _ = quantize(b, "nf4", 64)
    side.synchronize()
    assert torch.equal(got, want)


def test_captured_in_a_graph():
    w = torch.randn(256 * 512, device="cuda")
    packed, absmax = quantize(w, "nf4", 64)
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(4, 256, device="cuda", dtype=torch.bfloat16)
    _native.matmul_4bit(x, packed, absmax, out, "nf4", 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _native.matmul_4bit(x, packed, absmax, out, "nf4", 64)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = out.clone()
        _native.matmul_4bit(x, packed, absmax, out, "nf4", 64)
        assert torch.equal(replayed, out)


@pytest.mark.parametrize("rows", [1, 8, 16, 48, 128])
def test_kernels_that_overlap_see_what_came_before(rows):
    """A product may start while the kernel before it ends; it must not miss fresh weights or activations."""
    size, rounds = 1024, 24
    torch.manual_seed(0)
    weights = torch.randn(rounds, size * size, device="cuda", dtype=torch.bfloat16) / size**0.5
    packed = torch.empty(size * size // 2, dtype=torch.uint8, device="cuda")
    absmax = torch.empty(size * size // 64, device="cuda")
    start = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
    outs = torch.empty(rounds, rows, size, device="cuda", dtype=torch.bfloat16)

    def chain(wait):
        x = start
        for weight, out in zip(weights, outs, strict=True):
            _native.quantize_4bit(weight, packed, absmax, "nf4", 64)
            for to in (torch.empty_like(out), out):  # the second reads what the first wrote
                wait()
                _native.matmul_4bit(x, packed, absmax, to, "nf4", 64)
                x = to
            wait()

    chain(torch.cuda.synchronize)
    want = outs.clone()
    assert want.isfinite().all()
    assert want.abs().amax(dim=(1, 2)).min() > 0
    for _ in range(5):
        outs.zero_()
        chain(lambda: None)
        assert torch.equal(outs, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for _ in range(5):
        outs.zero_()
        graph.replay()
        assert torch.equal(outs, want)


def test_first_use_inside_a_capture():
    """Images are loaded at first use, which may be while a graph is being captured."""
    program = """
import torch
from halfbyte import _native
w = torch.randn(64 * 128, device="cuda")
x = torch.randn(4, 128, device="cuda", dtype=torch.bfloat16)
packed = torch.empty(64 * 64, dtype=torch.uint8, device="cuda")
absmax = torch.empty(128, device="cuda")
out = torch.zeros(4, 64, dtype=torch.bfloat16, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    _native.quantize_4bit(w, packed, absmax, "nf4", 64)
    _native.matmul_4bit(x, packed, absmax, out, "nf4", 64)
graph.replay()
torch.cuda.synchronize()
dense = torch.empty(64, 128, device="cuda")
_native.dequantize_4bit(packed, absmax, dense, "nf4", 64)
assert torch.allclose(out.float(), x.float() @ dense.t(), atol=0.3, rtol=0.02) and out.abs().max() > 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_other_devices_than_the_current_one():
    w = torch.randn(64 * 128)
    want, want_absmax = quantize(w.cuda(), "nf4", 64)
    for current, device in ((0, 1), (1, 0), (1, 1)):
        with torch.cuda.device(current):
            got, absmax = quantize(w.to(f"cuda:{device}"), "nf4", 64)
            x = torch.randn(4, 128, device=f"cuda:{device}", dtype=torch.bfloat16)
            out = torch.empty(4, 64, device=f"cuda:{device}", dtype=torch.bfloat16)
            _native.matmul_4bit(x, got, absmax, out, "nf4", 64)
            assert torch.cuda.current_device() == current
            torch.empty(1, device="cuda").add_(1)  # torch itself still works where it thinks it is
            assert torch.equal(got.cpu(), want.cpu())
            assert torch.equal(absmax.cpu(), want_absmax.cpu())
            dense = dequantize(got.cpu(), absmax.cpu(), 64 * 128, "nf4", 64, torch.float32).view(64, 128)
            assert torch.allclose(out.cpu().float(), x.cpu().float() @ dense.t(), atol=0.3, rtol=0.02)


def test_threads_share_kernels():
    """First use from many threads at once, each on a stream of its own."""
    w = torch.randn(512 * 512, device="cuda")
    want, _ = quantize(w, "fp4", 128)
    torch.cuda.synchronize()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                got, _ = quantize(w, "fp4", 128)
                torch.cuda.current_stream().synchronize()
                if not torch.equal(got, want):
                    wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.alone
def test_more_than_two_to_the_31_elements():
    n = (1 << 31) + (1 << 20)
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of device memory")
    a = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    for i in range(0, n, 1 << 28):
        a[i : i + (1 << 28)].normal_()
    packed, absmax = quantize(a, "nf4", 64)
    tail = a[-(1 << 20) :].clone()
    want, want_absmax = quantize(tail, "nf4", 64)
    assert torch.equal(packed[-(1 << 19) :], want)
    assert torch.equal(absmax[-(1 << 14) :], want_absmax)
    out = torch.empty_like(a)
    _native.dequantize_4bit(packed, absmax, out, "nf4", 64)
    assert torch.equal(out[-(1 << 20) :], dequantize(want, want_absmax, 1 << 20, "nf4", 64, torch.bfloat16))
    k = 1 << 14
    rows = n // k
    x = torch.randn(2, k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(2, rows, device="cuda", dtype=torch.bfloat16)
    _native.matmul_4bit(x, packed, absmax, y, "nf4", 64)
    dense = out[-64 * k :].view(64, k).double()
    assert torch.allclose(y[:, -64:].double(), x.double() @ dense.t(), rtol=0.02, atol=1.0)
