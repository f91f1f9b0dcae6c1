"""Time against batch size, drawn with matplotlib (the extra ``bench``)."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from halfbyte.cli.bench import table
from halfbyte.cli.bench.peers import DOUBLE, PLAIN
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from halfbyte.cli.bench.record import Row

# Okabe and Ito's colours, which colour-blind readers tell apart; shape and dashes tell the same without colour.
_STYLES: dict[tuple[str, str], dict[str, Any]] = {
    ("torch", "bf16"): {"color": "#000000", "marker": "o"},
    ("bitsandbytes", PLAIN): {"color": "#D55E00", "marker": "s"},
    ("bitsandbytes", DOUBLE): {"color": "#E69F00", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    ("halfbyte", PLAIN): {"color": "#0072B2", "marker": "D"},
    ("halfbyte", DOUBLE): {"color": "#56B4E9", "marker": "D", "linestyle": "--", "markerfacecolor": "white"},
}
_ACROSS = 3
_LETTERS_AN_INCH = 14


def draw(facts: Row, rows: Sequence[Row], path: Path, source: str | None = None) -> None:
    """Draw the time of a product against the rows of activations, a panel for each shape, both axes logarithmic.

    Parameters
    ----------
    facts, rows
        As measured, or as :func:`~halfbyte.cli.bench.record.read` returns them.
    path
        Where to write the PNG.
    source
        What the picture was made from, to be kept in the PNG's metadata.

    Raises
    ------
    HalfbyteError
        If matplotlib is missing, or there are no figures of ``matmul``.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
    except ImportError as error:
        raise HalfbyteError(f"{error}: drawing needs matplotlib, pip install 'halfbyte[bench]'") from None
    measured = [row for row in rows if row["op"] == "matmul" and "us" in row]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in measured))
    if not shapes:
        raise HalfbyteError("there is nothing to draw: no figures of matmul")
    across = min(_ACROSS, len(shapes))
    down = -(-len(shapes) // across)
    figure = Figure(figsize=(1.2 + 3.6 * across, 1.3 + 3.2 * down), dpi=110, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    unit, us = table.unit(facts)
    for index, panel in enumerate(panels.flat):
        if index >= len(shapes):
            panel.set_visible(False)
            continue
        _panel(panel, [row for row in measured if (row["n"], row["k"]) == shapes[index]], us)
        ms = sorted({row["m"] for row in measured})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ms, [str(m) for m in ms], fontsize=8, rotation=45)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{shapes[index][0]} × {shapes[index][1]}", fontsize=10)
        panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if index % across == 0:
            panel.set_ylabel(f"{unit} a call")
        if index + across >= len(shapes):
            panel.set_xlabel("batch: rows of activations")
    handles, labels = panels[0][0].get_legend_handles_labels()
    labels = [f"floor: {table.speeds(rows)}" if label == "floor" else label for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    about = textwrap.fill(f"NF4 linear layers. {table.about(facts)}", int(_LETTERS_AN_INCH * figure.get_figwidth()))
    figure.suptitle(about, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Source": source} if source else None)


def _panel(panel: Any, rows: Sequence[Row], us: float) -> None:
    for (peer, form), style in _STYLES.items():
        chosen = sorted((row for row in rows if (row["peer"], row["form"]) == (peer, form)), key=lambda row: row["m"])
        if not chosen:
            continue
        ms = [row["m"] for row in chosen]
        label = f"{peer} {form}"
        panel.plot(ms, [row["us"] / us for row in chosen], label=label, linewidth=1.5, markersize=4, **style)
    floors = {row["m"]: row["floor_us"] / us for row in rows if "floor_us" in row and row["form"] == PLAIN}
    if floors:
        ms = sorted(floors)
        panel.plot(ms, [floors[m] for m in ms], label="floor", color="#777777", linestyle=":", linewidth=1.5)
