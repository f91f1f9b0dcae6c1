"""Products of many rows by the kernel made for them, whatever the dispatch says: each form, on ragged shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_products import CODES, HALVES, HOSTILE, error, exact_weight, hostile_weight, weight

from halfbyte import _native
from halfbyte._matmul import statistics
from halfbyte.functional import dequantize_4bit, quantize_4bit

pytestmark = pytest.mark.gpu

# Tokens of a tile, blocks that have the tiles; 0 where it is as the plan has it.
FORMS: list[tuple[int, int]] = [(tokens, blocks) for tokens in (128, 256) for blocks in (0, 1, 5, 132)]


@pytest.fixture(autouse=True)
def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")


def product(
    x: torch.Tensor,
    packed: torch.Tensor,
    state: Any,
    form: tuple[int, int] = (0, 0),
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    n, k = state.shape
    tokens, blocks = form
    if tokens and blocks:  # no more than there are stages of 256 along K
        form = (tokens, min(blocks, -(-n // 128) * -(-x.shape[0] // tokens) * -(-k // 256)))
    out = torch.full((x.shape[0], n), float("nan"), device="cuda", dtype=x.dtype) if out is None else out
    absmax, nested = statistics(state, x.device)
    done = _native.matmul_4bit_large(x, packed, absmax, out, state.quant_type, state.blocksize, bias, *nested, *form)
    assert done
    return out


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "k"), [(128, 1024), (100, 1088), (520, 2048), (1024, 4096), (7, 8192)])
@pytest.mark.parametrize(("kind", "block", "nested"), CODES)
def test_every_form(n, k, kind, block, nested, dtype):
    torch.manual_seed(0)
    packed, state = quantize_4bit(weight(n, k, dtype), quant_type=kind, blocksize=block, compress_statistics=nested)
    exact = exact_weight(packed, state)
    for rows in (1, 64, 128, 129, 255, 256, 300, 1030):
        x = torch.randn(rows, k, device="cuda", dtype=dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype) if rows % 2 else None
        for form in FORMS:
            out = product(x, packed, state, form, bias)
            # Few results can have a sum that is small for its terms.
            few = 2 if out.numel() < 100 else 1
            assert error(out, x, exact, bias) < few * (3e-3 if dtype == torch.bfloat16 else 4e-4), (rows, form)
            assert torch.equal(out, product(x, packed, state, form, bias)), (rows, form)


@pytest.mark.parametrize("k", [64, 192, 256, 320])
def test_little_k(k):
    torch.manual_seed(1)
    packed, state = quantize_4bit(weight(260, k, torch.bfloat16), quant_type="nf4")
    x = torch.randn(257, k, device="cuda", dtype=torch.bfloat16)
    assert error(product(x, packed, state), x, exact_weight(packed, state)) < 3e-3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", HOSTILE)
def test_no_worse_than_a_dense_product(case, dtype):
    torch.manual_seed(2)
    n, k, rows = 384, 2048, 300
    packed, state = quantize_4bit(hostile_weight(case, n, k, dtype), quant_type="nf4", compress_statistics=False)
    exact = exact_weight(packed, state)
    x = torch.randn(rows, k, device="cuda", dtype=dtype)
    theirs = error(torch.nn.functional.linear(x, dequantize_4bit(packed, state)), x, exact)
    assert error(product(x, packed, state, (256, 1)), x, exact) <= theirs * 1.05 + 1e-7


@pytest.mark.parametrize("form", FORMS)
def test_nothing_beyond_the_edges_is_read_or_written(form):
    """Rows of x that are not this product's hold NaN; what surrounds the output stays as it is."""
    torch.manual_seed(3)
    n, k, rows = 200, 1088, 301
    packed, state = quantize_4bit(weight(n, k, torch.bfloat16), quant_type="nf4")
    around = torch.full((rows + 600, k), float("nan"), device="cuda", dtype=torch.bfloat16)
    x = around[300 : 300 + rows]
    x.normal_()
    room = torch.full((rows * n + 2000,), 7.0, device="cuda", dtype=torch.bfloat16)
    out = room[1000 : 1000 + rows * n].view(rows, n)
    product(x, packed, state, form, out=out)
    assert error(out, x, exact_weight(packed, state)) < 3e-3
    assert (room[:1000] == 7).all()
    assert (room[1000 + rows * n :] == 7).all()


@pytest.mark.parametrize("offset", [1, 4])
def test_an_output_that_is_not_aligned(offset):
    torch.manual_seed(4)
    packed, state = quantize_4bit(weight(136, 512, torch.bfloat16), quant_type="nf4")
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(300 * 136 + offset, device="cuda", dtype=torch.bfloat16)[offset:].view(300, 136)
    product(x, packed, state, (256, 1), out=out)
    assert error(out, x, exact_weight(packed, state)) < 3e-3


def test_captured_and_replayed_with_other_activations():
    torch.manual_seed(5)
    packed, state = quantize_4bit(weight(4096, 4096, torch.bfloat16), quant_type="nf4", compress_statistics=True)
    x = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
    form = (256, 1)
    product(x, packed, state, form)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(x, packed, state, form)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, product(x, packed, state, form))


def test_what_it_does_not_take():
    packed, state = quantize_4bit(weight(64, 64, torch.bfloat16), quant_type="nf4", blocksize=32)
    x = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(300, 64, device="cuda", dtype=torch.bfloat16)
    assert not _native.matmul_4bit_large(x, packed, state.absmax, out, "nf4", 32)
    packed, state = quantize_4bit(weight(64, 64, torch.bfloat16), quant_type="nf4")
    with pytest.raises(ValueError, match="choice"):
        _native.matmul_4bit_large(x, packed, state.absmax, out, "nf4", 64, tokens=64)
