"""The real bitsandbytes through transformers, asked from another process as ``bnb_oracle.py`` is, for whole models.

``python bnb_models.py REQUESTS`` reads a JSON list of objects, each with an ``op`` and the arguments of the function of
that name below, and does them one after another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def load(path: str, kind: str | None = None, double: bool = False, storage: str = "uint8") -> torch.nn.Module:
    options = {}
    if kind == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif kind is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=getattr(torch, storage),
        )
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map={"": "cpu"}, **options).eval()


def save(source: str, destination: str, kind: str, double: bool, storage: str, shard: str) -> None:
    """Quantize while loading, and save."""
    load(source, kind, double, storage).save_pretrained(destination, max_shard_size=shard)


@torch.inference_mode()
def answer(path: str, out: str) -> None:
    """Load a quantized checkpoint: its ``logits``, and each 4-bit weight decoded, under its name."""
    import bitsandbytes as bnb

    model = load(path)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            tensors[f"{name}.weight"] = weight
    # After that: on some CPUs its first forward pass packs the weights in another way.
    tensors["logits"] = model(input_ids=torch.arange(32)[None]).logits
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for request in json.loads(Path(sys.argv[1]).read_text()):
        {"save": save, "answer": answer}[request.pop("op")](**request)
