"""The 4-bit product of many rows, every form of its kernel beside cuBLAS and dequantize + cuBLAS, JSON lines.

``python benches/many_rows.py`` on a Hopper GPU. Microseconds a product, in a graph over several weights so that none is
left in the L2: what ``MOST`` and ``SIZES`` in ``matmul_large.rs`` are chosen by. ``tests/test_cuda_matmul_large.py`` is
what shows that the forms are right.
"""

import json

import torch
import torch.nn.functional as F

import halfbyte as hb
from halfbyte import _native
from halfbyte._matmul import statistics
from halfbyte.cli.bench import clock, record

SHAPES = [(14336, 4096), (4096, 14336), (28672, 8192), (4096, 4096)]
ROWS = [64, 128, 256, 512, 1024, 2048, 8192]
# tokens of a tile, blocks that have the tiles: what does not come out even is shared along K
FORMS = {f"{tokens}/{blocks}": (tokens, blocks) for tokens in (128, 256) for blocks in (64, 128, 132)}
FORMS["plan"] = (0, 0)


def forced(x, packed, state, form):
    out = x.new_empty(x.shape[0], state.shape[0])
    absmax, nested = statistics(state, x.device)
    arguments = (x, packed, absmax, out, state.quant_type, state.blocksize, None, *nested)
    assert _native.matmul_4bit_large(*arguments, *form), (form, state.shape)
    return out


def measure(n, k, m):
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    dense = [weight.clone() for _ in range(clock.copies(n * k * 2, m))]
    row = {"cublas": clock.graph_us([lambda w=w: F.linear(x, w) for w in dense])}
    for name, nested in (("", False), (" dq", True)):
        packs = [
            hb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
            for _ in range(clock.copies(n * k // 2, m))
        ]
        row[f"dequantize{name}"] = clock.graph_us(
            [lambda p=p, s=s: F.linear(x, hb.functional.dequantize_4bit(p, s)) for p, s in packs]
        )
        row[f"today{name}"] = clock.graph_us([lambda p=p, s=s: hb.matmul_4bit(x, p, s) for p, s in packs])
        for form, options in FORMS.items():
            if nested and form != "plan":
                continue
            row[form + name] = clock.graph_us([lambda p=p, s=s, o=options: forced(x, p, s, o) for p, s in packs])
    return {name: round(us, 2) for name, us in row.items()}


def main():
    command = {"command": "python benches/many_rows.py"}
    print(json.dumps({"provenance": record.provenance(torch.device("cuda")) | command}))
    for n, k in SHAPES:
        for m in ROWS:
            print(json.dumps({"op": "matmul_4bit_many_rows", "N": n, "K": k, "M": m, "us": measure(n, k, m)}))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
