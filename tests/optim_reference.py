"""What every optimizer should do, in double precision and as plainly as it can be said, and helpers of its tests.

:class:`ReferencePlan` takes the place of ``_native.OptimPlan``: the same constructor and the same ``step``.
"""

import math
from functools import cache

import torch

from halfbyte import _native

BLOCK = 256
RULES = ("adam", "ademamix", "lion", "momentum", "lars", "lamb", "rmsprop", "adagrad")


@cache
def dynamic_map(signed):
    return torch.tensor(_native.dynamic_map(signed), dtype=torch.float32)


def decode(codes, absmax, signed):
    """Values of 8-bit codes with a scale for every 256 of the flat tensor, fp64."""
    scales = absmax.double().flatten().repeat_interleave(BLOCK)[: codes.numel()]
    values = dynamic_map(signed).double()[codes.flatten().long().cpu()].to(codes.device)
    return (values * scales.to(codes.device)).view(codes.shape)


def encode(values, signed):
    """Nearest codes of `values`, and the largest magnitude of every 256."""
    flat = values.flatten().float()
    blocks = -(-flat.numel() // BLOCK)
    padded = torch.zeros(blocks * BLOCK, dtype=torch.float32, device=flat.device)
    padded[: flat.numel()] = flat
    absmax = padded.view(blocks, BLOCK).abs().amax(dim=1)
    scaled = padded.view(blocks, BLOCK).double() / torch.where(absmax > 0, absmax, 1.0).double()[:, None]
    table = dynamic_map(signed).double().to(flat.device)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)
    return codes.flatten()[: flat.numel()].view(values.shape).to(torch.uint8), absmax


def schedules(t, beta1, beta3, alpha, t_alpha, t_beta3):
    """AdEMAMix's slow factor and its weight at step `t`."""
    if t_alpha:
        alpha = min(t * alpha / t_alpha, alpha)
    if t_beta3:
        slow, fast, share = math.log(beta3), math.log(beta1), t / t_beta3
        beta3 = min(math.exp(fast * slow / ((1 - share) * slow + share * fast)), beta3)
    return beta3, alpha


def update(rule, p, g, s1, s2, t, lr, *, beta1=0.9, beta2=0.999, beta3=0.0, alpha=0.0, eps=1e-8, weight_decay=0.0,
           decay="decoupled", bias_correction=True, dampening=0.0, nesterov=False, maximize=False, max_unorm=0.0,
           t_alpha=None, t_beta3=None, still=None):  # fmt: skip
    """One step of one tensor, all fp64: the change of `p`, and its new states; of elements that stand `still` too."""
    if maximize:
        g = -g
    if decay == "l2":
        g = g + weight_decay * p
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
    if rule in ("adam", "lamb"):
        s1, s2 = beta1 * s1 + (1 - beta1) * g, beta2 * s2 + (1 - beta2) * g * g
        step = (s1 / c1) / ((s2 / c2).sqrt() + eps)
    elif rule == "ademamix":
        beta3, alpha = schedules(t, beta1, beta3, alpha, t_alpha, t_beta3)
        s1 = torch.stack((beta1 * s1[0] + (1 - beta1) * g, beta3 * s1[1] + (1 - beta3) * g))
        s2 = beta2 * s2 + (1 - beta2) * g * g
        step = (s1[0] / c1 + alpha * s1[1]) / ((s2 / c2).sqrt() + eps)
    elif rule == "lion":
        step = (beta1 * s1 + (1 - beta1) * g).sign()
        s1 = beta2 * s1 + (1 - beta2) * g
    elif rule in ("momentum", "lars"):
        s1 = g if t == 1 else beta1 * s1 + (1 - dampening) * g
        step = g + beta1 * s1 if nesterov else s1
    elif rule == "rmsprop":
        s1 = beta1 * s1 + (1 - beta1) * g * g
        step = g / (s1.sqrt() + eps)
    elif rule == "adagrad":
        s1 = s1 + g * g
        step = g / (s1.sqrt() + eps)
    if max_unorm > 0 and rule in ("lars", "lamb"):
        # What is not moved has no part in an update's length.
        length, limit = (step if still is None else step.masked_fill(still, 0)).norm(), max_unorm * p.norm()
        step = step * (limit / length if length > limit else 1.0)
    shrink = lr * weight_decay * p if decay == "decoupled" else 0.0
    return lr * step + shrink, s1, s2


