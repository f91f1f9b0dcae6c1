"""Runs ``halfbyte bench``."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from itertools import chain
from typing import TYPE_CHECKING

import torch

from halfbyte import _progress
from halfbyte.cli.bench import cases, clock, grouped, peers, plan, record, table
from halfbyte.cli.device import pick_device
from halfbyte.errors import ArgumentError, HalfbyteError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from halfbyte.cli.bench.cases import Case
    from halfbyte.cli.bench.peers import Peer
    from halfbyte.cli.bench.plan import Plan
    from halfbyte.cli.bench.record import Recorder, Row


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write and draw what was asked for.

    Parameters
    ----------
    arguments
        As parsed by :func:`halfbyte.cli.main`.

    Returns
    -------
    int
        0, or 1 if an operation of halfbyte failed.

    Raises
    ------
    HalfbyteError
        If the device or a peer is not there, or nothing could draw the plot: before anything is measured.
    """
    device = pick_device(arguments.device)
    planned = plan.make(arguments, device)
    if arguments.plot is not None:
        _check_plot(planned)
    found = peers.find(arguments.peers)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    recorder = record.Recorder(record.provenance(device, arguments.commit), arguments.json)
    with torch.no_grad(), warnings.catch_warnings():
        # Autograd's thread meets cuBLAS before it has a context; it gets one.
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")
        failures = measure(planned, found, recorder)
    print(table.render(recorder.facts, recorder.rows))
    if arguments.plot is not None:
        from halfbyte.cli.bench import plot

        plot.draw(recorder.facts, recorder.rows, arguments.plot)
    for failure in failures:
        print(f"no figure: {failure}", file=sys.stderr)
    return 1 if any(row.get("error") and row["peer"] == "halfbyte" for row in recorder.rows) else 0


def _check_plot(planned: Plan) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise HalfbyteError("--plot needs matplotlib, which is not installed: pip install 'halfbyte[bench]'")
    if "matmul" not in planned.ops:
        raise ArgumentError("--plot: draws matmul, which --ops leaves out")


def measure(planned: Plan, found: Sequence[Peer], recorder: Recorder) -> list[str]:
    """Take every figure of a plan.

    Returns
    -------
    list of str
        What has no figure, and why.
    """
    floor = _Floor()
    failures = []
    for case in _progress.track(_cases(planned, found), "measuring"):
        row: Row = {"op": case.op, "peer": case.peer, "form": case.form, **case.size}
        try:
            row |= _timed(planned, case)
        except Exception as error:  # of a peer that lacks a block size, say, or no memory: one figure less
            reason = str(error).strip().split("\n", 1)[0]
            row["error"] = f"{type(error).__name__}: {reason}"
            failures.append(f"{case.peer} {case.form} {case.op} {case.size}: {row['error']}")
        else:
            floor.see(case, row)
        recorder.add(row)
        if planned.on_gpu:
            torch.cuda.empty_cache()  # a graph's memory is its own
    return failures


def _cases(planned: Plan, found: Sequence[Peer]) -> Iterator[Case]:
    """Yield what to measure. The copy and the dense product come first: the floor is made of them."""
    ops = planned.ops
    yield cases.copy_case(planned)
    yield from cases.dense_cases(planned)
    yield from chain(
        cases.matmul(planned, found) if "matmul" in ops else (),
        cases.grad_input(planned, found) if "grad_input" in ops else (),
        grouped.group(planned, found) if "group" in ops else (),
        grouped.experts(planned, found) if "experts" in ops else (),
        cases.elementwise_4bit(planned, found) if {"quantize_4bit", "dequantize_4bit"} & set(ops) else (),
        cases.elementwise_8bit(planned, found) if {"quantize_blockwise", "dequantize_blockwise"} & set(ops) else (),
        cases.eager(planned, found) if "eager" in ops else (),
    )


def _timed(planned: Plan, case: Case) -> Row:
    calls = case.make()
    if not planned.on_gpu:
        return {"us": round(clock.wall_us(calls, seconds=planned.wall_seconds), 3), "timing": "wall"}
    if case.timing == "eager":
        wall, host = clock.eager_us(calls)
        return {"us": round(wall, 2), "host_us": round(host, 2), "timing": "eager"}
    timed = clock.graph_us if case.timing == "graph" else clock.stream_us
    return {"us": round(timed(calls), 2), "timing": case.timing}


class _Floor:
    """What bytes and arithmetic need at the speeds that were measured."""

    def __init__(self) -> None:
        self.bytes_a_us = self.flops_a_us = 0.0

    def see(self, case: Case, row: Row) -> None:
        """Learn a speed from a figure, or put the floor into it."""
        us = row["us"]
        if case.op == "copy":
            self.bytes_a_us = case.nbytes / us
            row["gb_s"] = round(self.bytes_a_us / 1e3, 1)
        elif case.op == "dense":
            self.flops_a_us = max(self.flops_a_us, case.flops / us)
            row["tflop_s"] = round(case.flops / us / 1e6, 3)
        elif case.nbytes and self.bytes_a_us and (self.flops_a_us or not case.flops):
            arithmetic = case.flops / self.flops_a_us if case.flops else 0.0
            row["floor_us"] = round(max(case.nbytes / self.bytes_a_us, arithmetic), 3)
