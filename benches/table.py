"""Writes the figures of benches/results into README: the tables, and the plot beside the results.

usage: python benches/table.py [--check]

The results are those of

    halfbyte bench --device cuda --json benches/results/h200.jsonl
    OMP_NUM_THREADS=2 taskset -c 0,1 halfbyte bench --device cpu --json benches/results/xeon-2-cores.jsonl

README has a part of them. --check changes nothing, and fails if README or the plot are not what the results make.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

from halfbyte.cli.bench import plot, record, table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benches" / "results"
GPU, CPU = RESULTS / "h200.jsonl", RESULTS / "xeon-2-cores.jsonl"
PLOT = GPU.with_suffix(".png")

SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
MS = (1, 4, 16, 64, 128, 512, 2048)
GRAD_MS = (128, 512, 2048)
BLOCKS = (64, 4096)
BEGIN, END = "<!-- figures: written by benches/table.py -->\n", "<!-- end of figures -->\n"


def chosen(row: record.Row) -> bool:
    """Whether README shows a figure."""
    if row["op"] in ("matmul", "grad_input"):
        return (row["n"], row["k"]) in SHAPES and row["m"] in (MS if row["op"] == "matmul" else GRAD_MS)
    return row.get("block", BLOCKS[0]) in BLOCKS and row.get("m", MS[0]) in MS


def figures() -> str:
    """What belongs between README's marks."""
    parts = []
    for path in (GPU, CPU):
        facts, rows = record.read(path)
        where = path.relative_to(ROOT).as_posix()
        parts += [f"{table.about(facts)} All figures of `halfbyte bench --device {facts['device']}` are in `{where}`."]
        if path is GPU:
            parts += [f"![Time of a call against batch size](benches/results/{PLOT.name})"]
        parts += [table.floor(facts, rows), *table.tables(facts, [row for row in rows if chosen(row)])]
    return BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END


def readme() -> str:
    """README with the figures as they are now."""
    text = README.read_text(encoding="utf-8")
    replaced, count = re.subn(f"{BEGIN}.*?{END}", lambda _: figures(), text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{README} should have {BEGIN.strip()} and {END.strip()} once, and has them {count} times")
    return replaced


def plotted() -> str:
    """What the plot's metadata says it was made from."""
    return "sha256:" + hashlib.sha256(GPU.read_bytes()).hexdigest()


def stale() -> list[str]:
    """What is not what the results make."""
    found = [] if readme() == README.read_text(encoding="utf-8") else ["README.md"]
    drawn = PLOT.is_file() and plotted().encode() in PLOT.read_bytes()
    return found if drawn else [*found, PLOT.name]


def write() -> None:
    """Rewrite README's figures and the plot."""
    README.write_text(readme(), encoding="utf-8")
    facts, rows = record.read(GPU)
    plot.draw(facts, [row for row in rows if row["op"] != "matmul" or (row["n"], row["k"]) in SHAPES], PLOT, plotted())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if old := stale():
            sys.exit(f"not what the results make: {', '.join(old)}; run python benches/table.py")
    else:
        write()
