"""Which parameters of a checkpoint are quantized, read from the headers of its files.

Configurations say what was meant to be skipped; the file says what was. It also says the element type of packed bytes,
which transformers wants to know before it reads them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import safe_open
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

if TYPE_CHECKING:
    from collections.abc import Iterable

_DTYPES: Final = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
# The entry that every quantized weight has one of, and what is before it in the key of the weight itself.
_MARKS: Final = (
    (re.compile(r"\.quant_state\.bitsandbytes__(?:nf4|fp4)$"), ""),
    (re.compile(r"\.SCB$"), ".weight"),
)


def quantized_parameters(model: Any, files: Iterable[str] | None) -> dict[str, torch.dtype] | None:
    """Return the names in `model` of the parameters that `files` hold quantized, with the element types there.

    None where they cannot be told without reading the weights: no files, or others than safetensors.
    """
    paths = list(files or ())
    if not paths or not all(str(path).endswith(".safetensors") for path in paths):
        return None
    stored: dict[str, torch.dtype] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for key in keys:
                base = _base(key)
                # Shards may part a weight from its state; the weight's own file is asked then, below.
                if base is not None:
                    stored.setdefault(base, torch.uint8)
    for path in paths:
        with safe_open(path, "pt") as file:
            for key in stored.keys() & set(file.keys()):
                stored[key] = _DTYPES.get(file.get_slice(key).get_dtype(), torch.uint8)
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = model.state_dict()
    return {
        rename_source_key(key, renamings, converters, model.base_model_prefix, known)[0]: dtype
        for key, dtype in stored.items()
    }


def _base(key: str) -> str | None:
    for mark, weight in _MARKS:
        found = mark.search(key)
        if found:
            return key[: found.start()] + weight
    return None
