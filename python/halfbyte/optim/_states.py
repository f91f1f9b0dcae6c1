"""States of a parameter: their layout, their form in a state dict, and old or foreign layouts made ours.

==============  ====================================================================================================
``step``        int, steps done; with ``capturable`` an fp32 tensor on the GPU
``state1``      first state, like the parameter: fp32, or uint8 codes. AdEMAMix: ``[2, *shape]``, fast and slow mean
``state2``      second moment, like the parameter, of rules with two states
``qmap1``       values of `state1`'s codes, fp32 ``[256]``: the signed dynamic map. 8-bit only, as are the next three
``qmap2``       values of `state2`'s codes: the unsigned dynamic map
``absmax1``     scales of `state1`, fp32 ``[⌈n / 256⌉]``. AdEMAMix: ``[2, ⌈n / 256⌉]``
``absmax2``     scales of `state2`, fp32 ``[⌈n / 256⌉]``
``unorm_vec``   fp32 ``[1]``: squared norm of the last update, of LAMB and LARS
``master``      ours: fp32 copy of a 16-bit parameter
``compensation``  ours: what rounding has lost, like the 16-bit parameter
==============  ====================================================================================================

Names and layout are bitsandbytes'. In a state dict all tensors of a parameter lie in a dict of their own, under
:data:`WRAPPED`: FSDP gathers tensors that it finds beside a parameter as if they had the parameter's shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from halfbyte._tables import dynamic_map
from halfbyte.errors import CheckpointError
from halfbyte.functional import dequantize_blockwise, quantize_blockwise
from halfbyte.optim._pages import is_paged

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCKSIZE: Final = 256
"""Elements that share a scale in an 8-bit state."""

WRAPPED: Final = "__bnb_optimizer_quant_state__"
"""Key of a parameter's tensors in a state dict."""

BITSANDBYTES_TENSORS: Final = frozenset(
    {
        *("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec"),
        # of versions before 0.44
        *("max1", "max2", "new_max1", "new_max2", "gnorm_vec"),
    }
)
OUR_TENSORS: Final = frozenset({"master", "compensation"})

_SIGNED = {"1": True, "2": False}


