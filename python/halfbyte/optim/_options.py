"""What optimizers can do beyond bitsandbytes', as keyword-only arguments, and checks that constructors share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypedDict

from halfbyte.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes after those of bitsandbytes.

    At most one of `stochastic_rounding`, `kahan_sum` and `master_weights` may be set. They concern fp16 and bf16
    parameters, whose steps are otherwise rounded away once they are below half a unit in the last place.
    """

    maximize: bool
    """Climb the gradient instead of descending it."""
    stochastic_rounding: bool
    """Round updated parameters up or down at random, so that small steps are kept on average. Costs no memory."""
    seed: int
    """Of those random bits, which depend on it, the step and the element alone: the same on every rank. Default 0."""
    kahan_sum: bool
    """Keep what rounding loses in a second tensor like the parameter (2 bytes an element)."""
    master_weights: bool
    """Update an fp32 copy of the parameter (4 bytes an element) and give the parameter its rounding."""
    capturable: bool
    """Keep step counts on the GPU, so that a step can be captured in a CUDA graph. ``lr`` may then be a 0-dim fp32
    tensor on the GPU, and :class:`torch.amp.GradScaler` leaves unscaling and skipping to the step."""
    max_grad_norm: float
    """Scale the gradients of each step down to this total L2 norm, if theirs is larger, without writing to them. The
    norm is left in ``optimizer.grad_norm``."""


GROUP_OPTIONS: Final[dict[str, Any]] = {
    "maximize": False,
    "stochastic_rounding": False,
    "seed": 0,
    "kahan_sum": False,
    "master_weights": False,
}
"""Options that a parameter group may set for itself, with their defaults."""

_EXCLUSIVE = ("stochastic_rounding", "kahan_sum", "master_weights")


def group_options(options: Options) -> dict[str, Any]:
    """Check `options` and return those of parameter groups that are not at their default.

    Others are left out, so that a plain optimizer's groups have bitsandbytes' keys and no more.

    Raises
    ------
    ArgumentError
        If one is unknown or outside its domain, or two exclude each other.
    """
    given: dict[str, Any] = dict(options)
    known = {*GROUP_OPTIONS, "capturable", "max_grad_norm"}
    for name in given:
        if name not in known:
            raise ArgumentError(f"{name}: no such option; expected one of {', '.join(sorted(known))}")
    check_exclusive(given)
    norm = given.get("max_grad_norm")
    if norm is not None and not norm > 0.0:
        raise ArgumentError(f"max_grad_norm: expected a positive number, got {norm}")
    return {name: given[name] for name, default in GROUP_OPTIONS.items() if given.get(name, default) != default}


def check_exclusive(options: dict[str, Any]) -> None:
    """Raise ArgumentError if more than one way of keeping small steps is asked for."""
    chosen = [name for name in _EXCLUSIVE if options.get(name)]
    if len(chosen) > 1:
        raise ArgumentError(f"{chosen[1]}: expected False beside {chosen[0]}=True, got True; choose one of the two")


def check_at_least(name: str, value: Any, least: float = 0.0) -> None:
    """Raise ArgumentError unless `value` is a number of at least `least`; NaN is none."""
    if not value >= least:
        raise ArgumentError(f"{name}: expected a number of at least {least:g}, got {value}")


def check_betas(betas: Sequence[float] | str, count: tuple[int, ...]) -> Sequence[float]:
    """Return `betas` as numbers in [0, 1), from a string ``"(0.9, 0.999)"`` too.

    Raises
    ------
    ArgumentError
        If there are not as many as one of `count`, or one is outside its range.
    """
    if isinstance(betas, str):
        try:
            betas = [float(beta) for beta in betas.strip().strip("()[]").split(",") if beta.strip()]
        except ValueError as error:
            raise ArgumentError(f"betas: expected numbers as in '(0.9, 0.999)', got {betas!r}") from error
    if len(betas) not in count:
        raise ArgumentError(f"betas: expected {' or '.join(map(str, count))} numbers, got {len(betas)}: {betas}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ArgumentError(f"betas[{index}]: expected a number of at least 0 and below 1, got {beta}")
    return betas


def refuse(who: object, name: str, value: Any, plain: Any) -> None:
    """Raise UnsupportedError unless argument `name`, which optimizer `who` cannot honour, is at its plain value."""
    if value != plain:
        raise UnsupportedError(f"{name}: {type(who).__name__} supports {name}={plain!r} only, got {value!r}")
