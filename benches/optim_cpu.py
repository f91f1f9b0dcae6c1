"""Steps of every optimizer on the CPU beside bitsandbytes' of the same name, and torch's AdamW, JSON lines.

``PYTHONPATH=python:BITSANDBYTES python benches/optim_cpu.py [--numbers N] [--threads N] [--rounds N]``

One fp32 parameter of N numbers. The libraries take turns, a step each; of each the fewest milliseconds of wall time
count, and the fewest of processor time of all threads together.
"""

import argparse
import json
import time
import warnings

import bitsandbytes
import torch
from int8_cpu import processor

import halfbyte

OPTIMIZERS = [
    ("Adam", {}),
    ("AdamW", {}),
    ("AdEMAMix", {}),
    ("Lion", {}),
    ("SGD", {"lr": 0.01, "momentum": 0.9}),
    ("RMSprop", {"lr": 0.01}),
    ("Adagrad", {"lr": 0.01}),
    ("LARS", {"lr": 0.01, "momentum": 0.9}),
    ("LAMB", {}),
]


def stepper(cls, numbers, options):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(numbers))
    parameter.grad = torch.randn(numbers)
    return cls([parameter], **options).step


def fewest(steps, rounds):
    """(wall, processor) milliseconds of each step, or the error that it ends in."""
    times = {}
    for name, step in list(steps.items()):
        try:
            step()
            times[name] = (float("inf"), float("inf"))
        except Exception as error:  # whatever a library does not have
            times[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            del steps[name]
    for _ in range(rounds):
        for name, step in steps.items():
            wall, processor_time = time.perf_counter(), time.process_time()
            step()
            now = (time.perf_counter() - wall, time.process_time() - processor_time)
            times[name] = tuple(min(pair) for pair in zip(times[name], now, strict=True))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=int, default=1 << 24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    versions = {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__, "halfbyte": halfbyte.__version__}
    print(json.dumps({"provenance": {"cpu": processor(), **versions}}))
    for rule, arguments in OPTIMIZERS:
        for bits in (8, 32):
            name = f"{rule}{bits}bit"
            makers = {library.__name__: getattr(library.optim, name, None) for library in (halfbyte, bitsandbytes)}
            steps, missing = {}, {}
            for peer, cls in makers.items():
                try:
                    steps[peer] = stepper(cls, options.numbers, arguments)
                except Exception as error:
                    missing[peer] = f"{type(error).__name__}: {error}"[:120]
            if (rule, bits) == ("AdamW", 32):
                steps["torch fused"] = stepper(torch.optim.AdamW, options.numbers, {"fused": True})
            for peer, found in {**fewest(steps, options.rounds), **missing}.items():
                kept = {"op": name, "peer": peer, "threads": options.threads, "numbers": options.numbers}
                if isinstance(found, str):
                    print(json.dumps({**kept, "error": found}), flush=True)
                else:
                    wall, busy = (round(seconds * 1e3, 1) for seconds in found)
                    print(json.dumps({**kept, "wall_ms": wall, "processor_ms": busy}), flush=True)


if __name__ == "__main__":
    main()
