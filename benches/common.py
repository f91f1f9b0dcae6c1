"""What the benchmarks share: timing, provenance of a figure, JSON lines."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


def graph_us(calls: Sequence[Call], replays: int = 8) -> float:
    """Median device time of one call in microseconds: all calls in one CUDA graph, replayed.

    Give as many calls on different data as it takes to leave the L2 cache.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return statistics.median(event_us(graph.replay) for _ in range(replays)) / len(calls)


def event_us(call: Call) -> float:
    """Device time of a call in microseconds, by CUDA events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3


def eager_us(calls: Sequence[Call], repeats: int = 400) -> float:
    """Wall time of a call in microseconds, calls queued one after another as a program would."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(repeats):
        calls[i % len(calls)]()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats * 1e6


def wall_ms(call: Call, repeats: int = 9) -> float:
    """Median wall time of a call on the CPU in milliseconds, after a warm-up."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def provenance(device: str, commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and commit that a figure belongs to; the commit is given where the tree has no history."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or git.stdout.strip() or None,
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
        name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        facts |= {"gpu": name, "driver": driver}
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
        facts |= {"cpu": model, "threads": torch.get_num_threads()}
    return facts


def peers() -> dict[str, Any]:
    """halfbyte, and the real bitsandbytes where it is installed."""
    import halfbyte

    found = {"halfbyte": halfbyte}
    real = importlib.util.find_spec("bitsandbytes")
    if real is not None and real.origin and "halfbyte" not in real.origin:
        found["bitsandbytes"] = importlib.import_module("bitsandbytes")
    return found


class Report:
    """Prints each row as it comes and writes it as a JSON line."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        self.path: Path | None = options.out
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            facts = provenance(device, options.commit)
            self.path.write_text(json.dumps({"provenance": facts}) + "\n", encoding="utf-8")

    def add(self, **row: Any) -> None:
        """One measurement."""
        line = json.dumps(row)
        print(line, flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def arguments(description: str) -> argparse.Namespace:
    """Command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="JSON lines file to write")
    parser.add_argument("--commit", help="what the figures are of, where git cannot say")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    return parser.parse_args()
