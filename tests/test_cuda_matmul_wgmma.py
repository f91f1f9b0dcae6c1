"""Products of many rows on a GPU: every number of tokens a block takes, K split in a cluster, ragged edges."""

from __future__ import annotations

import pytest
import torch
from cuda_products import CODES, HALVES, HOSTILE, error, exact_weight, hostile_weight, weight

import halfbyte
from halfbyte.functional import dequantize_4bit, quantize_4bit

pytestmark = pytest.mark.gpu

# One number of rows of x for each kernel, its neighbours, and more rows than one row of blocks takes.
ROWS = [9, 16, 17, 32, 33, 64, 65, 100, 128]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("n", "k"), [(128, 256), (4096, 4096), (100, 64), (130, 192), (513, 1088), (1024, 14336), (7, 8192)]
)
@pytest.mark.parametrize(("kind", "block", "nested"), CODES)
def test_every_kernel(n, k, kind, block, nested, dtype):
    torch.manual_seed(0)
    packed, state = quantize_4bit(weight(n, k, dtype), quant_type=kind, blocksize=block, compress_statistics=nested)
    # The kernel's weights are at least as near to this as those rounded to 16 bits, which bitsandbytes multiplies with.
    exact = exact_weight(packed, state)
    for rows in ROWS:
        x = torch.randn(rows, k, device="cuda", dtype=dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype) if rows % 2 else None
        out = halfbyte.matmul_4bit(x, packed.t(), state, bias=bias)
        assert (out.shape, out.dtype) == ((rows, n), dtype)
        assert error(out, x, exact, bias) < (2.5e-3 if dtype == torch.bfloat16 else 4e-4), rows
        assert torch.equal(out, halfbyte.matmul_4bit(x, packed.t(), state, bias=bias))


@pytest.mark.parametrize("rows", [16, 48, 128])
@pytest.mark.parametrize("case", HOSTILE)
def test_no_worse_than_a_dense_product(case, rows):
    torch.manual_seed(1)
    n, k = 384, 2048
    packed, state = quantize_4bit(
        hostile_weight(case, n, k, torch.bfloat16), quant_type="nf4", compress_statistics=False
    )
    dense = dequantize_4bit(packed, state)
    exact = exact_weight(packed, state)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    out = halfbyte.matmul_4bit(x, packed.t(), state)
    theirs = error(torch.nn.functional.linear(x, dense), x, exact)
    assert error(out, x, exact) <= theirs * 1.05 + 1e-7


def test_nothing_beyond_the_edges_is_read_or_written():
    """Rows of x and of the output that are not this product's hold NaN and stay as they are."""
    torch.manual_seed(2)
    n, k, rows = 200, 320, 37
    packed, state = quantize_4bit(weight(n, k, torch.bfloat16), quant_type="nf4")
    around = torch.full((rows + 20, k), float("nan"), device="cuda", dtype=torch.bfloat16)
    around[10 : 10 + rows] = torch.randn(rows, k, device="cuda")
    out = halfbyte.matmul_4bit(around[10 : 10 + rows], packed.t(), state)
    assert out.isfinite().all()
    assert error(out, around[10 : 10 + rows], dequantize_4bit(packed, state)) < 4e-3


def test_activations_that_are_not_aligned():
    torch.manual_seed(3)
    packed, state = quantize_4bit(weight(96, 256, torch.bfloat16), quant_type="nf4")
    storage = torch.randn(40 * 256 + 1, device="cuda", dtype=torch.bfloat16)
    x = storage[1:].view(40, 256)
    assert x.data_ptr() % 16
    out = halfbyte.matmul_4bit(x, packed.t(), state)
    assert error(out, x, dequantize_4bit(packed, state)) < 4e-3


def test_captured_and_replayed_with_other_activations():
    torch.manual_seed(4)
    packed, state = quantize_4bit(weight(4096, 4096, torch.bfloat16), quant_type="nf4", compress_statistics=True)
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    halfbyte.matmul_4bit(x, packed.t(), state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = halfbyte.matmul_4bit(x, packed.t(), state)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, halfbyte.matmul_4bit(x, packed.t(), state))
