"""4-bit and blockwise 8-bit operations on the CPU, beside torch's bf16 linear layer and bitsandbytes where installed.

usage: python benches/cpu.py [--out benches/results/NAME.jsonl]

A figure is the median wall time of a call in milliseconds; 4096 × 4096 weights, 16 M elements for blockwise 8-bit.
"""

from __future__ import annotations

import torch
from common import Report, arguments, peers, wall_ms


def main(report: Report) -> None:
    """Every operation for every peer."""
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16) * 0.02
    values = torch.randn(1 << 24)
    inputs = {m: torch.randn(m, 4096, dtype=torch.bfloat16) for m in (1, 128)}
    for m, x in inputs.items():
        ms = wall_ms(lambda x=x: torch.nn.functional.linear(x, weight))
        report.add(op="matmul", impl="torch bf16", m=m, ms=round(ms, 2))
    for name, library in peers().items():
        functional = library.functional
        quantize = lambda f=functional, **form: f.quantize_4bit(weight, quant_type="nf4", **form)  # noqa: E731
        repeats = 9 if name == "halfbyte" else 3
        for nested in (False, True):
            ms = wall_ms(lambda q=quantize, nested=nested: q(compress_statistics=nested), repeats)
            report.add(op="quantize_4bit", impl=name, nested=nested, ms=round(ms, 2))
            packed, state = quantize(compress_statistics=nested)
            ms = wall_ms(lambda f=functional, p=packed, s=state: f.dequantize_4bit(p, s), repeats)
            report.add(op="dequantize_4bit", impl=name, nested=nested, ms=round(ms, 2))
            for m, x in inputs.items():
                ms = wall_ms(lambda lib=library, x=x, p=packed, s=state: lib.matmul_4bit(x, p.t(), s), repeats)
                report.add(op="matmul", impl=name, nested=nested, m=m, ms=round(ms, 2))
        ms = wall_ms(lambda f=functional: f.quantize_blockwise(values), repeats)
        report.add(op="quantize_blockwise", impl=name, ms=round(ms, 2))
        codes, state = functional.quantize_blockwise(values)
        ms = wall_ms(lambda f=functional, c=codes, s=state: f.dequantize_blockwise(c, s), repeats)
        report.add(op="dequantize_blockwise", impl=name, ms=round(ms, 2))


if __name__ == "__main__":
    options = arguments(__doc__)
    with torch.inference_mode():
        main(Report(options, "cpu"))
