"""The measurements of several weights in one call: layers that share an input, and experts."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

import halfbyte
from halfbyte.cli.bench.cases import Case, Packed, forward_calls, normal, random_weight
from halfbyte.cli.bench.peers import DOUBLE, FourBit, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from halfbyte.cli.bench.clock import Call
    from halfbyte.cli.bench.peers import Peer
    from halfbyte.cli.bench.plan import Plan

SEPARATE, TOGETHER = "separate", "together"

# What this build may be without, and then is not measured.
_matmul_group: Any = getattr(halfbyte, "matmul_4bit_group", None)
_matmul_experts: Any = getattr(halfbyte, "matmul_4bit_experts", None)
_Experts: Any = getattr(halfbyte.nn, "Experts4bit", None)


def group(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure layers that share an input: one product each, and all in one call.

    In one call, torch multiplies with the concatenated weights; bitsandbytes has no such thing.
    """
    for sizes, k in plan.groups:
        n = sum(sizes)
        weights = [random_weight(plan, rows, k) for rows in sizes]
        ways: list[tuple[Peer, str, str, Callable[[Tensor], list[Call]]]] = []
        for peer in peers:
            for form in peer.forms:
                nbytes = weight_bytes(n * k, form)
                parts = [Packed(plan, peer, weight, form, nbytes) for weight in weights]
                ways.append((peer, form, SEPARATE, partial(_separate, peer, parts)))
                if not isinstance(peer, FourBit):
                    whole = Packed(plan, peer, torch.cat(weights), form)
                    ways.append((peer, form, TOGETHER, partial(forward_calls, whole)))
                elif peer.library is halfbyte and _matmul_group is not None:
                    ways.append((peer, form, TOGETHER, partial(_in_one, parts)))
        for m in plan.few_ms:
            x = normal(plan, m, k)
            for peer, form, way, calls in ways:
                size: dict[str, int | str] = {"m": m, "layers": "+".join(map(str, sizes)), "k": k, "way": way}
                nbytes = weight_bytes(n * k, form) + 2 * m * (n + k)
                yield Case("group", peer.name, form, size, partial(calls, x), nbytes=nbytes, flops=2 * m * n * k)


def _members(parts: Sequence[Packed], m: int) -> list[tuple[Any, ...]]:
    return list(zip(*(part(m) for part in parts), strict=True))


def _separate(peer: Peer, parts: Sequence[Packed], x: Tensor) -> list[Call]:
    def call(members: Sequence[Any]) -> list[Tensor]:
        return [peer.product(x, member) for member in members]

    return [partial(call, members) for members in _members(parts, len(x))]


def _in_one(parts: Sequence[Packed], x: Tensor) -> list[Call]:
    return [partial(_matmul_group, x, list(members)) for members in _members(parts, len(x))]


