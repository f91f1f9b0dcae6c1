"""The measurements of several weights in one call: layers that share an input, and experts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

import halfbyte
from halfbyte.cli.bench.cases import Case, normal, random_weight
from halfbyte.cli.bench.peers import DOUBLE, FourBit, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from halfbyte.cli.bench.clock import Call
    from halfbyte.cli.bench.peers import Peer
    from halfbyte.cli.bench.plan import Plan

SEPARATE, TOGETHER = "separate", "together"

# What this build may be without, and then is not measured.
_matmul_group: Any = getattr(halfbyte, "matmul_4bit_group", None)
_Experts: Any = getattr(halfbyte.nn, "Experts4bit", None)


def group(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure layers that share an input: one product each, and all in one call.

    In one call, torch multiplies with the concatenated weights; bitsandbytes has no such thing.
    """
    for sizes, k in plan.groups:
        n = sum(sizes)
        weights = [random_weight(plan, rows, k) for rows in sizes]
        for m in plan.few_ms:
            x = normal(plan, m, k)
            for peer in peers:
                for form in peer.forms:
                    count = plan.copies(weight_bytes(n * k, form), m)
                    nbytes = weight_bytes(n * k, form) + 2 * m * (n + k)
                    for way, calls in _ways(peer).items():
                        size: dict[str, int | str] = {"m": m, "layers": "+".join(map(str, sizes)), "k": k, "way": way}
                        make = partial(calls, peer, form, weights, x, count)
                        yield Case("group", peer.name, form, size, make, nbytes=nbytes, flops=2 * m * n * k)


def _ways(peer: Peer) -> dict[str, Any]:
    ways: dict[str, Any] = {SEPARATE: _separate}
    if not isinstance(peer, FourBit):
        ways[TOGETHER] = _concatenated
    elif peer.library is halfbyte and _matmul_group is not None:
        ways[TOGETHER] = _in_one
    return ways


def _members(peer: Peer, form: str, weights: Sequence[Tensor], count: int) -> list[tuple[Any, ...]]:
    return list(zip(*(peer.packs(weight, form, count) for weight in weights), strict=True))


def _separate(peer: Peer, form: str, weights: Sequence[Tensor], x: Tensor, count: int) -> list[Call]:
    def call(members: Sequence[Any]) -> list[Tensor]:
        return [peer.product(x, member) for member in members]

    return [partial(call, members) for members in _members(peer, form, weights, count)]


def _concatenated(peer: Peer, form: str, weights: Sequence[Tensor], x: Tensor, count: int) -> list[Call]:
    return [partial(peer.product, x, whole) for whole in peer.packs(torch.cat(list(weights)), form, count)]


def _in_one(peer: Peer, form: str, weights: Sequence[Tensor], x: Tensor, count: int) -> list[Call]:
    members = _members(peer, form, weights, count)
    return [partial(_matmul_group, x, list(one)) for one in members]


def experts(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure a mixture of experts, routing included, with another choice of experts in every call.

    torch multiplies by :func:`torch.nn.functional.grouped_mm`; bitsandbytes has none.
    """
    sizes = plan.experts
    gate_up = random_weight(plan, sizes.experts, 2 * sizes.intermediate, sizes.hidden)
    down = random_weight(plan, sizes.experts, sizes.hidden, sizes.intermediate)
    an_expert = 3 * sizes.intermediate * sizes.hidden
    name = f"{sizes.experts} of {sizes.hidden} × {sizes.intermediate}, {sizes.active} active"
    for m in plan.few_ms:
        x = normal(plan, m, sizes.hidden)
        routes = [_route(plan, m) for _ in range(_ROUTES)]
        used = sum(len(set(index.flatten().tolist())) for index, _ in routes) // len(routes)
        for peer in peers:
            if isinstance(peer, FourBit) and (peer.library is not halfbyte or _Experts is None):
                continue
            for form in peer.forms:
                make = partial(_expert_calls, form, gate_up, down, x, routes)
                nbytes = weight_bytes(used * an_expert, form) + 4 * m * sizes.hidden
                flops = 2 * m * sizes.active * an_expert
                size: dict[str, int | str] = {"m": m, "sizes": name}
                yield Case("experts", peer.name, form, size, make, nbytes=nbytes, flops=flops)


_ROUTES = 16
"""Choices of experts to rotate through."""


def _route(plan: Plan, m: int) -> tuple[Tensor, Tensor]:
    """Return each token's experts, ``[M, active]``, and their weights."""
    chances = torch.rand(m, plan.experts.experts, device=plan.device)
    weights, index = chances.topk(plan.experts.active, dim=-1)
    return index, (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)


def _expert_calls(
    form: str, gate_up: Tensor, down: Tensor, x: Tensor, routes: Sequence[tuple[Tensor, Tensor]]
) -> list[Call]:
    layer: Any = _DenseExperts(gate_up, down)
    if form != "bf16":
        layer = _Experts(gate_up, down, quant_type="nf4", compress_statistics=form == DOUBLE)
    return [partial(layer, x, index, weights) for index, weights in routes]


class _DenseExperts:
    """Experts in bf16: gate and up in one weight ``[E, 2I, H]``, down ``[E, H, I]``."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.gate_up, self.down = gate_up.transpose(1, 2), down.transpose(1, 2)

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        flat = index.flatten()
        order = flat.argsort()
        token = order // index.shape[1]
        every = torch.arange(len(self.down), device=x.device)
        ends = (flat[:, None] == every).sum(0).cumsum(0).to(torch.int32)
        gate, up = functional.grouped_mm(x[token], self.gate_up, offs=ends).chunk(2, dim=-1)
        y = functional.grouped_mm(functional.silu(gate) * up, self.down, offs=ends)
        return torch.zeros_like(x).index_add_(0, token, y * weights.flatten()[order, None])
