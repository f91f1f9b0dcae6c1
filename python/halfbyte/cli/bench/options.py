"""The options of ``halfbyte bench``, without importing anything heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """Measure every operation beside torch's dense product and, where it is installed, bitsandbytes.

On a GPU a figure is the device time of one call inside a CUDA graph, weights rotated so that they leave the L2 cache,
random data, median of 8 replays; quantize and dequantize, which bitsandbytes cannot capture, are timed by events on the
stream. `eager` is wall time. On the CPU everything is the median wall time of a call, for fewer sizes.

The table goes to standard output. The floor is what the bytes need at the speed of a copy, or the arithmetic at the
speed of a large dense product, whichever is longer; both speeds are measured first."""

OPERATIONS = {
    "matmul": "x · wᵀ",
    "grad_input": "the backward pass: dy · w",
    "quantize_4bit": "all block sizes",
    "dequantize_4bit": "all block sizes",
    "quantize_blockwise": "8-bit",
    "dequantize_blockwise": "8-bit",
    "group": "layers that share an input: q, k, v and gate, up",
    "experts": "a mixture of experts",
    "eager": "calls without a CUDA graph: what the host costs",
}
PEERS = ("torch", "bitsandbytes", "halfbyte")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: CUDA if there, else CPU)")
    parser.add_argument(
        "--shapes", metavar="NxK,...", type=_shapes, help="weights to multiply with: outputs x inputs, as 4096x4096"
    )
    parser.add_argument("--ms", metavar="M,...", type=_counts, help="batch sizes: rows of activations")
    parser.add_argument(
        "--ops", metavar="OP,...", type=_names(OPERATIONS), help=f"of {', '.join(OPERATIONS)} (default: all)"
    )
    parser.add_argument(
        "--peers", metavar="PEER,...", type=_names(PEERS), help=f"of {', '.join(PEERS)} (default: those installed)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes: seconds instead of minutes")
    parser.add_argument("--json", metavar="OUT.jsonl", type=Path, help="write the figures there, a JSON object a line")
    parser.add_argument(
        "--plot", metavar="OUT.png", type=Path, help="draw time against batch size (needs the extra `bench`)"
    )
    parser.add_argument(
        "--commit", metavar="NAME", help="which build this is, for --json (default: what git says in a working tree)"
    )


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError("expected a list with commas, got nothing")
    return parts


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part) for part in _split(text)}))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    shapes = []
    for part in _split(text):
        n, by, k = part.replace("×", "x").partition("x")
        if not by:
            raise argparse.ArgumentTypeError(f"expected outputs x inputs, as 4096x14336, got {part!r}")
        shapes.append((_count(n.strip()), _count(k.strip())))
    return tuple(dict.fromkeys(shapes))


class _names:
    """Type of an option that lists some of these names."""

    def __init__(self, known: dict[str, str] | tuple[str, ...]) -> None:
        self.known = tuple(known)

    def __call__(self, text: str) -> tuple[str, ...]:
        asked = _split(text)
        for name in asked:
            if name not in self.known:
                raise argparse.ArgumentTypeError(f"there is no {name!r}, only {', '.join(self.known)}")
        return tuple(name for name in self.known if name in asked)