class ReferencePlan:
    def __init__(self, rule, params, states, capturable=False):
        self.rule, self.params, self.states = rule, params, states

    def step(self, lr, beta1=0.9, beta2=0.999, beta3=0.0, alpha=0.0, eps=1e-8, weight_decay=0.0, *, grads=None,
             skip_zeros=False, gnorm_scale=1.0, grad_scale=None, found_inf=None, total_norm=None, max_norm=None,
             stochastic=False, seed=0, **options):  # fmt: skip
        assert not stochastic
        options |= {"beta1": beta1, "beta2": beta2, "beta3": beta3, "alpha": alpha, "eps": eps}
        if found_inf is not None and float(found_inf) != 0:
            return 0
        scale = gnorm_scale / (1.0 if grad_scale is None else float(grad_scale))
        if max_norm is not None:
            scale *= min(1.0, max_norm / (float(total_norm) + 1e-6))
        done = 0
        for index, (p, state) in enumerate(zip(self.params, self.states, strict=True)):
            g = p.grad if grads is None else grads[index]
            if g is not None:
                self._one(p, g.double() * scale, state, float(lr), weight_decay, skip_zeros, options)
                done += 1
        return done

    def _one(self, p, g, state, lr, weight_decay, skip_zeros, options):
        state["step"] += 1
        eight = state["state1"].dtype == torch.uint8
        doubled = self.rule == "ademamix"
        read = {}
        for which in ("1", "2"):
            value = state.get(f"state{which}")
            if value is None:
                read[which] = torch.zeros_like(g)
            elif not eight:
                read[which] = value.double()
            else:
                halves = value if doubled and which == "1" else value[None]
                scales = state[f"absmax{which}"].view(len(halves), -1)
                decoded = [decode(c, s, which == "1") for c, s in zip(halves, scales, strict=True)]
                read[which] = torch.stack(decoded) if doubled and which == "1" else decoded[0]
        value = state["master"].double() if "master" in state else p.double()
        if "compensation" in state:
            value = value + state["compensation"].double()
        still = ~g.isfinite() | ((g == 0) & skip_zeros)
        change, s1, s2 = update(
            self.rule, value, g.masked_fill(still, 0), read["1"], read["2"], int(state["step"]), lr,
            weight_decay=weight_decay, still=still, **options,
        )  # fmt: skip
        new = torch.where(still, value, value - change)
        for which, fresh in (("1", s1), ("2", s2)):
            if f"state{which}" not in state:
                continue
            fresh = torch.where(still, read[which], fresh)
            if not eight:
                state[f"state{which}"].copy_(fresh)
                continue
            halves = fresh if doubled and which == "1" else fresh[None]
            for half, place, scales in zip(
                halves,
                state[f"state{which}"] if doubled and which == "1" else state[f"state{which}"][None],
                state[f"absmax{which}"].view(len(halves), -1),
                strict=True,
            ):
                codes, absmax = encode(half, which == "1")
                place.copy_(codes)
                scales.copy_(absmax)
        with torch.no_grad():
            if "master" in state:
                state["master"].copy_(new)
            p.copy_(new)
            if "compensation" in state:
                state["compensation"].copy_(new - p.double())


def arguments_of(optimizer, group=0):
    """What the optimizer hands to its plan's step."""
    from halfbyte.optim._plans import arguments

    return arguments(optimizer.optimizer_name, optimizer.get_config(group, 0, optimizer.param_groups[group]))


def reference_grad_norm(plans, out, grads=None):
    every = [
        g.double().norm()
        for index, plan in enumerate(plans)
        for g in ([p.grad for p in plan.params] if grads is None or grads[index] is None else grads[index])
        if g is not None
    ]
    out.fill_(torch.stack(every).norm() if every else 0.0)
