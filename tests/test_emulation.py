"""The 4-bit products with a CPU in place of the GPU: right whatever the order of threads, copies and MMAs.

See cuda/emulation/machine.h for what that shows. It says nothing of speed, and knows the hardware's rules as PTX's
manual has them.
"""

import random
from dataclasses import dataclass
from math import ceil

import emulation
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulation.why_not() is not None, reason=f"no programs: {emulation.why_not()}"),
]


@dataclass(frozen=True)
class Kernel:
    which: str
    element: str
    tokens: int
    nested: bool | None = None  # None: both

    @property
    def source(self):
        return f"four_bit_{self.which.lower()}.cu"

    def build(self, changes=()):
        defines = {"ELEMENT": self.element, "TOKENS": str(self.tokens)}
        if self.nested is not None:
            defines["NESTED"] = str(int(self.nested))
        return emulation.build(self.source, self.which, defines, changes)


KERNELS = {
    "mma bf16 8": Kernel("MMA", "Bf16", 8),
    "mma f16 16": Kernel("MMA", "F16", 16),
    "stream bf16": Kernel("STREAM", "Bf16", 8, nested=False),
    "stream f16": Kernel("STREAM", "F16", 8, nested=False),
    "stream nested bf16": Kernel("STREAM", "Bf16", 8, nested=True),
    "stream nested f16": Kernel("STREAM", "F16", 8, nested=True),
    "stream bf16 16": Kernel("STREAM", "Bf16", 16, nested=False),
    "stream nested f16 16": Kernel("STREAM", "F16", 16, nested=True),
    "wgmma bf16 32": Kernel("WGMMA", "Bf16", 32),
    "wgmma f16 32": Kernel("WGMMA", "F16", 32),
    "wgmma bf16 64": Kernel("WGMMA", "Bf16", 64),
    "large bf16 128": Kernel("LARGE", "Bf16", 128),
    "large f16 256": Kernel("LARGE", "F16", 256),
    "large bf16 256": Kernel("LARGE", "Bf16", 256),
}

KB = 1024


