"""``bitsandbytes.utils``: module surgery, outlier bookkeeping, dicts in tensors."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from halfbyte.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "execute_and_return",
    "find_outlier_dims",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]

logger = logging.getLogger("bitsandbytes.utils")

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
"""How a checkpoint says the order of an int8 weight. Only ``"row"`` is read."""

INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {
    number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()
}


def pack_dict_to_tensor(source_dict: Mapping[str, Any]) -> Tensor:
    """Return the bytes of a dict's JSON, uint8 ``[bytes]``, so that a checkpoint can hold it."""
    return torch.frombuffer(bytearray(json.dumps(source_dict).encode()), dtype=torch.uint8).clone()


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """Return the dict that :func:`pack_dict_to_tensor` packed.

    Raises
    ------
    ArgumentError
        If the bytes are no JSON object.
    """
    try:
        value = json.loads(bytes(tensor_data.cpu().numpy()).decode())
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"tensor_data: expected the bytes of a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentError(f"tensor_data: expected the bytes of a JSON object, got {type(value).__name__}")
    return value


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[[int, int, bool], nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Put another module in the place of every ``nn.Linear`` of a model.

    Parameters
    ----------
    model
        Changed in place.
    linear_replacement
        Makes the new module of ``in_features``, ``out_features`` and whether there is a bias.
    skip_modules
        Last components of the names that stay as they are.
    copy_weights
        Whether the new module gets the old one's weight and bias.
    post_processing_function
        Name of a method of the *old* module that is called with it, where it has one.

    Returns
    -------
    Module
        `model`.
    """
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if not isinstance(old, nn.Linear) or name in skip_modules:
                continue
            new: Any = linear_replacement(old.in_features, old.out_features, old.bias is not None)
            if copy_weights:
                new.weight, new.bias = old.weight, old.bias
            setattr(parent, name, new)
            process = getattr(old, post_processing_function, None) if post_processing_function else None
            if process is not None:
                process(old)
    return model


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """Return which dimensions of a matrix spread more than the others, by the z-score of their standard deviation.

    Parameters
    ----------
    weight
        A matrix.
    reduction_dim
        The dimension to take standard deviations over.
    zscore
        From where on a dimension counts.
    topk
        How many of the furthest to return, whatever their score.
    rdm
        Return `topk` random dimensions: something to compare with.

    Returns
    -------
    Tensor
        int64, numbers of dimensions.
    """
    if rdm:
        return torch.randint(0, weight.shape[1], size=(topk or 0,), device=weight.device)
    spread = weight.std(reduction_dim)
    if topk is not None:
        return spread.abs().topk(topk, dim=0).indices
    return torch.nonzero((spread - spread.mean()) / spread.std() > zscore).flatten()


class OutlierTracer:
    """A singleton that records, for each linear layer of a model, in which dimensions its input has outliers."""

    _instance: ClassVar[OutlierTracer | None] = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self, model: nn.Module) -> None:
        """Watch every ``nn.Linear`` of a model; a forward pass fills in what :meth:`get_outliers` returns."""
        self.last_w: Tensor | None = None
        self.current_outlier_dims: Tensor | None = None
        self.hvalues: list[int] = []
        self.outliers: list[Tensor] = []
        self.hvalue2outlier_idx: dict[int, Tensor] = {}
        self.initialized = True
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.hooks = [module.register_forward_pre_hook(outlier_hook) for module in linears]

    def is_initialized(self) -> bool:
        """Whether a model is being watched."""
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: Tensor) -> int:
        """Return what a weight is known by: the address of its memory."""
        return weight.data.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """Return the dimensions found for the layer with this weight; None if there are none yet."""
        if not self.is_initialized():
            logger.warning("Outlier tracer is not initialized...")
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        """Return the one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance


def outlier_hook(module: nn.Module, input: tuple[Tensor, ...]) -> None:  # noqa: A002  # a public name
    """Find the outlier dimensions of a layer's input, at its first call; a forward pre-hook.

    They are those of the weight of the linear layer that was called before it. For the first layer they are those of
    the input itself: of unusual spread, or with a magnitude above 6.
    """
    tracer = OutlierTracer.get_instance()
    weight: Any = module.weight
    known_by = tracer.get_hvalue(weight)
    if known_by in tracer.hvalue2outlier_idx:
        for hook in tracer.hooks:  # the second pass: all is known
            hook.remove()
        return
    tracer.outliers.append(find_outlier_dims(weight))
    tracer.hvalues.append(known_by)
    if len(tracer.outliers) > 1:
        found = tracer.outliers[-1]
    else:
        rows = input[0].reshape(-1, input[0].shape[-1])
        spread = find_outlier_dims(rows, reduction_dim=1, zscore=3)
        large = torch.nonzero((rows.abs() > 6).any(dim=0)).flatten()
        found = torch.unique(torch.cat([spread, large]))
    tracer.hvalue2outlier_idx[known_by] = found


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Run a command, without a shell; return what it wrote to its output and to its error output."""
    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr.strip()


def sync_gpu(t: Tensor) -> None:
    """Wait until the device of `t` has done what it was given."""
    if t.is_cuda:
        torch.cuda.synchronize(t.device)
