"""``quantize_model``: 4-bit or 8-bit layers in the place of a model's linear ones."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from halfbyte import ops
from halfbyte._progress import track
from halfbyte._tables import FLOAT_DTYPES, STORAGE_DTYPES
from halfbyte.errors import ArgumentError, DtypeError
from halfbyte.nn import Experts4bit, Int8Params, Linear4bit, Linear8bitLt, Params4bit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

logger = logging.getLogger("halfbyte")

M = TypeVar("M", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def quantize_model(
    model: M,
    quant_type: str = "nf4",
    *,
    double_quant: bool = True,
    blocksize: int = 64,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
    skip: Sequence[str] = ("lm_head",),
    device: torch.device | str | int | None = None,
    progress: bool | Callable[[int, int, str], None] | None = None,
    scale_search: bool = False,
    threshold: float = 6.0,
) -> M:
    r"""Replace the linear layers of a model by 4-bit ones, or by those of LLM.int8(), in place.

    Only layers whose class is exactly ``nn.Linear`` are replaced, and transformers' modules of stacked experts (3-D
    parameters; by :class:`~halfbyte.nn.Experts4bit`). The output embedding (``model.get_output_embeddings()``), layers
    that share their weight with another module, and what `skip` names are left alone. One layer is quantized at a time
    and its float weight freed before the next.

    Parameters
    ----------
    model
        Any module; a single ``nn.Linear`` is replaced by a new module, which is returned. Layers on the meta device
        are replaced by unquantized 4-bit layers there, ready for ``load_state_dict``.
    quant_type
        ``"nf4"``, ``"fp4"``, or ``"int8"``: then `threshold` counts, and what says how to make 4 bits does not. Stacked
        experts stay as they are.
    double_quant
        Quantize the scales too: 4.127 instead of 4.5 bits a weight at blocksize 64, with the same speed.
    blocksize
        Weights that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
    compute_dtype
        See :class:`~halfbyte.nn.Linear4bit`.
    quant_storage
        Element type that packed bytes are viewed as.
    skip
        Names of layers, or of modules whose layers all stay: each is a dotted name or a part of one between dots
        (``"lm_head"``, ``"vision_tower"``, ``"mlp.gate"``), or a regular expression for a whole name
        (``r".*\.layers\.[01]\..*"``).
    device
        Where the model shall be. Weights are moved there one by one, quantized there, and the rest follows at the end.
        Default: everything stays where it is.
    progress
        True or False for a bar on standard error (tqdm, where it is installed) or none; None for one on a terminal
        only; or a function that is called with layers done, layers in all, and the name of the one that comes next.
    scale_search
        Pick scales by least squared error: a third or so of the quality that NF4 costs comes back, in the same bytes
        and format. See :func:`~halfbyte.functional.quantize_4bit`.
    threshold
        Of 8-bit layers: columns of activations of at least this magnitude are multiplied in floating point; 0 for none.

    Returns
    -------
    nn.Module
        `model`. Its state dict has bitsandbytes' keys.

    Raises
    ------
    ArgumentError
        If `quant_type`, `blocksize` or a pattern in `skip` does not exist, or `threshold` is no threshold.
    DtypeError
        If a layer's weight is not fp32, fp16 or bf16, or `quant_storage` is no storage type. The model is unchanged
        after any of these.
    """
    eight_bit = quant_type == "int8"
    if eight_bit:
        if not threshold >= 0:
            raise ArgumentError(f"threshold: expected a number that is not negative, got {threshold}")
    else:
        ops.check_quant_type(quant_type)
        ops.check_blocksize(blocksize)
        ops.check_dtype("quant_storage", quant_storage, STORAGE_DTYPES)
    candidates = _candidates(model, skip_pattern(skip))
    layers = {name: layer for name, layer in candidates if type(layer) is nn.Linear or not eight_bit}
    for name, layer in layers.items():
        for weight in _weights(layer):
            if layer._parameters[weight].dtype not in FLOAT_DTYPES:  # type: ignore[union-attr]
                found = layer._parameters[weight].dtype  # type: ignore[union-attr]
                raise DtypeError(f"model.{name}.{weight}: expected fp32, fp16 or bf16, got {found}")
    if not layers:
        logger.warning("quantize_model: found no nn.Linear to quantize in %s", type(model).__name__)
    parents = [m for m in model.modules() if m is not None]
    root: nn.Module = model
    # Names only: the mapping must not keep float weights alive.
    for name in _reported(list(layers), progress):
        old = layers.pop(name)
        if eight_bit:
            new: nn.Module = _eight_bit(old, threshold)
        else:
            new = _four_bit(old, quant_type, double_quant, blocksize, compute_dtype, quant_storage, scale_search)
        _finish(old, new, device)
        if old is model:
            root = new
        for parent in parents:
            for child_name, child in parent._modules.items():
                if child is old:
                    parent._modules[child_name] = new
        # The caller may hold the old layer; what counts is that it no longer holds the weight.
        parents = [new if m is old else m for m in parents]
        for weight in _weights(old):
            old._parameters[weight] = None
    if device is not None:
        root.to(device)
    return root  # type: ignore[return-value]


def _weights(layer: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that are quantized."""
    if type(layer) is nn.Linear:
        return ("weight",)
    return ("gate_up_proj" if layer.has_gate else "up_proj", "down_proj")


