"""How a time is taken. Everything is in microseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

ROTATE_BYTES = 384 << 20
"""Bytes that rotated weights take together: several times any GPU's L2 cache."""
_MOST_COPIES = 48


def copies(nbytes: int, m: int, rotate_bytes: int = ROTATE_BYTES) -> int:
    """Return how many copies of a weight of `nbytes` leave the cache; with many rows of activations 3 will do."""
    return max(2, min(_MOST_COPIES, rotate_bytes // max(nbytes, 1) + 1)) if m <= 256 else 3


def graph_us(calls: Sequence[Call], replays: int = 8) -> float:
    """Device time of one call: all calls in one CUDA graph, median of its replays.

    Everything, the warm-up too, is on one stream, so that a call may be the backward pass of a forward pass that it
    made in the warm-up: autograd runs it on the stream of the forward pass.
    """
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return sorted(_event_us(graph.replay) for _ in range(replays))[replays // 2] / len(calls)


def stream_us(calls: Sequence[Call], repeats: int = 5) -> float:
    """Device time of one call, the gaps between launches included: for what cannot be captured in a graph."""

    def all_calls() -> None:
        for call in calls:
            call()

    all_calls()
    torch.cuda.synchronize()
    return statistics.median(_event_us(all_calls) for _ in range(repeats)) / len(calls)


def _event_us(call: Call) -> float:
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def eager_us(calls: Sequence[Call], count: int = 400, repeats: int = 5) -> tuple[float, float]:
    """Wall time of one call on a GPU, queued one after another as a program would, and the host's part of it.

    The host's part ends when the last call has been queued; `count` launches fit in the driver's queue.
    """
    for call in calls:
        call()
    wall, host = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        wall.append((time.perf_counter() - begin) / count * 1e6)
        host.append((queued - begin) / count * 1e6)
    return statistics.median(wall), statistics.median(host)


def wall_us(calls: Sequence[Call], repeats: int = 9, *, seconds: float) -> float:
    """Median wall time of one call on the CPU, after a warm-up; fewer repeats, three at least, if they take `seconds`.

    A call that takes less than a millisecond is repeated until they take one together. Of calls that take long only as
    many are used as there are repeats.
    """
    calls[-1]()
    begin = time.perf_counter()
    calls[-1]()
    once = max(time.perf_counter() - begin, 1e-9)
    inner = max(1, min(1000, int(1e-3 / once)))
    used = list(calls) if once * len(calls) < 0.25 else list(calls[:repeats])
    for call in dict.fromkeys(used):
        call()
    times: list[float] = []
    spent, turn = 0.0, 0
    while len(times) < repeats and (len(times) < 3 or spent < seconds):
        begin = time.perf_counter()
        for _ in range(inner):
            used[turn % len(used)]()
            turn += 1
        took = time.perf_counter() - begin
        spent += took
        times.append(took / inner * 1e6)
    return statistics.median(times)
