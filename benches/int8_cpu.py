"""LLM.int8() on the CPU beside bitsandbytes: whole layers and integer products, JSON lines.

``python benches/int8_cpu.py halfbyte|bitsandbytes [--threads N] [--clock wall|thread]``, one library a process. With
``thread`` it is the processor time of the one thread that works, which other programs do not change; with ``wall`` the
best of many runs.
"""

import argparse
import json
import logging
import platform
import time
from pathlib import Path

import torch

LAYERS = [(m, n, 4096) for n in (1024, 4096) for m in (1, 128)]
PRODUCTS = [(128, 512, 499), (128, 512, 502), (128, 512, 512), (4096, 512, 499)]


def library(name):
    """Layer class, parameter class and product of a library."""
    if name == "halfbyte":
        import halfbyte

        return halfbyte.nn.Linear8bitLt, halfbyte.nn.Int8Params, halfbyte.functional.int8_linear_matmul
    import bitsandbytes

    return bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Int8Params, bitsandbytes.functional.int8_linear_matmul


def best(call, clock, seconds=2.0):
    call()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = clock()
        call()
        fastest = min(fastest, clock() - start)
    return round(fastest * 1e6, 1)


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=["halfbyte", "bitsandbytes"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "thread"], default="thread")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # one of bitsandbytes' a call
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    Layer, Parameter, multiply = library(options.library)
    kept = {"peer": options.library, "threads": options.threads, "timing": options.clock}
    print(json.dumps({"provenance": {"cpu": processor(), "torch": torch.__version__}}))
    torch.manual_seed(0)
    with torch.no_grad():
        for m, n, k in LAYERS:
            layer = Layer(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
            layer.weight = Parameter(torch.randn(n, k), requires_grad=False)
            layer = layer.to("cpu").eval()
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                x = torch.randn(m, k).to(dtype)
                x[:, [3, 77, 1000, 2222]] *= 20
                time_us = best(lambda: layer(x), clock)  # noqa: B023
                form = str(dtype).removeprefix("torch.")
                print(
                    json.dumps(
                        {"op": "int8 layer, threshold 6", **kept, "form": form, "m": m, "n": n, "k": k, "us": time_us}
                    )
                )
        for m, n, k in PRODUCTS:
            a, b = (torch.randint(-128, 127, (rows, k), dtype=torch.int8) for rows in (m, n))
            time_us = best(lambda: multiply(a, b), clock)  # noqa: B023
            print(json.dumps({"op": "int8 product", **kept, "m": m, "n": n, "k": k, "us": time_us}))


if __name__ == "__main__":
    main()
