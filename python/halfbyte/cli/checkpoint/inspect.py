"""``halfbyte inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import _native

if TYPE_CHECKING:
    import argparse

_COLUMNS = ("name", "scheme", "shape", "of", "block", "bits", "bytes")


def run(arguments: argparse.Namespace) -> int:
    """Run ``halfbyte inspect``."""
    weights = [_described(weight) for weight in _native.inspect_checkpoint(Path(arguments.path))]
    total = _total(weights)
    if arguments.json:
        print(json.dumps({"weights": weights, "total": total}, indent=2))
        return 0
    rows = [_COLUMNS, *(_row(weight) for weight in weights)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row in rows:
        # Text to the left, numbers to the right.
        cells = [cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
    print()
    print(
        f"{total['elements']:,} weights in {total['bytes']:,} bytes, {_bits(total['bits'])} bits each; "
        f"{total['quantized_elements']:,} of them quantized, {_bits(total['quantized_bits'])} bits each"
    )
    return 0


def _described(weight: dict[str, Any]) -> dict[str, Any]:
    return {**weight, "bits": _ratio(weight["bytes"], weight["elements"])}


def _total(weights: list[dict[str, Any]]) -> dict[str, Any]:
    def add(key: str, quantized: bool = False) -> int:
        return sum(weight[key] for weight in weights if weight["quantized"] or not quantized)

    return {
        "elements": add("elements"),
        "bytes": add("bytes"),
        "bits": _ratio(add("bytes"), add("elements")),
        "quantized_elements": add("elements", True),
        "quantized_bytes": add("bytes", True),
        "quantized_bits": _ratio(add("bytes", True), add("elements", True)),
    }


def _ratio(count: int, elements: int) -> float | None:
    return 8 * count / elements if elements else None


def _bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.3f}"


def _row(weight: dict[str, Any]) -> tuple[str, ...]:
    scheme = weight["scheme"] + " dq" * weight["double_quant"]
    shape = "x".join(map(str, weight["shape"])) or "scalar"
    of = weight["dtype"] or "" if weight["quantized"] else ""
    block = str(weight["blocksize"] or "")
    return weight["name"], scheme, shape, of, block, _bits(weight["bits"]), f"{weight['bytes']:,}"
