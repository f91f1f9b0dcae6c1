"""Checkpoints for tests of the commands on them, and what is in one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).parent / "models" / "pycode-llama-7m"


def tensors_of(folder):
    """All tensors of a folder, none of them twice."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        loaded = load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
    return found


def raw(tensor):
    """Bytes: packed codes that are stored as floats hold NaNs, which equal nothing."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(a, b):
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        assert torch.equal(raw(a[key]), raw(b[key])), key


def bytes_of(folder):
    """Names and bytes of every file below a folder."""
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_llama(folder, layers, width, dtype=torch.bfloat16):
    """Write a sharded Llama of random weights, a file a layer; return the bytes of its largest tensor."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(1)
    weight_map, largest = {}, 0
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {
            f"{prefix}self_attn.q_proj.weight": (width, width),
            f"{prefix}mlp.up_proj.weight": (4 * width, width),
            f"{prefix}mlp.down_proj.weight": (width, 4 * width),
            f"{prefix}input_layernorm.weight": (width,),
        }
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = {name: (torch.randn(shape, generator=rng) * 0.02).to(dtype) for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        largest = max(largest, *(t.numel() * t.itemsize for t in tensors.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return largest
