"""LLM.int8's kernels against what they mean, in fp64: every product exact, every size class, outliers or none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte import _native

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Rounding of the output, and for fp32 the order of sums.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 3e-6}
# Rows: each kernel's tiles, full and not. Columns: whole stages, a part of one, and what only bytes can be read of.
ROWS = [1, 4, 5, 16, 17, 64, 100, 129, 300]
SHAPES = [(m, n, k) for m in ROWS for n, k in ((333, 1040), (130, 2064), (7, 99))]
SHAPES += [
    (16, 14336, 4096),
    (1, 4096, 14336),
    (5, 4096, 16384),
    (33, 48, 128),
    (257, 4096, 4096),
    (2100, 1000, 512),
    (7, 33000, 256),
]


def rows(x: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, statistics and the bitmap of outlier columns."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.int8, device="cuda")
    stats = torch.empty(m, device="cuda")
    outliers = torch.full((-(-k // 32),), -1, dtype=torch.int32, device="cuda")
    _native.int8_quantize_rows(x, codes, stats, threshold, outliers if threshold > 0 else None)
    return codes, stats, outliers


def bits(outliers: torch.Tensor, k: int) -> torch.Tensor:
    """The bitmap as booleans ``[k]``."""
    at = torch.arange(k, device="cuda")
    return (outliers[at // 32] >> (at % 32) & 1).bool()


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def activations(m: int, k: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Values below 6 but for one or more in each of so many columns."""
    x = torch.randn(m, k, device="cuda").clamp(-5.9, 5.9)
    at = torch.randperm(k, device="cuda")[:columns]
    x[torch.randint(0, m, (columns,), device="cuda"), at] = torch.randn(columns, device="cuda").sign() * 40
    return x.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_exact(shape):
    m, n, k = shape
    a, b = integers(m, k), integers(n, k)
    out = torch.full((m, n), -7, dtype=torch.int32, device="cuda")
    _native.int8_matmul_int32(a, b, out)
    assert torch.equal(out.double(), a.double() @ b.double().T)


def test_products_of_unaligned_codes_are_exact():
    a, b = integers(40 * 256 + 1)[1:].view(40, 256), integers(70 * 256 + 3)[3:].view(70, 256)
    out = torch.empty(40, 70, dtype=torch.int32, device="cuda")
    _native.int8_matmul_int32(a, b, out)
    assert torch.equal(out.double(), a.double() @ b.double().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 40, 99, 499, 1024, 4096, 14336, 40000])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_rows_are_what_the_formula_says(k, threshold, dtype):
    x = (torch.randn(37, k, device="cuda") * 2.5).to(dtype)
    codes, stats, outliers = rows(x, threshold)
    wide = x.float()
    out = wide.abs() >= threshold if threshold else torch.zeros_like(wide, dtype=torch.bool)
    kept = wide.masked_fill(out, 0)
    absmax = kept.abs().amax(1)
    assert torch.equal(stats, absmax)
    exact = kept.double() * 127 / absmax.double().clamp(min=1e-30)[:, None]
    # To the nearest, but for what an approximate division does to ties.
    assert ((codes.double() - exact).abs() <= 0.5 + 1e-4).all()
    assert (codes[out] == 0).all()
    if threshold:
        assert torch.equal(bits(outliers, k), out.any(0))


def test_rows_that_are_not_numbers_make_products_that_are_not():
    x = torch.randn(5, 256, device="cuda")
    x[1, 3], x[2, 4], x[3] = float("nan"), float("inf"), 0
    x[4] *= 1e-39
    codes, stats, _ = rows(x)
    assert stats[1].isnan() and stats[2].isinf() and stats[3] == 0
    assert not codes[1:4].any() and codes[4].abs().max() == 127
    w, column_stats = integers(64, 256), torch.ones(64, device="cuda")
    for rows_of_x in (x[:4], x[[4, 1, 2, 3]], x.repeat(8, 1)):  # one launch, and several
        out = layer(rows_of_x.contiguous(), w, column_stats)
        assert out[1:3].isnan().all() and (out[3] == 0).all() and out[0].isfinite().all()


