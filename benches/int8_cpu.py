"""LLM.int8() on the CPU beside bitsandbytes and torch: whole layers and integer products, JSON lines.

``PYTHONPATH=python:BITSANDBYTES python benches/int8_cpu.py [layers|products] [--threads N] [--clock wall|thread]``

All libraries in one process, a call of each in turn, and the best of each: on a machine that others use too they see
the same. With ``thread`` it is the processor time of the calling thread, which other programs do not change; with
``wall`` the time of all threads. ``HALFBYTE_SIMD=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
MKL_ENABLE_INSTRUCTIONS=AVX2`` holds all to AVX2, and ours to AVX-VNNI where the processor has it.
"""

import argparse
import json
import logging
import os
import platform
import time
from pathlib import Path

import bitsandbytes
import torch

import halfbyte

LAYERS = [(m, n, 4096) for n in (1024, 4096) for m in (1, 8, 128)]
PRODUCTS = [(m, n, 4096) for n in (1024, 4096, 499, 502) for m in (1, 8, 32, 128, 512)]
PRODUCTS += [(128, 512, 499), (128, 512, 502), (128, 512, 512), (4096, 512, 499)]
VARIABLES = ("HALFBYTE_SIMD", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


def best(calls, clock, seconds):
    """The fewest microseconds of each call; they take turns."""
    for call in calls.values():
        call()
    fastest, end = dict.fromkeys(calls, float("inf")), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = clock()
            call()
            fastest[name] = min(fastest[name], clock() - start)
    return {name: round(seconds * 1e6, 1) for name, seconds in fastest.items()}


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def layers(library, m, n, k):
    """An 8-bit layer of a library, threshold 6, of the same weight for all."""
    torch.manual_seed(m + n + k)
    layer = library.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = library.nn.Int8Params(torch.randn(n, k), requires_grad=False)
    return layer.to("cpu").eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["layers", "products"], help="both unless given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "thread"], default="thread")
    parser.add_argument("--rows", type=int, nargs="*", help="only shapes of so many rows")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line of the comparison")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # one of bitsandbytes' a call
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    kept = {"threads": options.threads, "timing": options.clock}
    kept |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    versions = {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__, "halfbyte": halfbyte.__version__}
    print(json.dumps({"provenance": {"cpu": processor(), **versions}}))
    with torch.no_grad():
        shapes = [[shape for shape in them if shape[0] in (options.rows or shape)] for them in (LAYERS, PRODUCTS)]
        for m, n, k in shapes[0] if options.what != "products" else ():
            pair = {library.__name__: layers(library, m, n, k) for library in (halfbyte, bitsandbytes)}
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                x = torch.randn(m, k).to(dtype)
                x[:, [3, 77, 1000, 2222]] *= 20
                calls = {name: lambda layer=layer, x=x: layer(x) for name, layer in pair.items()}
                for peer, us in best(calls, clock, options.seconds).items():
                    form = str(dtype).removeprefix("torch.")
                    line = {"op": "int8 layer, threshold 6", "peer": peer, **kept, "form": form}
                    print(json.dumps({**line, "m": m, "n": n, "k": k, "us": us}), flush=True)
        for m, n, k in shapes[1] if options.what != "layers" else ():
            a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
            calls = {
                "halfbyte": lambda a=a, b=b: halfbyte.functional.int8_linear_matmul(a, b),
                "bitsandbytes": lambda a=a, b=b: bitsandbytes.functional.int8_linear_matmul(a, b),
                "torch._int_mm": lambda a=a, b=b: torch._int_mm(a, b.t()),
            }
            same = torch.equal(calls["halfbyte"](), calls["torch._int_mm"]())
            for peer, us in best(calls, clock, options.seconds).items():
                line = {"op": "int8 product", "peer": peer, **kept, "m": m, "n": n, "k": k, "us": us}
                print(json.dumps({**line, "equal": same} if peer == "halfbyte" else line), flush=True)


if __name__ == "__main__":
    main()