def stream(draw, kernel, k, seed):
    """As ``Plan`` of matmul_stream.rs, on a GPU with few multiprocessors."""
    # What is the same with a gate and without is drawn alike.
    gate = [0, 1, 0, 2, 0][seed % 5] if kernel.tokens == 8 else 0
    rows = [draw.choice([1, 16, 17, 40, 64, 100, 160, 300]) for _ in range(draw.choice([1, 1, 2, 3]))]
    if gate:
        rows = [max(n, 16) for n in rows]
    cluster, multiprocessors = draw.choice([1, 1, 2]), draw.choice([2, 3, 4, 6])
    step = 2 if gate else 1  # pairs of tiles
    all_tiles = [ceil(n / 16) * step for n in rows]

    def clusters(tiles):
        return sum(ceil(t / tiles) for t in all_tiles)

    tiles = step
    while clusters(tiles) > max(multiprocessors // cluster, len(rows)):
        tiles += step
    if cluster == 2 and tiles > 8:
        cluster = 1
    slices = ceil(ceil(k / 128) / cluster)
    few = kernel.tokens == 8
    most = 16 if few else 12
    steps = ceil(slices / most)
    even = 2 if few else 4
    warps = ceil(slices / steps / even) * even
    stage = 32 * (most * 2 * 32 + 32 + (most * 2 + 4) * 4)
    static = {(8, 0): 4, (8, 1): 8, (16, 0): 1, (16, 1): 5}[kernel.tokens, kernel.nested]
    shared = (128 + most - static) * KB + (2 if few else 3) * stage
    threads = (warps + (2 if few and not kernel.nested else 4)) * 32
    sizes = {"shared": shared, "threads": threads, "registers": 128}
    return {"n": rows, "tiles": tiles, "cluster": cluster, "gate": gate, "settled": seed // 5 % 2, **sizes}


def mma(draw, kernel, m, k):
    n = draw.choice([1, 16, 17, 40, 100, 160, 300])
    tiles = draw.choice([1, 2, 3, 7])
    tiles_per_pass = draw.randint(1, tiles)
    warps = draw.choice([w for w in (1, 2, 4, 8) if w <= ceil(k / 256)])
    columns, stages = kernel.tokens // 8, 6 if kernel.tokens == 8 else 4
    shared = warps * (stages * 2304 + tiles_per_pass * 512 * columns)
    blocks = {"blocks_x": ceil(n / 16 / tiles), "blocks_y": ceil(m / kernel.tokens), "threads": warps * 32}
    return {"n": [n], "tiles": tiles, "tiles_per_pass": tiles_per_pass, "shared": shared, **blocks}


def wgmma(draw, kernel, m, k):
    n = draw.choice([1, 8, 100, 128, 130, 256, 300])
    rows = draw.choice([128, 192])
    blocks = split(draw, ceil(n / rows) * ceil(m / kernel.tokens), ceil(k / 256))
    sizes = {"threads": 512, "registers": 128} if rows == 192 else {"threads": 384, "registers": 168}
    return {"n": [n], "rows": rows, "shared": 223 * KB, **blocks, **sizes}


def large(draw, kernel, m, k):
    n = draw.choice([7, 100, 128, 136, 200, 300])
    tiles = ceil(n / 128) * ceil(m / kernel.tokens)
    return {"n": [n], "group": draw.choice([1, 2, 8]), "shared": 223 * KB, **split(draw, tiles, ceil(k / 256))}


def split(draw, tiles, stages):
    """Blocks, and how many of the tiles they share along K; as ``split.cuh`` has it."""
    blocks = draw.choice([1, 2, 3, 4, 5, 7])
    line = draw.choice([0, tiles, max(tiles - blocks, 0)])
    return {"blocks_x": min(blocks, line * stages if line else tiles), "line": line}


def settings(kernel, seed, blocks):
    """A product that the kernel takes, with one of ``blocks`` times 64 for K, and the launch for it."""
    draw = random.Random(seed)
    k = 64 * draw.choice(blocks)
    m = draw.randint(1, kernel.tokens if kernel.which == "STREAM" else kernel.tokens * 5 // 4)  # two tiles now and then
    nested = draw.random() < 0.5 if kernel.nested is None else kernel.nested
    if kernel.which == "STREAM":
        launch = stream(draw, kernel, k, seed)
    else:
        launch = {"MMA": mma, "WGMMA": wgmma, "LARGE": large}[kernel.which](draw, kernel, m, k)
    return {
        "m": m,
        "k": k,
        "block": draw.choice([64, 64, 64, 128, 256, 4096]),
        "fp4": draw.random() < 0.3,
        "nested": nested,
        "bias": draw.random() < 0.5,
        "shift": draw.choice([0, 0, 0, 1, 4]),
        "seed": seed,
        "lateness": draw.choice([0, 1, 40, 200, 600]),
        **launch,
    }


def wrong(kernel, runs, blocks, changes=(), **others):
    """What the programs say that fail."""
    program = kernel.build(changes)
    launches = [settings(kernel, seed, blocks) | others for seed in range(runs)]
    return emulation.failures(program, launches)


@pytest.mark.parametrize("name", KERNELS)
def test_products_are_right_in_any_order(name):
    runs = 12 if KERNELS[name].tokens == 256 else 24
    assert wrong(KERNELS[name], runs, [1, 2, 3, 4, 5, 8, 11, 12, 16, 17, 20, 28, 32, 33]) == []


# What stands in a kernel and what a mistake would have there, in one place or more.
MISTAKES = {
    "a copy is not waited for": ("mma bf16 8", "wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();"),
    "scales are read before they are written": (
        "mma f16 16",
        "                __syncwarp();  // copies and scales of all lanes are there, and the stage before is read\n",
        "",
    ),
    "a stage is filled before it is empty": (
        "stream bf16",
        "        barrier_wait(share.empty + turn.stage * 8, turn.parity ^ 1);\n        copy_weights<TILE>",
        "        copy_weights<TILE>",
    ),
    "sums are added before all are there": (
        "stream bf16",
        "                named_barrier(1, threads);\n                auto total",
        "                auto total",
    ),
    "a barrier counts too few": ("stream f16", "whole ? WARP", "whole ? WARP - 1"),
    "a barrier of codes counts too few": (
        "stream nested f16",
        "nested ? 2 * WARP / PARTS",
        "nested ? 2 * WARP / PARTS - 1",
    ),
    "a stage's second tile is not waited for": (
        "stream bf16",
        "                            landed(1);\n",
        "",
    ),
    "what is gated is taken for what follows": (
        "stream f16",
        "share.skipped = gate ? N - HALF : 0;",
        "share.skipped = 0;",
    ),
    "what the next launch reads is fetched in part": (
        "stream bf16",
        "row += SERVING * at_a_time",
        "row += WARP * at_a_time",
    ),
    "x is overwritten while it is read": (
        "stream nested f16 16",
        "                }\n                __syncwarp();\n                const bool last",
        "                }\n                const bool last",
    ),
    "x is read before it has come": (
        "wgmma bf16 32",
        "if (u % PER_X == 0) barrier_wait(x_full + x_turn.stage * 8, x_turn.parity);",
        "",
    ),
    "sums are read before the MMA is done": ("wgmma bf16 64", "mma_wait<0>(), complete(u);", "complete(u);"),
    "more registers are taken than there are": ("wgmma f16 32", "? 144 : 224;", "? 160 : 224;"),
    "weights are released while they are read": (
        "wgmma bf16 64",
        "                        decode(a[(u + 1) % 2], u + 1);\n",
        "                        if (u + 2 == UNITS && lane == 0) barrier_arrive(empty + turn.stage * 8);\n"
        "                        decode(a[(u + 1) % 2], u + 1);\n",
        "                            if (lane == 0) barrier_arrive(empty + turn.stage * 8);\n",
        "",
    ),
    "a swizzle is left out": (
        "large bf16 128",
        "const u32 to = share.packed(turn.stage, row) + (piece ^ row) * 16;",
        "const u32 to = share.packed(turn.stage, row) + piece * 16;",
    ),
    "x is given back while it is read": ("large bf16 128", "                mma_wait<1>();\n", ""),
    "sums of a block are left out": (
        "wgmma bf16 32",
        "for (u32 i = first; i < blockIdx.x; ++i) {",
        "for (u32 i = first + 1; i < blockIdx.x; ++i) {",
    ),
    "a flag is left raised": ("large bf16 128", "            split.flags[i] = 0;\n", ""),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    name, *changes = MISTAKES[mistake]
    changes = list(zip(changes[::2], changes[1::2], strict=True))
    # Long enough for rings to go round, and copies that are later than threads are slow.
    assert wrong(KERNELS[name], 12, [17, 33, 48, 64], changes, lateness=2000)