def blocks(param: Tensor) -> int:
    """Return how many scales an 8-bit state like `param` has."""
    return -(-param.numel() // BLOCKSIZE)


def shard_of(param: Tensor) -> str:
    """Return what tells this process's part of a distributed parameter from the others, as in ``".shard1of4"``.

    The empty string for one that is whole in every process.
    """
    index, count = 0, 1
    mesh: Any = getattr(param, "device_mesh", None)
    coordinate = mesh.get_coordinate() if mesh is not None else None
    if coordinate is None:
        return ""
    for dim, placement in enumerate(getattr(param, "placements", ())):
        if placement.is_shard():
            index, count = index * mesh.size(dim) + coordinate[dim], count * mesh.size(dim)
    return f".shard{index}of{count}" if count > 1 else ""


def given_out(value: Any) -> Any:
    """Return a tensor as a state dict has it: on the host if it is paged, for it is a part of a larger buffer."""
    if not isinstance(value, Tensor):
        return value
    return value.cpu() if is_paged(value) else value.detach()


def wrap(state: Mapping[str, Any], names: frozenset[str] | set[str], shard: str = "") -> dict[str, Any]:
    """Return a copy of one parameter's state for a state dict: tensors of `names` nested, the step a number.

    States of a part have its name behind theirs: a distributed checkpoint keeps one tensor of a name, and would give
    all processes the states of one.
    """
    wrapped = {key + shard: given_out(value) for key, value in state.items() if key in names}
    flat = {key: value for key, value in state.items() if key not in names}
    if isinstance(flat.get("step"), Tensor):
        flat["step"] = int(flat["step"].item())
    return flat | {WRAPPED: wrapped} if wrapped else flat


def unwrap(state: Mapping[str, Any], shard: str, where: str) -> dict[str, Any]:
    """Return a copy of one parameter's entry of a state dict, flat. Flat ones come from versions before 0.46.

    Raises
    ------
    CheckpointError
        If it holds parts of the parameter, and not the part `shard`.
    """
    flat = {key: value for key, value in state.items() if key != WRAPPED}
    wrapped = dict(state.get(WRAPPED, {}))
    parts = {key for key in wrapped if ".shard" in key}
    if parts:
        ours = {key for key in parts if shard and key.endswith(shard)}
        if not ours:
            raise CheckpointError(
                f"{where}: expected states of {shard[1:] or 'the whole parameter'}, got {', '.join(sorted(parts))}; "
                "sharded states are loaded by as many processes as saved them, each its own"
            )
        wrapped = {key.removesuffix(shard): value for key, value in wrapped.items() if key in ours or key not in parts}
    return flat | wrapped


def modernize(state: dict[str, Any], param: Tensor, where: str) -> None:
    """Change a loaded flat state to the layout above, in place.

    What older versions wrote is converted without a change of value: blocks of 2048 elements, or one scale for all,
    have their scales repeated. Codes of another map than the dynamic one are quantized again.

    Parameters
    ----------
    state
        Tensors of `param`, on any device.
    where
        What errors call it.

    Raises
    ------
    CheckpointError
        If shapes or types fit neither `param` nor each other.
    """
    for name in ("max1", "max2", "new_max1", "new_max2", "gnorm_vec"):
        value = state.pop(name, None)
        if name in ("max1", "max2") and isinstance(value, Tensor) and f"absmax{name[-1]}" not in state:
            state[f"absmax{name[-1]}"] = value.reshape(-1)
    if "step" in state:
        state["step"] = _count(state["step"], where)
    elif "state1" in state:
        raise CheckpointError(f"{where}: expected a step beside state1, got none")
    for which in ("1", "2"):
        value = state.get(f"state{which}")
        if isinstance(value, Tensor):
            _check_one(state, value, which, param, where)


def _count(step: Any, where: str) -> int:
    if isinstance(step, Tensor):
        if step.numel() != 1:
            raise CheckpointError(f"{where}.step: expected a number, got a tensor of shape {list(step.shape)}")
        step = step.item()
    count = int(step)
    if count < 0 or count != step:
        raise CheckpointError(f"{where}.step: expected a whole number of at least 0, got {step}")
    return count


def _check_one(state: dict[str, Any], value: Tensor, which: str, param: Tensor, where: str) -> None:
    name, n = f"state{which}", param.numel()
    if value.numel() not in ((n, 2 * n) if which == "1" else (n,)):
        raise CheckpointError(
            f"{where}.{name}: expected {n} elements like its parameter, got shape {list(value.shape)}"
        )
    shape = param.shape if value.numel() == n else (2, *param.shape)
    state[name] = value = value.contiguous().view(shape)
    if value.dtype != torch.uint8:
        if not value.is_floating_point():
            raise CheckpointError(f"{where}.{name}: expected uint8 or a floating-point type, got {value.dtype}")
        state[name] = value.float()
        return
    halves = value.numel() // n if n else 1
    _check_scales(state, which, halves, n, where)
    signed = which == "1"
    ours, code = dynamic_map(signed), state.get(f"qmap{which}")
    if not isinstance(code, Tensor) or code.numel() != 256:
        raise CheckpointError(f"{where}.qmap{which}: expected the 256 values of its codes, got {_described(code)}")
    if torch.allclose(code.detach().cpu().float(), ours, rtol=1e-5, atol=1e-9):
        return
    scales = state[f"absmax{which}"]
    state[name], state[f"absmax{which}"] = value, scales = value.clone(), scales.clone()
    flat, scales = value.view(halves, n), scales.view(halves, -1)
    for half in range(halves):
        decoded = dequantize_blockwise(
            flat[half], absmax=scales[half].to(value.device), code=code.float().to(value.device), blocksize=BLOCKSIZE
        )
        codes, fresh = quantize_blockwise(decoded, code=ours.to(value.device), blocksize=BLOCKSIZE)
        flat[half].copy_(codes)
        scales[half].copy_(fresh.absmax)


def _check_scales(state: dict[str, Any], which: str, halves: int, n: int, where: str) -> None:
    name, wanted = f"absmax{which}", -(-n // BLOCKSIZE)
    scales = state.get(name)
    if not isinstance(scales, Tensor):
        raise CheckpointError(f"{where}.{name}: expected the scales of state{which}, got {_described(scales)}")
    scales = scales.float().contiguous()
    shape = (2, wanted) if halves == 2 else (wanted,)
    if scales.numel() == halves * wanted:
        state[name] = scales.view(shape)
        return
    for blocksize in (2048, max(n, 1)):
        count = -(-n // blocksize)
        if scales.numel() == halves * count:
            repeats = -(-min(blocksize, n) // BLOCKSIZE)
            repeated = scales.view(halves, count).repeat_interleave(repeats, dim=1)[:, :wanted]
            state[name] = repeated.reshape(shape).contiguous()
            return
    raise CheckpointError(f"{where}.{name}: expected {halves * wanted} scales, got shape {list(scales.shape)}")


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def complete(state: dict[str, Any], param: Tensor, config: dict[str, Any]) -> None:
    """Give a 16-bit parameter the tensor that its way of keeping small steps needs, and take those of other ways."""
    half = param.dtype != torch.float32
    if not (half and config["master_weights"]):
        state.pop("master", None)
    elif "master" not in state or state["master"].dtype != torch.float32:
        state["master"] = param.detach().float().contiguous()
    if not (half and config["kahan_sum"]):
        state.pop("compensation", None)
    elif "compensation" not in state:
        state["compensation"] = torch.zeros(param.shape, dtype=param.dtype, device=param.device)


def check_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Raise CheckpointError unless there are as many groups and parameters in the two."""
    if len(groups) != len(saved):
        raise CheckpointError(f"param_groups: expected {len(groups)} groups, got {len(saved)}")
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise CheckpointError(
                f"param_groups[{index}]: expected {len(group['params'])} parameters, got {len(other['params'])}"
            )