def test_infinite_outliers_reach_the_product_as_they_are():
    x = torch.randn(3, 256, device="cuda").clamp(-5, 5)
    x[1, 7] = float("inf")
    w = integers(64, 256)
    w[:, 7] = torch.where(w[:, 7] == 0, 1, w[:, 7])
    for m in (3, 40):
        out = layer(x.repeat(m // 3 + 1, 1)[:m].contiguous(), w, torch.ones(64, device="cuda"), threshold=6.0)
        assert torch.equal(out[1], w[:, 7].float().sign() * float("inf")) and out[0].isfinite().all()


def layer(x, w, column_stats, bias=None, threshold=0.0):
    """The whole layer."""
    out = torch.full((x.shape[0], w.shape[0]), float("nan"), dtype=x.dtype, device="cuda")
    size = _native.int8_linear_workspace(x, w.shape[0], threshold)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    _native.int8_linear(x, w, column_stats, out, workspace, bias, threshold)
    return out


def multiplied_itself(x, columns):
    """Whether a layer leaves x as it is, in all columns: where many have outliers, for 16 bits on Hopper."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    return hopper and columns > 32 and x.shape[0] > 4 and x.shape[1] % 16 == 0 and x.dtype != torch.float32


def expected(x, w, column_stats, bias, threshold):
    """What a layer gives, in fp64: codes for columns without outliers, the values themselves for the others."""
    codes, stats, outliers = rows(x, threshold)
    values = codes.double() * stats.double()[:, None] / 127
    if threshold:
        mixed = bits(outliers, x.shape[1])
        values[:, mixed] = x.double()[:, mixed]
        if multiplied_itself(x, mixed.sum()):
            values = x.double()
    return values @ w.double().T * column_stats.double() / 127 + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layers(shape, dtype):
    m, n, k = shape
    w, column_stats = integers(n, k), torch.rand(n, device="cuda") + 0.5
    bias = torch.randn(n, device="cuda").to(dtype)
    for columns, threshold in ((0, 0.0), (0, 6.0), (1, 6.0), (max(1, k * 7 // 100), 6.0), (k, 6.0)):
        x = activations(m, k, columns, dtype)
        out = layer(x, w, column_stats, bias, threshold)
        wanted = expected(x, w, column_stats, bias, threshold)
        # What is left of 16-bit x beside its code is rounded to 16 bits too; columns of fp32 are added one by one.
        limit = TOLERANCE[dtype] * (max(1.0, columns**0.5 / 8) if dtype == torch.float32 else 1)
        scale = wanted.abs().amax(1, keepdim=True)
        assert ((out.double() - wanted).abs() <= limit * (wanted.abs() + scale / 4)).all(), (columns, threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 96, 512), (40, 333, 1040), (300, 1000, 512), (3, 17, 99)], ids=str)
def test_scaled_products(shape, dtype):
    m, n, k = shape
    w, column_stats, bias = integers(n, k), torch.rand(n, device="cuda") + 0.5, torch.randn(n, device="cuda").to(dtype)
    x = activations(m, k, 9, dtype)
    codes, stats, outliers = rows(x, 6.0)
    wanted = expected(x, w, column_stats, bias, 6.0)
    zeroed = codes.clone()
    _native.int8_zero_columns(zeroed, outliers)
    mixed = bits(outliers, k)
    assert not zeroed[:, mixed].any() and torch.equal(zeroed[:, ~mixed], codes[:, ~mixed])
    for q in (codes, zeroed):
        for floats in (x, x.float()):  # the second is not of the output's type
            out = torch.empty(m, n, dtype=dtype, device="cuda")
            _native.int8_matmul(q, stats, w, column_stats, out, bias, floats, outliers)
            error = (out.double() - wanted).abs() / (wanted.abs() + wanted.abs().amax() / 8)
            assert error.max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [15, 16, 17, 31, 32, 33, 34])
@pytest.mark.parametrize("m", [5, 16, 40, 129, 700])
def test_around_the_number_of_columns_that_are_gathered(m, columns, dtype):
    w, column_stats = integers(200, 1104), torch.rand(200, device="cuda") + 0.5
    bias = torch.randn(200, device="cuda").to(dtype)
    x = torch.randn(m, 1104, device="cuda").clamp(-5, 5)
    x[m // 2, torch.randperm(1104)[:columns].cuda()] = 9.0
    x = x.to(dtype)
    out = layer(x, w, column_stats, bias, 6.0)
    wanted = expected(x, w, column_stats, bias, 6.0)
    scale = wanted.abs().amax(1, keepdim=True)
    assert ((out.double() - wanted).abs() <= TOLERANCE[dtype] * (wanted.abs() + scale / 4)).all()
    assert torch.equal(out, layer(x, w, column_stats, bias, 6.0))


def test_results_are_equal_from_run_to_run_and_in_graphs():
    for m in (1, 16, 128, 700):
        w, column_stats = integers(1024, 2048), torch.rand(1024, device="cuda")
        x = activations(m, 2048, 20, torch.bfloat16)
        graph, kept = torch.cuda.CUDAGraph(), x.clone()
        layer(kept, w, column_stats, None, 6.0)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = layer(kept, w, column_stats, None, 6.0)
        for columns in (0, 3, 20, 2048, 1):
            x = activations(m, 2048, columns, torch.bfloat16)
            kept.copy_(x)
            graph.replay()
            once = layer(x, w, column_stats, None, 6.0)
            assert torch.equal(once, out) and torch.equal(once, layer(x, w, column_stats, None, 6.0))


def test_bf16_activations_of_any_size_stay_finite():
    for m in (2, 64):
        x = torch.randn(m, 512, device="cuda").bfloat16() * 1e5
        out = layer(x, integers(64, 512), torch.ones(64, device="cuda"))
        assert out.isfinite().all() and out.abs().max() > 65504


def test_columns_and_back():
    for dtype in DTYPES:
        x = (torch.randn(300, 77, device="cuda") * 3).to(dtype)
        x[:, 5] = 0
        stats, codes = torch.empty(77, device="cuda"), torch.empty(300, 77, dtype=torch.int8, device="cuda")
        for threshold in (0.0, 6.0):
            _native.int8_column_stats(x, stats, threshold)
            _native.int8_quantize_columns(x, stats, codes, threshold)
            kept = x.float().masked_fill(x.float().abs() >= threshold, 0) if threshold else x.float()
            assert torch.equal(stats, kept.abs().amax(0))
            exact = kept.double() * 127 / stats.double().clamp(min=1e-30)
            slack = 0.08 if dtype == torch.float16 else 1e-4  # fp16 rounds x · 127
            assert ((codes.double() - exact).abs() <= 0.5 + slack).all()
        codes, stats, _ = rows(x)
        out = torch.empty(300, 77, dtype=dtype, device="cuda")
        _native.int8_dequantize_rows(codes, stats, out)
        assert torch.equal(out, (codes.float() * stats[:, None] * (1 / 127)).to(dtype))
        sums, w_stats, bias = (
            torch.randint(-(1 << 20), 1 << 20, (300, 77), dtype=torch.int32, device="cuda"),
            stats[:77],
            x[0],
        )
        _native.int8_mm_dequant(sums, stats, w_stats, out, bias)
        wanted = sums.double() * stats.double()[:, None] * w_stats.double() / 127**2 + bias.double()
        torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=1e-2 * TOLERANCE[dtype] * 1e4)


def test_bitmaps_and_lists():
    k = 1000
    wanted = torch.randperm(k, device="cuda")[:300]
    outliers = torch.full((32,), -1, dtype=torch.int32, device="cuda")
    _native.int8_outlier_bitmap(torch.cat([wanted, torch.tensor([-1, k], device="cuda")]), outliers, k)
    assert torch.equal(bits(outliers, k).nonzero()[:, 0], wanted.sort().values)
    columns, count = torch.empty(k, dtype=torch.int64, device="cuda"), torch.empty(1, dtype=torch.int32, device="cuda")
    _native.int8_outlier_columns(outliers, columns, count)
    assert torch.equal(columns[: count.item()], wanted.sort().values)


COMPARED = """
import bitsandbytes, torch
from test_cuda_int8 import _native, bits, rows

assert "halfbyte" not in bitsandbytes.__file__
theirs_of = bitsandbytes.functional.int8_vectorwise_quant
torch.manual_seed(0)
for k in (512, 4096, 8192):
    for scale in (1e-3, 1.0, 300.0):
        x = (torch.randn(256, k, device="cuda") * scale).half()
        codes, stats, _ = rows(x)
        theirs, their_stats, _ = theirs_of(x)
        assert torch.equal(codes, theirs) and torch.equal(stats, their_stats)
        codes, stats, outliers = rows(x, 3.0)
        _native.int8_zero_columns(codes, outliers)
        theirs, their_stats, columns = theirs_of(x, threshold=3.0)
        assert torch.equal(codes, theirs) and torch.equal(stats, their_stats)
        found = bits(outliers, k).nonzero()[:, 0]
        assert torch.equal(found, columns if columns is not None else found[:0])
print("compared")
"""


@pytest.mark.skipif("HALFBYTE_BITSANDBYTES_PATH" not in os.environ, reason="HALFBYTE_BITSANDBYTES_PATH is not set")
def test_bytes_are_those_of_bitsandbytes():
    """In a process of its own: in this one its name may be halfbyte's by now."""
    package = Path(_native.__file__).parents[1]
    path = [os.environ["HALFBYTE_BITSANDBYTES_PATH"], str(package), str(Path(__file__).parent)]
    env = os.environ | {"HALFBYTE_NO_DROPIN": "1", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", COMPARED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.endswith("compared\n"), done.stderr
