"""Run every CUDA kernel that this GPU uses on small, ragged data: for compute-sanitizer, not a test of results.

usage: compute-sanitizer --tool memcheck|racecheck|initcheck --error-exitcode 1 python tests/sanitize_cuda.py [PART ...]

Parts are four_bit, experts, int8 and optim; without one, all. racecheck is slow: give it a part at a time. The program
ends with the kernels of the parts that have an image for this GPU and were not launched: those that it leaves to other
GPUs, or that somebody forgot here.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

import torch

from halfbyte import _native, optim

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are named; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)}; all without one")
    parts = parser.parse_args(arguments).part
    for part in parts:
        if part not in PARTS:
            parser.error(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    # Sums and flags of products go where anything may be; here that has been written, for initcheck, large and small.
    [torch.zeros(size, device="cuda") for size in [1 << 24, *[1 << 17] * 64]]
    for part in parts or PARTS:
        start = time.perf_counter()
        for dtype in DTYPES:
            PARTS[part](dtype)
        torch.cuda.synchronize()
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    left = sorted(
        f"{family}.{entry}"
        for family, entry, loaded in _native.cuda_kernels(torch.cuda.current_device())
        if not loaded and part_of(family) in (parts or PARTS)
    )
    print("not launched:", *(left or ["none"]), sep="\n  ")
    return 0


def part_of(family: str) -> str:
    """The part of a family of images."""
    if family.startswith("four_bit_experts"):
        return "experts"
    return {"int8": "int8", "optim": "optim"}.get(family.split("_")[0], "four_bit")


def dynamic_code() -> torch.Tensor:
    return torch.tensor(_native.dynamic_map(True)).cuda()


def four_bit(dtype: torch.dtype) -> None:
    """4 and 8 bits: quantizing, by search and into given scales, decoding, products of each number of rows."""
    code = dynamic_code()
    quantizing(dtype, code)
    products(dtype, code)
    gated(dtype, code)


def quantizing(dtype: torch.dtype, code: torch.Tensor) -> None:
    """Codes and scales of blocks of each size, there and back."""
    for n, block in ((1, 64), (5001, 32), (4096 * 2 + 33, 64), (4096 * 3 + 7, 512), (4096 * 5, 4096)):
        blocks = -(-n // block)
        a = torch.randn(n).to(dtype).cuda()
        packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device="cuda")
        absmax = torch.empty(blocks, device="cuda")
        out = torch.empty(n, dtype=dtype, device="cuda")
        for kind in ("nf4", "fp4"):
            _native.quantize_4bit(a, packed, absmax, kind, block)
            _native.dequantize_4bit(packed, absmax, out, kind, block)
            _native.quantize_4bit(a, packed, absmax, kind, block, True)
            _native.encode_4bit(a, packed, absmax, kind, block)
        offset = absmax.mean()
        codes = torch.empty(blocks, dtype=torch.uint8, device="cuda")
        nested = torch.empty(-(-blocks // 256), device="cuda")
        _native.quantize_blockwise(absmax, code, codes, nested, 256, offset)
        stats = {"nested_absmax": nested, "nested_code": code, "nested_offset": offset}
        _native.encode_4bit(a, packed, codes, "nf4", block, **stats)
        _native.dequantize_4bit(packed, codes, out, "nf4", block, **stats)
        bytes_ = torch.empty(n, dtype=torch.uint8, device="cuda")
        _native.quantize_blockwise(a, code, bytes_, absmax, block)
        _native.dequantize_blockwise(bytes_, code, absmax, out, block)
        odd = torch.empty(-(-n // 100), device="cuda")
        _native.quantize_blockwise(a, code, bytes_, odd, 100)
        _native.quantize_blockwise(a, torch.linspace(-1, 1, 256).cuda() ** 5, bytes_, absmax, block)


def products(dtype: torch.dtype, code: torch.Tensor) -> None:
    """A product for each kernel, with plain and with nested scales."""
    shapes = [(1, 33, 320), (8, 300, 1024), (8, 16, 8192), (9, 17, 64), (16, 4000, 192), (3, 20, 77), (30, 9, 65)]
    if dtype != torch.float32:  # the last are as many rows of the weight as make a block take 256
        shapes += [
            (20, 300, 1088),
            (40, 130, 2048),
            (100, 40, 320),
            (12, 17_000, 64),
            (20, 17_000, 64),
            (40, 17_000, 64),
            (300, 136, 512),
        ]
    for m, n, k in shapes:
        block = 64
        w = torch.randn(n * k).cuda()
        packed = torch.empty((n * k + 1) // 2, dtype=torch.uint8, device="cuda")
        absmax = torch.empty(-(-n * k // block), device="cuda")
        _native.quantize_4bit(w, packed, absmax, "nf4", block)
        x, bias = torch.randn(m, k).to(dtype).cuda(), torch.randn(n).to(dtype).cuda()
        y = torch.empty(m, n, dtype=dtype, device="cuda")
        _native.matmul_4bit(x, packed, absmax, y, "nf4", block, bias)
        offset = absmax.mean()
        codes = torch.empty(absmax.numel(), dtype=torch.uint8, device="cuda")
        nested = torch.empty(-(-absmax.numel() // 256), device="cuda")
        _native.quantize_blockwise(absmax, code, codes, nested, 256, offset)
        _native.matmul_4bit(x, packed, codes, y, "nf4", block, None, nested, code, offset)
        if k % 64 == 0 and m >= 30 and dtype != torch.float32:  # the kernel for many rows, where the GPU has it
            for tokens, blocks in ((128, 1), (128, 3), (256, 1), (256, 3)):
                if blocks <= -(-m // tokens) * -(-n // 128) * -(-k // 256):
                    form = {"tokens": tokens, "blocks": blocks}
                    _native.matmul_4bit_large(x, packed, absmax, y, "nf4", block, bias, **form)
                    _native.matmul_4bit_large(x, packed, codes, y, "nf4", block, None, nested, code, offset, **form)
        y.cpu()


def gated(dtype: torch.dtype, code: torch.Tensor) -> None:
    """Products that gate, of one part of K and of two, by one launch where that is so, and gates alone."""
    for m, n, k in ((1, 16, 64), (8, 40, 8192), (3, 300, 1088), (5, 4100, 64), (40, 9, 128)):
        packed = torch.empty(n * k, dtype=torch.uint8, device="cuda")
        absmax = torch.empty(2 * n * k // 64, device="cuda")
        _native.quantize_4bit(torch.randn(2 * n * k).cuda(), packed, absmax, "nf4", 64)
        codes = torch.empty(absmax.numel(), dtype=torch.uint8, device="cuda")
        nested = torch.empty(-(-absmax.numel() // 256), device="cuda")
        offset = absmax.mean()
        _native.quantize_blockwise(absmax, code, codes, nested, 256, offset)
        x, bias = torch.randn(m, k).to(dtype).cuda(), torch.randn(2 * n).to(dtype).cuda()
        out = torch.empty(m, n, dtype=dtype, device="cuda")
        for gate in ("silu", "gelu_tanh"):
            _native.matmul_4bit_gated(x, packed, absmax, out, "nf4", 64, gate, bias)
            _native.matmul_4bit_gated(x, packed, codes, out, "nf4", 64, gate, None, nested, code, offset)
            _native.gate(torch.randn(m, 2 * n).to(dtype).cuda(), out, gate)
        out.cpu()


def experts(dtype: torch.dtype) -> None:
    """Groups of weights, and stacks of experts: few and many rows each, ragged and not, plain and nested."""
    code = dynamic_code()
    cases = (((2, 0, 1, 3), 33, 320), ((9, 0, 40), 20, 768), ((1, 0, 70, 17), 16, 1024), ((3, 2), 7, 77), ((1,), 1, 64))
    for counts, n, k in cases:
        e = len(counts)
        packed = torch.empty((e * n * k + 1) // 2, dtype=torch.uint8, device="cuda")
        absmax = torch.empty(-(-e * n * k // 64), device="cuda")
        _native.quantize_4bit(torch.randn(e * n * k).cuda(), packed, absmax, "nf4", 64)
        codes = torch.empty(absmax.numel(), dtype=torch.uint8, device="cuda")
        nested = torch.empty(-(-absmax.numel() // 256), device="cuda")
        offset = absmax.mean()
        _native.quantize_blockwise(absmax, code, codes, nested, 256, offset)
        index = torch.repeat_interleave(torch.arange(e), torch.tensor(counts))
        index = torch.cat([index, torch.tensor([-1, e])]).cuda()  # and two rows of nobody
        s = index.numel()
        ends = torch.empty(e + 1, dtype=torch.int32, device="cuda")
        order, inverse = torch.empty(2, s, dtype=torch.int32, device="cuda")
        for number in (index, index.int()):
            _native.route_experts(number, ends, order, inverse)
        x, bias = torch.randn(s, k).to(dtype).cuda(), torch.randn(e, n).to(dtype).cuda()
        out = torch.empty(s, n, dtype=dtype, device="cuda")
        _native.matmul_4bit_experts(x, ends, packed, absmax, out, "nf4", 64, bias)
        _native.matmul_4bit_experts(x, ends, packed, codes, out, "nf4", 64, None, nested, code, offset)
        if dtype != torch.float32:
            _native.clear_expert_rows(ends, out)
        first = packed[: (n * k + 1) // 2], absmax[: -(-n * k // 64)]
        outs = torch.empty(2, 3, n, dtype=dtype, device="cuda")
        pieces = [(*first, out, added, None, None, None, 256) for out, added in zip(outs, (None, bias[0]), strict=True)]
        _native.matmul_4bit_group(x[:3], pieces, "nf4", 64)
        out.cpu(), outs.cpu(), order.cpu(), inverse.cpu()


def int8(dtype: torch.dtype) -> None:
    """LLM.int8: rows, columns, products by each kernel and whole layers, with no, some and only outlier columns."""
    shapes = ((1, 40, 256), (9, 333, 1040), (20, 48, 528), (70, 130, 144), (130, 300, 272), (300, 70, 128), (3, 7, 99))
    # For each size of tiles, and for the long rows.
    shapes += ((40, 9, 99), (40, 48, 128), (257, 8192, 128), (2, 48, 2064), (5, 9, 4224))
    for m, n, k in shapes:
        x, w = torch.randn(m, k), torch.randint(-127, 128, (n, k), dtype=torch.int8).cuda()
        x[0, k // 2] = 30.0
        column_stats, bias = torch.rand(n).cuda(), torch.randn(n).to(dtype).cuda()
        q, out = torch.empty(m, k, dtype=torch.int8, device="cuda"), torch.empty(m, n, dtype=dtype, device="cuda")
        stats, sums = torch.empty(m, device="cuda"), torch.empty(m, n, dtype=torch.int32, device="cuda")
        outliers = torch.empty(-(-k // 32), dtype=torch.int32, device="cuda")
        columns = torch.empty(k, dtype=torch.int64, device="cuda")
        count = torch.empty(1, dtype=torch.int32, device="cuda")
        for scale in (1.0, 1000.0):
            a = (x * scale).to(dtype).cuda()
            _native.int8_quantize_rows(a, q, stats, 6.0, outliers)
            _native.int8_outlier_columns(outliers, columns, count)
            _native.int8_outlier_bitmap(columns[: int(count)], outliers, k)
            _native.int8_matmul(q, stats, w, column_stats, out, bias, a, outliers)
            _native.int8_zero_columns(q, outliers)
            for threshold in (0.0, 6.0):
                size = _native.int8_linear_workspace(a, n, threshold)
                workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
                _native.int8_linear(a, w, column_stats, out, workspace, bias, threshold)
        _native.int8_quantize_rows(a, q, stats)
        _native.int8_matmul(q, stats, w, column_stats, out)
        _native.int8_matmul_int32(q, w, sums)
        _native.int8_mm_dequant(sums, stats, column_stats, out, bias)
        back, by_column = torch.empty(m, k, dtype=dtype, device="cuda"), torch.empty(k, device="cuda")
        _native.int8_dequantize_rows(q, stats, back)
        _native.int8_column_stats(a, by_column, 6.0)
        _native.int8_quantize_columns(a, by_column, q, 6.0)
        out.cpu(), back.cpu(), q.cpu()


def optimizer_state(rule: str, n: int, bits: int) -> dict[str, object]:
    """States of zeros of a parameter of `n` elements."""
    halves = {"adam": ((1, n), (1, n)), "lamb": ((1, n), (1, n)), "ademamix": ((2, n), (1, n))}.get(rule, ((1, n),))
    state: dict[str, object] = {"step": 0}
    for number, (rows, length) in enumerate(halves, 1):
        kind = torch.uint8 if bits == 8 else torch.float32
        state[f"state{number}"] = torch.zeros(rows, length, dtype=kind, device="cuda")
        state[f"absmax{number}"] = torch.zeros(rows, -(-length // 256), device="cuda")
    if rule in ("lars", "lamb"):
        state["unorm_vec"] = torch.zeros(1, device="cuda")
    return state


def optimizers(dtype: torch.dtype) -> None:
    """Every rule over ragged, misaligned, large and mixed groups; extras, sums, step counts on the device."""
    rules = ("adam", "ademamix", "lion", "momentum", "lars", "lamb", "rmsprop", "adagrad")
    total = torch.zeros(1, device="cuda")
    for rule in rules:
        for extra in ("none", "master", "compensation", "chance", "device"):
            if dtype == torch.float32 and extra in ("master", "compensation"):
                continue  # of 16-bit parameters
            sizes, states = [1, 300, 256 * 40, 5003, 777], []
            params = [torch.randn(n, device="cuda").to(dtype) for n in sizes[:-1]]
            params.append(torch.randn(sizes[-1] + 1, device="cuda").to(dtype)[1:])
            if extra == "none":  # large enough for tiles, where a GPU has them
                params.append(torch.randn((1 << 20) + 700, device="cuda").to(dtype))
            for number, param in enumerate(params):
                state = optimizer_state(rule, param.numel(), 8 if number % 2 else 32)
                if extra == "master":
                    state["master"] = param.float()
                if extra == "compensation":
                    state["compensation"] = torch.zeros_like(param)
                states.append(state)
            plan = _native.OptimPlan(rule, params, states, extra == "device")
            grads = [torch.randn_like(param) for param in params]
            grads[3] = grads[3].float()
            for step in range(2):
                given = [None if step and number == 1 else grad for number, grad in enumerate(grads)]
                chance = {"stochastic": extra == "chance", "seed": 7}
                plan.step(1e-3, weight_decay=0.1, max_unorm=0.1, beta3=0.9, alpha=1.0, grads=given, **chance)
            _native.optim_grad_norm([plan, plan], total, [grads, grads])
            total.item()
    # States that lie in managed memory, with tiles and without.
    for kind in (optim.PagedAdamW8bit, optim.PagedLion8bit, optim.PagedAdEMAMix8bit, optim.PagedAdamW32bit):
        weights = [torch.nn.Parameter(torch.randn(n, device="cuda").to(dtype)) for n in ((1 << 20) + 700, 150_001)]
        optimizer = kind(weights, lr=1e-3)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        torch.cuda.synchronize()


PARTS: dict[str, Callable[[torch.dtype], None]] = {
    "four_bit": four_bit,
    "experts": experts,
    "int8": int8,
    "optim": optimizers,
}


if __name__ == "__main__":
    sys.exit(main())
