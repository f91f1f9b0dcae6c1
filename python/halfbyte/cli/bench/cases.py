"""The measurements of single weights: products, their backward pass, quantizing and dequantizing, eager calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from halfbyte.cli.bench.peers import FourBit, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from halfbyte.cli.bench.clock import Call
    from halfbyte.cli.bench.peers import Peer
    from halfbyte.cli.bench.plan import Plan


_MOST_LAYERS = 12


@dataclass(frozen=True)
class Case:
    """One figure to take: the calls to time, made when it is their turn, and what it is a figure of."""

    op: str
    peer: str
    form: str
    size: dict[str, int | str]
    make: Callable[[], list[Call]]
    """Make the calls: the same work on different data, to be timed in turn."""
    nbytes: int = 0
    """Bytes that one call must read and write."""
    flops: int = 0
    timing: Literal["graph", "stream", "eager"] = "graph"
    """How it is timed on a GPU. On the CPU it is wall time."""


class Packed:
    """Copies of one weight in one form, made when they are first asked for.

    `nbytes` is what one call reads, if that is more than this weight.
    """

    def __init__(self, plan: Plan, peer: Peer, weight: Tensor, form: str, nbytes: int = 0) -> None:
        self.plan, self.peer, self.weight, self.form = plan, peer, weight, form
        self.name = peer.name
        self.nbytes = nbytes or weight_bytes(weight.numel(), form)
        self._made: list[Any] = []

    def __call__(self, m: int) -> list[Any]:
        """As many as to rotate at a batch size."""
        count = self.plan.copies(self.nbytes, m)
        if len(self._made) < count:
            self._made = self.peer.packs(self.weight, self.form, count)
        return self._made[:count]


def normal(plan: Plan, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return random normal numbers on the device."""
    return torch.randn(shape, device=plan.device, dtype=dtype)


def random_weight(plan: Plan, *shape: int) -> Tensor:
    """Return a bf16 weight as models have them."""
    return normal(plan, *shape) * 0.02


def copy_case(plan: Plan) -> Case:
    """Measure a copy: the speed of the memory."""
    elements = plan.copied_bytes // 2

    def make() -> list[Call]:
        source = normal(plan, elements)
        return [partial(torch.empty_like(source).copy_, source)] * 2

    return Case("copy", "torch", "bf16", {"elements": elements}, make, nbytes=4 * elements)


def dense_cases(plan: Plan) -> Iterator[Case]:
    """Measure large square products: the speed of the arithmetic. A CPU may be faster at it in fp32."""

    def make(n: int, dtype: torch.dtype) -> list[Call]:
        x, w = normal(plan, n, n, dtype=dtype), normal(plan, n, n, dtype=dtype)
        return [partial(torch.nn.functional.linear, x, w)] * 2

    for n in plan.dense:
        for form, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            if dtype is torch.bfloat16 or not plan.on_gpu:
                size: dict[str, int | str] = {"m": n, "n": n, "k": n}
                yield Case("dense", "torch", form, size, partial(make, n, dtype), flops=2 * n**3)


