"""README's tables from the results of gpu.py and cpu.py.

usage: python benches/table.py RESULTS.jsonl...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192)]
ROWS = [1, 4, 16, 32, 512]


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Provenance and rows of a results file."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return lines[0]["provenance"], lines[1:]


def value(rows: list[dict[str, Any]], key: str, **want: Any) -> str:
    """The figure of the row that has these fields; a dash if there is none."""
    found = [row[key] for row in rows if all(row.get(name) == wanted for name, wanted in want.items())]
    return f"{found[0]:g}" if found else "–"


def gpu(rows: list[dict[str, Any]]) -> None:
    """Microseconds on a GPU."""
    peers = ["torch bf16", "bitsandbytes nf4", "halfbyte nf4", "bitsandbytes nf4 double", "halfbyte nf4 double"]
    print("| matmul, µs | M |", " | ".join(peers), "|\n|---|---|" + "---|" * len(peers))
    for n, k in SHAPES:
        for m in ROWS:
            cells = [value(rows, "us", op="matmul", impl=peer, m=m, n=n, k=k) for peer in peers]
            print(f"| {n} × {k} | {m} |", " | ".join(cells), "|")
    print("\n| 134 M bf16 elements, µs | bitsandbytes | halfbyte |\n|---|---|---|")
    for op, fields, text in (
        ("quantize_4bit", {"block": 64, "nested": False}, "quantize NF4, block 64"),
        ("quantize_4bit", {"block": 64, "nested": True}, "quantize NF4, double quantization"),
        ("dequantize_4bit", {"block": 64, "nested": False}, "dequantize NF4, block 64"),
        ("dequantize_4bit", {"block": 64, "nested": True}, "dequantize NF4, double quantization"),
        ("quantize_blockwise", {}, "quantize blockwise 8-bit"),
        ("dequantize_blockwise", {}, "dequantize blockwise 8-bit"),
    ):
        cells = [value(rows, "us", op=op, impl=peer, **fields) for peer in ("bitsandbytes", "halfbyte")]
        print(f"| {text} |", " | ".join(cells), "|")


def cpu(rows: list[dict[str, Any]]) -> None:
    """Milliseconds on a CPU."""
    print("| CPU, ms | torch bf16 | bitsandbytes | halfbyte |\n|---|---|---|---|")
    for op, fields, text in (
        ("quantize_4bit", {"nested": False}, "quantize NF4, 4096 × 4096 bf16"),
        ("dequantize_4bit", {"nested": False}, "dequantize NF4"),
        ("matmul", {"nested": False, "m": 1}, "matmul, M = 1"),
        ("matmul", {"nested": False, "m": 128}, "matmul, M = 128"),
        ("quantize_blockwise", {}, "quantize blockwise 8-bit, 16 M fp32"),
        ("dequantize_blockwise", {}, "dequantize blockwise 8-bit"),
    ):
        dense = value(rows, "ms", op=op, impl="torch bf16", m=fields.get("m", 0))
        cells = [value(rows, "ms", op=op, impl=peer, **fields) for peer in ("bitsandbytes", "halfbyte")]
        print(f"| {text} | {dense} |", " | ".join(cells), "|")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        facts, measured = read(Path(name))
        print(f"{name}: {facts}\n")
        (gpu if "gpu" in facts else cpu)(measured)
        print()
