"""The update of one tensor as a function and as an op, with bitsandbytes' signatures.

An optimizer's step does not come through here: it updates a whole group in one call. These are for code that keeps
states of its own. ``torch.ops.halfbyte.optimizer_update_32bit`` and ``..._8bit_blockwise`` have the schemas of
bitsandbytes' ops of these names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from halfbyte import _native, ops
from halfbyte._tables import dynamic_map
from halfbyte.errors import ArgumentError, DtypeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable

RULES: Final = ("adam", "ademamix", "lion", "momentum", "lars", "lamb", "rmsprop", "adagrad")
"""Names of the update rules."""

L2_RULES: Final = frozenset({"momentum", "lars", "rmsprop", "adagrad"})
"""Rules whose weight decay is a part of the gradient. The others shrink the parameter itself."""


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """Update one parameter and its fp32 states in place.

    Parameters
    ----------
    optimizer_name
        One of :data:`RULES`.
    g, p
        Gradient and parameter: fp32, fp16 or bf16, of one shape and device; `p` contiguous.
    state1, state2
        States, fp32, contiguous, like `p`; for ademamix `state1` is ``[2, *p.shape]``. `state2` is of adam, lamb and
        ademamix.
    beta1, beta2, beta3, alpha, eps
        Of the rule; see :mod:`halfbyte.optim`.
    step
        Number of this step, from 1.
    lr, weight_decay
        Learning rate and weight decay.
    gnorm_scale
        What the gradient is multiplied by.
    unorm_vec
        Gets the squared norm of the update, fp32 ``[1]``; of lars and lamb.
    max_unorm
        Largest norm of an update, as a multiple of that of `p`; of lars and lamb.
    skip_zeros
        Leave elements alone whose gradient is zero.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError, DeviceError
        If an argument is outside its domain. Nothing is written then.
    """
    run = run_32bit if ops.is_eager(p) else torch.ops.halfbyte.optimizer_update_32bit.default
    run(
        optimizer_name,
        g,
        p,
        state1,
        state2,
        unorm_vec,
        max_unorm,
        0.0,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        step,
        lr,
        gnorm_scale,
        skip_zeros,
    )


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """Update one parameter and its 8-bit states in place.

    Parameters
    ----------
    state1, state2
        Codes, uint8, contiguous, like `p`; for ademamix `state1` is ``[2, *p.shape]``.
    qmap1, qmap2
        Values of the codes: the signed and the unsigned dynamic map, fp32 ``[256]``.
    absmax1, absmax2
        Scales of every 256 elements, fp32 ``[⌈n / 256⌉]``; for ademamix `absmax1` is ``[2, ⌈n / 256⌉]``.
    optimizer_name, g, p, beta1, beta2, beta3, alpha, eps, step, lr, weight_decay, gnorm_scale, skip_zeros
        See :func:`optimizer_update_32bit`.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError, DeviceError
        If an argument is outside its domain. Nothing is written then.
    """
    run = run_8bit_blockwise if ops.is_eager(p) else torch.ops.halfbyte.optimizer_update_8bit_blockwise.default
    run(
        optimizer_name,
        g,
        p,
        state1,
        state2,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        step,
        lr,
        qmap1,
        qmap2,
        absmax1,
        absmax2,
        weight_decay,
        gnorm_scale,
        skip_zeros,
    )


ops._define(
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, "
    "float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()"
)
ops._define(
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    "float gnorm_scale, bool skip_zeros=False) -> ()"
)


def run_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,  # noqa: ARG001  # the norm of `p`, which is taken with the update's
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """Update one parameter with fp32 states; the op's implementation."""
    for name, value in (("state1", state1), ("state2", state2)):
        if value is not None:
            ops.check_dtype(name, value.dtype, (torch.float32,))
    state = {"state1": state1, "state2": state2, "unorm_vec": unorm_vec}
    betas = (beta1, beta2, beta3)
    _update(optimizer_name, g, p, state, betas, alpha, eps, step, lr, weight_decay, gnorm_scale, skip_zeros, max_unorm)


def run_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """Update one parameter with 8-bit states; the op's implementation."""
    for name, value in (("state1", state1), ("state2", state2)):
        if value is not None:
            ops.check_dtype(name, value.dtype, (torch.uint8,))
    _check_map("qmap1", qmap1, signed=True)
    if qmap2 is not None:
        _check_map("qmap2", qmap2, signed=False)
    state = {"state1": state1, "state2": state2, "absmax1": absmax1, "absmax2": absmax2}
    betas = (beta1, beta2, beta3)
    _update(optimizer_name, g, p, state, betas, alpha, eps, step, lr, weight_decay, gnorm_scale, skip_zeros, 0.0)


def _update(
    rule: str,
    g: Tensor,
    p: Tensor,
    state: dict[str, Any],
    betas: tuple[float, float, float],
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool,
    max_unorm: float,
) -> None:
    if rule not in RULES:
        raise ArgumentError(f"optimizer_name: expected one of {', '.join(map(repr, RULES))}, got {rule!r}")
    if step < 1:
        raise ArgumentError(f"step: expected the number of this step, from 1, got {step}")
    if g.shape != p.shape:
        raise ShapeError(f"g: expected shape {list(p.shape)} like p, got {list(g.shape)}")
    if p.is_cpu:
        ops._sync_threads()
    given = {name: value for name, value in state.items() if value is not None}
    plan = _native.OptimPlan(rule, [p], [given | {"step": step - 1}])
    dampening = {"dampening": 0.0} if rule in ("momentum", "lars") else {}
    plan.step(
        lr,
        *betas,
        alpha,
        eps,
        weight_decay,
        decay="l2" if rule in L2_RULES else "decoupled",
        max_unorm=max_unorm,
        skip_zeros=skip_zeros,
        gnorm_scale=gnorm_scale,
        grads=[g],
        **dampening,
    )
    torch.autograd.graph.increment_version([p, *given.values()])


# Maps that were found to be the dynamic ones: asking a GPU for their values each time would wait for it.
_known_maps = WeakIdKeyDictionary()


def _check_map(name: str, code: Tensor, signed: bool) -> None:
    known: Any = _known_maps
    if known.get(code) == (signed, code._version):
        return
    if code.dtype != torch.float32:
        raise DtypeError(f"{name}: expected dtype torch.float32, got {code.dtype}")
    if code.shape != (256,):
        raise ShapeError(f"{name}: expected shape [256], got {list(code.shape)}")
    if not torch.allclose(code.detach().cpu(), dynamic_map(signed), rtol=1e-5, atol=1e-9):
        kind = "signed" if signed else "unsigned"
        raise ArgumentError(f"{name}: expected the {kind} dynamic map, create_dynamic_map({signed}), got other values")
    known[code] = (signed, code._version)


def _write_nothing(*args: Any) -> None:  # the ops return nothing
    """Stand for an update of tensors that have no memory."""


_IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "optimizer_update_32bit": run_32bit,
    "optimizer_update_8bit_blockwise": run_8bit_blockwise,
}
for _name, _run in _IMPLEMENTATIONS.items():
    ops._library.impl(_name, _run, "CPU")  # type: ignore[no-untyped-call]
    ops._library.impl(_name, _run, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"halfbyte::{_name}", _write_nothing, lib=ops._library)