def matmul(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure ``x · wᵀ``."""
    for n, k in plan.shapes:
        weight = random_weight(plan, n, k)
        packed = [Packed(plan, peer, weight, form) for peer in peers for form in peer.forms]
        for m in plan.ms:
            x = normal(plan, m, k)
            for p in packed:
                yield _product("matmul", p, m, partial(forward_calls, p, x))


def forward_calls(p: Packed, x: Tensor) -> list[Call]:
    """Return the calls of ``x · wᵀ`` for each copy of a weight."""
    return [partial(p.peer.product, x, w) for w in p(len(x))]


def grad_input(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure the backward pass of the product, ``dy · w``, as autograd runs it."""
    for n, k in plan.shapes:
        weight = random_weight(plan, n, k)
        packed = [Packed(plan, peer, weight, form) for peer in peers for form in peer.forms]
        for m in plan.grad_ms:
            x, dy = normal(plan, m, k).requires_grad_(), normal(plan, m, n)
            for p in packed:
                yield _product("grad_input", p, m, partial(_backward_calls, p, x, dy))


def _backward_calls(p: Packed, x: Tensor, dy: Tensor) -> list[Call]:
    return [_Backward(partial(p.peer.product, x, w), x, dy) for w in p(len(x))]


class _Backward:
    """The backward pass alone. The first call makes the forward pass, on the stream of that call."""

    def __init__(self, forward: Callable[[], Tensor], x: Tensor, dy: Tensor) -> None:
        self.forward, self.x, self.dy = forward, x, dy
        self.y: Tensor | None = None

    def __call__(self) -> None:
        with torch.enable_grad():
            if self.y is None:
                self.y = self.forward()
            torch.autograd.grad(self.y, self.x, self.dy, retain_graph=True)


def _product(op: str, p: Packed, m: int, make: Callable[[], list[Call]]) -> Case:
    n, k = p.weight.shape
    nbytes = p.nbytes + 2 * m * (n + k)
    return Case(op, p.name, p.form, {"m": m, "n": n, "k": k}, make, nbytes=nbytes, flops=2 * m * n * k)


def elementwise_4bit(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure quantizing to and dequantizing from NF4, all block sizes.

    There is no floor on the CPU, here and for 8 bits: its caches may hold all of it.
    """
    weight = random_weight(plan, *plan.matrix)
    n = weight.numel()
    libraries = [peer for peer in peers if isinstance(peer, FourBit)]

    def quantize(peer: FourBit, form: str, block: int) -> list[Call]:
        return [partial(peer.pack, weight, form, block)] * 4

    def dequantize(peer: FourBit, form: str, block: int) -> list[Call]:
        return [partial(peer.functional.dequantize_4bit, *peer.pack(weight, form, block))] * 4

    for op, make in (("quantize_4bit", quantize), ("dequantize_4bit", dequantize)):
        if op not in plan.ops:
            continue
        for block in plan.blocks:
            size: dict[str, int | str] = {"elements": n, "block": block, "dtype": "bf16"}
            for peer in libraries:
                for form in peer.forms:
                    nbytes = 2 * n + weight_bytes(n, form, block) if plan.on_gpu else 0
                    calls = partial(make, peer, form, block)
                    yield Case(op, peer.name, form, size, calls, nbytes=nbytes, timing="stream")


def elementwise_8bit(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure blockwise 8-bit quantization: of weights in bf16, and of an optimizer's fp32 state."""
    libraries = [peer for peer in peers if isinstance(peer, FourBit)]

    def quantize(peer: FourBit, values: Tensor, block: int) -> list[Call]:
        return [partial(peer.functional.quantize_blockwise, values, blocksize=block)] * 4

    def dequantize(peer: FourBit, values: Tensor, block: int) -> list[Call]:
        packed = peer.functional.quantize_blockwise(values, blocksize=block)
        return [partial(peer.functional.dequantize_blockwise, *packed)] * 4

    for op, make in (("quantize_blockwise", quantize), ("dequantize_blockwise", dequantize)):
        if op not in plan.ops:
            continue
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            values = normal(plan, *plan.matrix, dtype=dtype)
            n = values.numel()
            for block in (256, 4096):
                size: dict[str, int | str] = {"elements": n, "block": block, "dtype": name}
                nbytes = n * dtype.itemsize + n + 4 * -(-n // block) if plan.on_gpu else 0
                for peer in libraries:
                    calls = partial(make, peer, values, block)
                    yield Case(op, peer.name, "8-bit", size, calls, nbytes=nbytes, timing="stream")


def eager(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure calls that no graph replays, one row: the function, and the layer around it."""
    n, k = plan.eager_shape
    weight, x = random_weight(plan, n, k), normal(plan, 1, k)

    def layers(p: Packed) -> list[Call]:
        made = [p.peer.layer(weight, p.form) for _ in range(min(_MOST_LAYERS, plan.copies(p.nbytes, 1)))]
        return [partial(layer, x) for layer in made]

    for peer in peers:
        for form in peer.forms:
            p = Packed(plan, peer, weight, form)
            for call, make in (("function", partial(forward_calls, p, x)), ("layer", partial(layers, p))):
                size: dict[str, int | str] = {"call": call, "m": 1, "n": n, "k": k}
                yield Case("eager", peer.name, form, size, make, timing="eager")