def _eight_bit(old: nn.Module, threshold: float) -> Linear8bitLt:
    assert isinstance(old, nn.Linear)
    new = Linear8bitLt(old.in_features, old.out_features, False, False, threshold, device="meta")
    new._parameters["weight"] = Int8Params(old.weight.detach(), requires_grad=False)
    new.register_parameter("bias", old.bias)
    new.train(old.training)
    return new


def _four_bit(
    old: nn.Module,
    quant_type: str,
    double_quant: bool,
    blocksize: int,
    compute_dtype: torch.dtype | None,
    quant_storage: torch.dtype,
    scale_search: bool,
) -> nn.Module:
    new: Linear4bit | Experts4bit
    if isinstance(old, nn.Linear):
        # On meta: nothing is allocated or initialized.
        new = Linear4bit(
            old.in_features,
            old.out_features,
            False,
            compute_dtype,
            double_quant,
            quant_type,
            quant_storage,
            "meta",
            blocksize,
            scale_search=scale_search,
        )
        new._parameters["weight"] = Params4bit(old.weight.detach(), **{**new.weight.__dict__, "module": new})
        new.register_parameter("bias", old.bias)
        new.train(old.training)
    else:
        new = Experts4bit.from_module(
            old, double_quant, quant_type, quant_storage, blocksize, scale_search=scale_search
        )
    return new


def _finish(old: nn.Module, new: nn.Module, device: torch.device | str | int | None) -> None:
    """Quantize the weights of `new` where they shall be, and give it the hooks of `old`."""
    for name in _weights(old):
        weight = new._parameters[name]
        if weight is not None and not weight.is_meta:
            new._parameters[name] = weight.to(weight.device if device is None else device)  # type: ignore[assignment]
    for hooks in _HOOKS:
        getattr(new, hooks).update(getattr(old, hooks))


def _candidates(model: nn.Module, skipped: re.Pattern[str] | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers to replace, each under its first name."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, all_names in names.items():
        if (
            (type(module) is nn.Linear or Experts4bit.recognizes(module))
            and module is not output
            # Weight norm and its like compute the weight.
            and all(holders.get(id(module._parameters.get(weight))) == 1 for weight in _weights(module))
            and not (skipped is not None and any(skipped.fullmatch(name) for name in all_names))
        ):
            yield all_names[0], module


def skip_pattern(skip: Sequence[str]) -> re.Pattern[str] | None:
    """Compile the patterns into one that matches the full names of skipped layers."""
    if isinstance(skip, str):
        skip = (skip,)
    parts = []
    for pattern in skip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ArgumentError(f"skip: {pattern!r} is not a regular expression: {error}") from error
        parts += [f"(?:{pattern})", rf"(?:.*\.)?(?:{re.escape(pattern)})(?:\..*)?"]
    return re.compile("|".join(parts)) if parts else None


def _reported(names: Sequence[str], progress: bool | Callable[[int, int, str], None] | None) -> Iterable[str]:
    if progress is None or isinstance(progress, bool):
        return track(names, "Quantizing", len(names), progress)
    return _called(names, progress)


def _called(names: Sequence[str], report: Callable[[int, int, str], None]) -> Iterator[str]:
    for done, name in enumerate(names):
        report(done, len(names), name)
        yield name
    report(len(names), len(names), "")
