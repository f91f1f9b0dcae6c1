"""Figures as Markdown tables, which read well on a terminal too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.cli.bench.peers import DOUBLE, PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from halfbyte.cli.bench.record import Row

NONE = "–"


@dataclass(frozen=True)
class Layout:
    """How an operation's table is laid out: a line for each different `index`, a column for each peer and form."""

    op: str
    title: str
    index: tuple[tuple[str, Callable[[Row], str]], ...]


def _weight(row: Row) -> str:
    return f"{row['n']} × {row['k']}"


def _field(name: str) -> Callable[[Row], str]:
    return lambda row: str(row[name])


def _elements(row: Row) -> str:
    return f"{row['elements'] / 1e6:.1f} M {row['dtype']}"


_SIZE = (("N × K", _weight), ("M", _field("m")))
_BLOCKS = (("elements", _elements), ("block", _field("block")))
LAYOUTS = (
    Layout("matmul", "x · wᵀ", _SIZE),
    Layout("grad_input", "backward, dy · w", _SIZE),
    Layout("group", "layers on one input", (("N", _field("layers")), ("K", _field("k")), ("M", _field("m")))),
    Layout("experts", "experts", (("sizes", _field("sizes")), ("tokens", _field("m")))),
    Layout("quantize_4bit", "quantize to NF4", _BLOCKS),
    Layout("dequantize_4bit", "dequantize NF4", _BLOCKS),
    Layout("quantize_blockwise", "quantize to 8 bits", _BLOCKS),
    Layout("dequantize_blockwise", "dequantize 8 bits", _BLOCKS),
    Layout("eager", "eager call", (("", _field("call")), *_SIZE)),
)


def render(facts: Row, rows: Sequence[Row]) -> str:
    """Return what was measured on what, and a table for each operation that was."""
    return "\n\n".join([about(facts), floor(facts, rows), *tables(facts, rows)])


def about(facts: Row) -> str:
    """Return machine, versions and date as a sentence."""
    if facts["device"] == "cuda":
        machine = f"{facts['gpu']}, driver {facts['driver']}"
    else:
        machine = f"{facts['cpu']}, {facts['threads']} threads, {facts['simd']}"
    versions = [f"{name} {facts[name]}" for name in ("torch", "bitsandbytes", "halfbyte") if facts.get(name)]
    commit = f" at {facts['commit']}" if facts.get("commit") else ""
    return f"{machine}; {', '.join(versions)}{commit}; {facts['date']}."


def floor(facts: Row, rows: Iterable[Row]) -> str:
    """Return the sentence about the speeds that the floor is made of."""
    return f"Floor: what the bytes need at {speeds(rows)}, whichever is longer. Times in {unit(facts)[0]}."


def speeds(rows: Iterable[Row]) -> str:
    """Return the measured speeds of memory and arithmetic."""
    copy = max((row.get("gb_s", 0.0) for row in rows if row["op"] == "copy"), default=0.0)
    dense = max((row.get("tflop_s", 0.0) for row in rows if row["op"] == "dense"), default=0.0)
    memory = f"{copy / 1e3:.2f} TB/s" if copy >= 1000 else f"{copy:.1f} GB/s"
    arithmetic = f"{dense:.3g} TFLOP/s" if dense >= 1 else f"{1e3 * dense:.0f} GFLOP/s"
    return f"a copy's {memory} or the arithmetic at a large product's {arithmetic}"


def tables(facts: Row, rows: Sequence[Row]) -> list[str]:
    """Return one Markdown table for each operation that has figures."""
    made = []
    for layout in LAYOUTS:
        chosen = [row for row in rows if row["op"] == layout.op]
        if chosen:
            made.append(_table(layout, unit(facts), chosen))
    return made


def unit(facts: Row) -> tuple[str, float]:
    """Return the unit of time, and how many microseconds it has."""
    return ("µs", 1.0) if facts["device"] == "cuda" else ("ms", 1e3)


def _table(layout: Layout, time: tuple[str, float], rows: Sequence[Row]) -> str:
    name, us = time
    columns = _columns(rows)
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(tuple(get(row) for _, get in layout.index), {})[_column(row)] = row
    has_floor = any("floor_us" in row for row in rows)
    rival = next((peer for peer in ("torch", "bitsandbytes") if _has(rows, peer) and _has(rows, "halfbyte")), None)
    title = f"{layout.title}, {name}"
    if any("host_us" in row for row in rows):
        title += " (host's part)"

    heads = [head for head, _ in layout.index]
    heads[0] = f"{title}: {heads[0]}" if heads[0] else title
    heads += ["floor"] * has_floor + columns + [f"{rival} ÷ halfbyte"] * (rival is not None)
    body = []
    for index, found in lines.items():
        cells = list(index)
        if has_floor:
            cells.append(_floor_cell(found.values(), us))
        cells += [_cell(found.get(column), us) for column in columns]
        if rival is not None:
            cells.append(_ratio(found.values(), rival))
        body.append(cells)
    return _markdown(heads, body, left=1)


def _has(rows: Iterable[Row], peer: str) -> bool:
    return any(row["peer"] == peer and "us" in row for row in rows)


def _columns(rows: Iterable[Row]) -> list[str]:
    """Return the columns: torch, bitsandbytes, halfbyte, each with its forms in the order they were measured."""
    order = ("torch", "bitsandbytes", "halfbyte")
    found = {_column(row): order.index(row["peer"]) for row in rows}
    return sorted(found, key=lambda column: found[column])


def _column(row: Row) -> str:
    name = f"{row['peer']} {row['form']}"
    return f"{name}, {row['way']}" if "way" in row else name


def _cell(row: Row | None, us: float) -> str:
    if row is None or "us" not in row:
        return NONE
    host = f" ({number(row['host_us'] / us)})" if "host_us" in row else ""
    return number(row["us"] / us) + host


def _floor_cell(rows: Iterable[Row], us: float) -> str:
    """Return the floor of the plain quantized form; of another if it was not measured."""
    have = [row for row in rows if "floor_us" in row]
    preference = {PLAIN: 0, "8-bit": 0, DOUBLE: 1}
    have.sort(key=lambda row: preference.get(row["form"], 2))
    return number(have[0]["floor_us"] / us) if have else NONE


def _ratio(rows: Iterable[Row], rival: str) -> str:
    """Return the best time of the rival by the best of halfbyte."""
    best: dict[str, float] = {}
    for row in rows:
        if "us" in row:
            best[row["peer"]] = min(row["us"], best.get(row["peer"], math.inf))
    return f"{best[rival] / best['halfbyte']:.2f}" if best.keys() >= {rival, "halfbyte"} else NONE


def number(value: float) -> str:
    """Return a time with three or four figures."""
    for least, digits in ((100, 0), (10, 1), (0.1, 2)):
        if value >= least:
            return f"{value:.{digits}f}"
    return f"{value:.4f}"


def _markdown(heads: list[str], body: list[list[str]], left: int) -> str:
    """Return an aligned Markdown table; the first `left` columns are flush left, numbers flush right."""
    widths = [max(3, *(len(line[i]) for line in [heads, *body])) for i in range(len(heads))]
    rule = [("-" * w if i < left else "-" * (w - 1) + ":") for i, w in enumerate(widths)]

    def line(cells: list[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(heads), line(rule), *map(line, body)])
