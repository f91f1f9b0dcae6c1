"""4-bit and blockwise 8-bit operations on CUDA, beside torch's bf16 linear layer and bitsandbytes where installed.

usage: python benches/gpu.py [--quick] [--out benches/results/NAME.jsonl]

A figure is device time of one call inside a CUDA graph, median of 8 replays, on random data rotated through enough
copies to leave the L2 cache; `eager_us` is wall time a call without a graph.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from common import Call, Report, arguments, eager_us, event_us, graph_us, peers

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672), (1024, 4096)]
ROWS = [1, 4, 8, 16, 32, 64, 512, 4096]
ROTATE_BYTES = 384 << 20


def matmul(report: Report, quick: bool) -> None:
    """`x · wᵀ` for every peer, shape and number of rows."""
    for n, k in SHAPES[:2] if quick else SHAPES:
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        for m in [1, 4, 16] if quick else ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            copies = max(2, min(48, ROTATE_BYTES // (2 * n * k) + 1)) if m <= 64 else 2
            dense = [weight.clone() for _ in range(copies)]
            calls = [lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in dense]
            eager = {"eager_us": round(eager_us(calls), 2)} if m == 1 else {}
            report.add(op="matmul", impl="torch bf16", m=m, n=n, k=k, us=round(graph_us(calls), 2), **eager)
            del dense, calls
            copies = max(2, min(48, ROTATE_BYTES // (n * k // 2) + 1)) if m <= 64 else 2
            for name, library in peers().items():
                for nested in (False, True):
                    quantized = [
                        library.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
                        for _ in range(copies)
                    ]
                    calls = [lambda x=x, q=q, s=s, lib=library: lib.matmul_4bit(x, q.t(), s) for q, s in quantized]
                    eager = {"eager_us": round(eager_us(calls), 2)} if m == 1 else {}
                    impl = f"{name} nf4" + " double" * nested
                    report.add(op="matmul", impl=impl, m=m, n=n, k=k, us=round(graph_us(calls), 2), **eager)


def elementwise(report: Report) -> None:
    """Quantize and dequantize 134 M bf16 elements."""
    weight = torch.randn(16384, 8192, device="cuda", dtype=torch.bfloat16) * 0.02
    n = weight.numel()
    for name, library in peers().items():
        for block in (64, 4096):
            for nested in (False, True):
                quantize = partial(library.functional.quantize_4bit, weight, quant_type="nf4", blocksize=block)
                quantize = partial(quantize, compress_statistics=nested)
                dequantize = partial(library.functional.dequantize_4bit, *quantize())
                extra = {"impl": name, "block": block, "nested": nested, "n": n}
                report.add(op="quantize_4bit", us=round(stream_us(quantize), 1), **extra)
                report.add(op="dequantize_4bit", us=round(stream_us(dequantize), 1), **extra)
        quantize = partial(library.functional.quantize_blockwise, weight)
        dequantize = partial(library.functional.dequantize_blockwise, *quantize())
        extra = {"impl": name, "block": 4096, "n": n}
        report.add(op="quantize_blockwise", us=round(stream_us(quantize), 1), **extra)
        report.add(op="dequantize_blockwise", us=round(stream_us(dequantize), 1), **extra)


def stream_us(call: Call, repeats: int = 4) -> float:
    """Time of a call on the stream: bitsandbytes' quantizers cannot be captured in a graph."""

    def several() -> None:
        for _ in range(repeats):
            call()

    several()
    return statistics.median(event_us(several) for _ in range(5)) / repeats


if __name__ == "__main__":
    options = arguments(__doc__)
    report = Report(options, "cuda")
    matmul(report, options.quick)
    elementwise(report)
