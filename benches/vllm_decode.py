"""Decode speed, load time and memory of a Llama with random weights in vLLM, by method, JSON lines.

``python benches/vllm_decode.py bf16 halfbyte bitsandbytes halfbyte-quantized`` with vLLM 0.24 or later, on a GPU with
20 GB free; ``bitsandbytes`` is vLLM's own method up to 0.27, which needs that library. The default is Llama-3-8B's
shape: 16 GB in ``--folder``. CUDA graphs of whole decode steps and no ``torch.compile``, or ``--compile``, what vLLM
does by default; a step is the difference between long and short answers over their difference in tokens, so that
prefill falls out; the median of three.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

BATCHES = (1, 16, 64)
PROMPT, SHORT, LONG = 32, 32, 160
LAYERS_A_FILE = 4
# Of LLM, whether halfbyte's plugin is on, arguments of `halfbyte quantize` for what has to be there before.
METHODS = {
    "bf16": ({}, False, None),
    "halfbyte": ({"quantization": "halfbyte"}, True, None),
    "halfbyte-int8": ({"quantization": "halfbyte_int8"}, True, None),
    "bitsandbytes": ({"quantization": "bitsandbytes"}, False, None),
    "halfbyte-quantized": ({"quantization": "halfbyte"}, True, ["--scheme", "nf4"]),
    "halfbyte-quantized-double": ({"quantization": "halfbyte"}, True, ["--scheme", "nf4", "--double-quant"]),
}


def main() -> None:
    """Make what is missing of the checkpoints, and measure each method in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", nargs="+", choices=METHODS)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/halfbyte-vllm"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 256")
    parser.add_argument("--compile", action="store_true", help="compile as vLLM does by default")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source = arguments.folder / f"{arguments.hidden}-{arguments.layers}"
    if not (source / "config.json").exists():
        make(source, arguments.hidden, arguments.layers)
    for method in arguments.method:
        _, plugin, convert = METHODS[method]
        model = source if convert is None else source.with_name(f"{source.name}-{method}")
        if convert is not None and not (model / "config.json").exists():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            command = ["-m", "halfbyte", "quantize", source, model, *convert, "--device", device, "--overwrite"]
            subprocess.run([sys.executable, *map(str, command)], check=True)
        if arguments.only:
            measure(method, model, arguments.compile)
        else:
            environment = {"VLLM_PLUGINS": "halfbyte" if plugin else "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            same = ["--folder", arguments.folder, "--layers", arguments.layers, "--hidden", arguments.hidden]
            command = [sys.executable, __file__, method, "--only", *map(str, same), *["--compile"] * arguments.compile]
            subprocess.run(command, check=False, env=os.environ | environment)


def make(folder: Path, hidden: int, layers: int) -> None:
    """Write a checkpoint of random bf16 weights with Llama-3-8B's proportions."""
    folder.mkdir(parents=True, exist_ok=True)
    inner, head, vocabulary = hidden * 7 // 2, 128 if hidden >= 4096 else 64, 128256 if hidden >= 4096 else 4096
    heads = hidden // head
    grouped = max(heads // 4, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02).cpu()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": normal(vocabulary, hidden), "model.norm.weight": ones}
    tensors["lm_head.weight"] = normal(vocabulary, hidden)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (grouped * head, hidden),
        "self_attn.v_proj": (grouped * head, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    index: dict[str, str] = {}
    for first in range(0, layers, LAYERS_A_FILE):
        for layer in range(first, min(first + LAYERS_A_FILE, layers)):
            at = f"model.layers.{layer}."
            tensors |= {f"{at}{name}.weight": normal(*shape) for name, shape in shapes.items()}
            tensors |= {f"{at}{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        file = f"model-{first:05d}.safetensors"
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
        tensors = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": grouped,
        "head_dim": head,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def measure(method: str, model: Path, compiled: bool) -> None:
    """Print the time that vLLM takes to be ready, and of a step at each batch size."""
    from vllm import LLM, SamplingParams

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    graphs: dict[str, object] = {} if compiled else {"mode": 0}
    if torch.cuda.is_available():
        graphs["cudagraph_capture_sizes"] = [1 << i for i in range(max(BATCHES).bit_length())]
        graphs |= {} if compiled else {"cudagraph_mode": "FULL_DECODE_ONLY"}
    options = METHODS[method][0] | {"max_model_len": 1024, "max_num_seqs": max(BATCHES), "compilation_config": graphs}
    name = method + "+compile" * compiled
    start = time.perf_counter()
    llm = LLM(str(model), dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    print(json.dumps({"method": name, "ready_s": round(time.perf_counter() - start, 1)}), flush=True)

    def answer(batch: int, tokens: int, seed: int) -> float:
        draw = random.Random(seed)
        prompts = [{"prompt_token_ids": [draw.randrange(10, vocabulary) for _ in range(PROMPT)]} for _ in range(batch)]
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    for batch in BATCHES:
        answer(batch, SHORT, 0)
        steps = [(answer(batch, LONG, seed) - answer(batch, SHORT, seed)) / (LONG - SHORT) for seed in range(3)]
        step = statistics.median(steps)
        row = {"method": name, "batch": batch, "tok_s": round(batch / step, 1), "step_ms": round(step * 1e3, 3)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