def experts(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure a mixture of experts: each row times the weight of its expert, rows sorted by expert; and whole layers.

    Every call has another random choice of experts, so that their weights leave the cache. torch multiplies by
    :func:`torch.nn.functional.grouped_mm`; bitsandbytes expert by expert, with the choice known on the host.
    """
    sizes = plan.experts
    for n, k in ((2 * sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate)):
        weight = random_weight(plan, sizes.experts, n, k)
        ways: list[tuple[Peer, str, str, Callable[[Tensor, list[Tensor]], list[Call]]]] = []
        for peer in peers:
            for form in peer.forms:
                if not isinstance(peer, FourBit):
                    ways.append((peer, form, TOGETHER, partial(_dense_experts, weight)))
                elif peer.library is not halfbyte:
                    ways.append((peer, form, SEPARATE, partial(_experts_in_turn, peer, form, weight)))
                elif _matmul_experts is not None:
                    ways.append((peer, form, TOGETHER, partial(_experts_in_one, peer, form, weight)))
        name = f"{sizes.experts} × ({n} × {k}), {sizes.active} a token"
        for m in plan.few_ms:
            rows = m * sizes.active
            x = normal(plan, rows, k)
            choices = [_begins(plan, _choose(plan, m)) for _ in range(_CHOICES)]
            used = sum(int((ends.diff() > 0).sum()) for ends in choices) / len(choices)
            for peer, form, way, calls in ways:
                nbytes = weight_bytes(int(used * n * k), form) + 2 * rows * (n + k)
                size: dict[str, int | str] = {"m": m, "sizes": name, "way": way}
                make = partial(calls, x, choices)
                yield Case("experts", peer.name, form, size, make, nbytes=nbytes, flops=2 * rows * n * k)

    yield from _expert_layers(plan, peers)


_CHOICES = 16


def _choose(plan: Plan, m: int) -> Tensor:
    """Choose each token's experts, ``[M, active]``."""
    chances = torch.rand(m, plan.experts.experts, device=plan.device)
    return chances.topk(plan.experts.active, dim=-1).indices


def _begins(plan: Plan, chosen: Tensor) -> Tensor:
    """Return where the rows of each expert begin, once they are sorted by expert: int32 ``[E + 1]``."""
    every = torch.arange(plan.experts.experts + 1, device=chosen.device)
    return (chosen.flatten()[:, None] < every).sum(0, dtype=torch.int32)


def _dense_experts(weight: Tensor, x: Tensor, choices: Sequence[Tensor]) -> list[Call]:
    transposed = weight.transpose(1, 2)
    return [partial(functional.grouped_mm, x, transposed, offs=begins[1:]) for begins in choices]


def _experts_in_one(peer: Peer, form: str, weight: Tensor, x: Tensor, choices: Sequence[Tensor]) -> list[Call]:
    packed = peer.pack(weight, form)
    return [partial(_matmul_experts, x, begins, *packed) for begins in choices]


def _experts_in_turn(peer: Peer, form: str, weight: Tensor, x: Tensor, choices: Sequence[Tensor]) -> list[Call]:
    packed = [peer.pack(one, form) for one in weight]

    def call(parts: Sequence[tuple[Tensor, Any]]) -> list[Tensor]:
        return [peer.product(rows, expert) for rows, expert in parts]

    calls: list[Call] = []
    for begins in choices:
        at = begins.tolist()
        spans = [(first, end, expert) for expert, (first, end) in enumerate(pairwise(at)) if first < end]
        calls.append(partial(call, [(x[first:end], packed[expert]) for first, end, expert in spans]))
    return calls


def _expert_layers(plan: Plan, peers: Sequence[Peer]) -> Iterator[Case]:
    """Measure whole layers of gated experts: sorting the rows, both products, the activation and the weighted sum."""
    sizes = plan.experts
    name = f"layer of {sizes.experts} × ({sizes.hidden}, {sizes.intermediate}), {sizes.active} a token"
    for m in plan.few_ms:
        x = normal(plan, m, sizes.hidden)
        choices = [_choose(plan, m) for _ in range(_CHOICES)]
        for peer in peers:
            if isinstance(peer, FourBit) and (peer.library is not halfbyte or _Experts is None):
                continue
            for form in peer.forms:
                make = partial(_layer_calls, plan, form, x, choices)
                size: dict[str, int | str] = {"m": m, "sizes": name, "way": TOGETHER}
                yield Case("experts", peer.name, form, size, make)


def _layer_calls(plan: Plan, form: str, x: Tensor, choices: Sequence[Tensor]) -> list[Call]:
    experts, hidden, intermediate = plan.experts.experts, plan.experts.hidden, plan.experts.intermediate
    if form == "bf16":
        up, down = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
        layer: Any = partial(_dense_layer, plan, random_weight(plan, *up), random_weight(plan, *down))
    else:
        double = form == DOUBLE
        layer = _Experts(experts, hidden, intermediate, compress_statistics=double, device=plan.device).to(plan.device)
    weights = torch.full(choices[0].shape, 1 / plan.experts.active, device=plan.device, dtype=x.dtype)
    return [partial(layer, x, chosen, weights) for chosen in choices]


def _dense_layer(plan: Plan, gate_up: Tensor, down: Tensor, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    order = chosen.flatten().argsort()
    token = order // chosen.shape[1]
    ends = _begins(plan, chosen)[1:]
    gate, up = functional.grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = functional.grouped_mm(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add_(0, token, y * weights.flatten()[order, None])
