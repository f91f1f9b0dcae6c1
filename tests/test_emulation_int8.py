"""The product of int8 codes for Hopper on a CPU in place of the GPU (``emulation.py``): codes, gathered columns, x.

Ragged shapes, tiles of each size, columns around the number from which x itself is multiplied, and mistakes that must
be found.
"""

import random
from math import ceil

import emulation
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulation.why_not() is not None, reason=f"no programs: {emulation.why_not()}"),
]

KERNELS = {"bf16 16": ("Bf16", 16), "f16 32": ("F16", 32), "bf16 64": ("Bf16", 64), "bf16 256": ("Bf16", 256)}


def settings(tokens, seed):
    """A product, and the launch for it."""
    draw = random.Random(seed)
    rows, m, n = (
        draw.choice([8, 24, 64, 72, 112, 128]),
        draw.randint(1, tokens * 5 // 4),
        draw.choice([1, 7, 60, 130, 200]),
    )
    tiles = ceil(m / tokens) * ceil(n / rows)
    steps = draw.choice([1, 1, 2, 2, 3, 5])
    # The blocks of a cluster have a step each, at least, and one tile.
    cluster = draw.choice([c for c in (1, 2, 4) if c <= steps]) if tokens <= 64 else 1
    # An MMA has 64 weights, and of a smaller tile reads on to where another tile's results can be, for sums that nobody
    # uses: the machine would find these not fenced.
    blocks = draw.choice([1, min(2, tiles), tiles]) if rows in (64, 128) and cluster == 1 else tiles
    return {
        "m": m,
        "n": n,
        "k": 128 * (steps - 1) + 16 * draw.choice([1, 3, 7, 8]),
        "rows": rows,
        "stages": 4,
        "blocks": blocks,
        "cluster": cluster,
        "threshold": draw.random() < 0.8,
        "columns": draw.choice([0, 1, 5, 15, 16, 17, 31, 32, 33, 34, 100, 10_000]),
        "most": 32,
        "counted": draw.random() < 0.7,
        "seed": seed,
        "lateness": draw.choice([0, 1, 40, 200]),
    }


def wrong(name, runs, changes=(), **others):
    """What the programs say that fail."""
    element, tokens = KERNELS[name]
    defines = {"ELEMENT": element, "TOKENS": str(tokens)}
    program = emulation.build("int8_wgmma.cu", "INT8", defines, changes, "int8.cpp")
    launches = [settings(tokens, seed) | others for seed in range(runs)]
    return emulation.failures(program, launches)


@pytest.mark.parametrize("name", KERNELS)
def test_products_are_right_in_any_order(name):
    assert wrong(name, 12 if KERNELS[name][1] == 256 else 24) == []


MANY = {"k": 1024, "rows": 64, "lateness": 2000, "threshold": 1, "counted": 1}
# What stands in the kernel and what a mistake would have there; the number of columns that shows it.
MISTAKES = {
    "codes are given back while they are read": ("mma_wait<1>();\n                    if (k > 0 &&", "if (k > 0 &&", 0),
    "entries are gathered while they are read": ("            barrier_wait(o_full + 8, parity ^ 1);\n", "", 32),
    "half of x is not copied": ("            if (DENSE) copy_box(", "            if (DENSE && k % 2) copy_box(", 100),
    "sums of a cluster are not there yet": (
        "    cluster_arrive(), cluster_wait();\n    if (share.rank",
        "    if (share.rank",
        0,
    ),
    "a swizzle is left out": ("(half * 4 + j ^ g) * 16 + 2 * t", "(half * 4 + j) * 16 + 2 * t", 100),
    "bytes have no sign": ("(apart & 0x00800080) | 0x43004300", "0x43004300", 100),
    "weights are decoded too early": (
        "        barrier_wait(full + turn.stage * 8, turn.parity);\n        const u32 at",
        "        const u32 at",
        100,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    old, new, columns = MISTAKES[mistake]
    assert wrong("bf16 16", 8, [(old, new)], columns=columns, **MANY)
