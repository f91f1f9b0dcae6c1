"""Products whose tiles blocks share along K, by sums and flags in scratch memory, alone and with much beside them."""

from __future__ import annotations

import pytest
import torch
from cuda_products import error, exact_weight, weight

import halfbyte
from halfbyte.functional import quantize_4bit

pytestmark = pytest.mark.gpu

# Rows of x, of the weight, K: two parts a tile and many, one kernel and the other.
SHAPES = [
    (20, 4096, 4096),
    (64, 14336, 4096),
    (64, 1024, 4096),
    (128, 4096, 14336),
    (256, 2048, 8192),
    (300, 28672, 1024),
]


class Product:
    """A product and what it comes to with nothing else under way."""

    def __init__(self, m: int, n: int, k: int) -> None:
        self.packed, self.state = quantize_4bit(weight(n, k, torch.bfloat16), quant_type="nf4")
        self.x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        self.alone = self.run()
        torch.cuda.synchronize()

    def run(self) -> torch.Tensor:
        return halfbyte.matmul_4bit(self.x, self.packed.t(), self.state)


@pytest.fixture(scope="module")
def products() -> list[Product]:
    torch.manual_seed(0)
    return [Product(*shape) for shape in SHAPES]


def test_scratch_memory_may_hold_anything(products):
    for product in products:
        exact = exact_weight(product.packed, product.state)
        assert error(product.alone, product.x, exact) < 3e-3
        for value in (float("nan"), float("inf"), 0.0, -1.0):
            # What the allocator gives next for so much is this, or the flags and sums of the product before.
            dirt = [torch.full((1 << 24,), value, device="cuda") for _ in range(2)]
            del dirt
            assert torch.equal(product.run(), product.alone), value


def test_streams_at_once(products):
    streams = [torch.cuda.Stream() for _ in products]
    results: list[list[torch.Tensor]] = [[] for _ in products]
    for _ in range(20):
        for product, stream, done in zip(products, streams, results, strict=True):
            with torch.cuda.stream(stream):
                done.append(product.run())
    torch.cuda.synchronize()
    for product, done in zip(products, results, strict=True):
        assert all(torch.equal(out, product.alone) for out in done), product.state.shape


def test_graphs_of_one_stream_replayed_at_once(products):
    """Graphs that were captured one after another on the same stream have scratch memory of their own."""
    capturing = torch.cuda.Stream()
    graphs = []
    for product in products:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=capturing):
            outs = [product.run() for _ in range(4)]
        graphs.append((graph, outs))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        products[1].run()
    torch.cuda.synchronize()
    for product, (_, outs) in zip(products, graphs, strict=True):
        assert all(torch.equal(out, product.alone) for out in outs), product.state.shape
