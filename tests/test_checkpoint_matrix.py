"""Checkpoints both ways: the commands write what transformers with bitsandbytes writes, and each reads the other.

The real bitsandbytes answers from another process (``bnb_models.py``); where it is not (see
``test_bitsandbytes_live.py``), its tests are skipped. The others load with transformers on halfbyte.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import MODEL, assert_same, tensors_of
from safetensors.torch import load_file
from test_bitsandbytes_live import ask_oracle, oracle_environment

import halfbyte as hb
from halfbyte.cli import main

transformers = pytest.importorskip("transformers")

hb.replace_bitsandbytes()

import bnb_models  # noqa: E402  # here it loads with halfbyte

SCHEMES = [
    (kind, double, storage, shard)
    for kind in ("nf4", "fp4")
    for double in (False, True)
    for storage, shard in (("uint8", "5GB"), ("bfloat16", "2MB"))
] + [("int8", False, "uint8", "2MB")]
IDS = ["-".join(map(str, scheme)) for scheme in SCHEMES]


@pytest.fixture(autouse=True)
def _one_thread():
    """The mean of the scales is then summed in the same order on both sides."""
    torch.set_num_threads(1)


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def quantize(source, destination, kind, double, storage, shard):
    storage = {"bfloat16": "bf16"}.get(storage, storage)
    options = ["--double-quant"] * double + ([] if kind == "int8" else ["--storage", storage])
    run("quantize", source, destination, "--scheme", kind, "--shard-size", shard, "--quiet", *options)


def ask(requests, folder):
    (folder / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, str(Path(__file__).with_name("bnb_models.py")), str(folder / "requests.json")]
    done = subprocess.run(command, env=oracle_environment(), capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What of each scheme bitsandbytes saves (``theirs``), what the command writes, and what transformers on halfbyte
    makes of ``theirs`` (``again``) and of the float model (``flight``); and bitsandbytes' answers to the first three.
    """
    found = ask_oracle("where")
    if found.returncode or "halfbyte" in json.loads(found.stdout.splitlines()[-1])["file"]:
        pytest.skip("no real bitsandbytes: install it, or name its folder in HALFBYTE_BITSANDBYTES_PATH")
    folder = tmp_path_factory.mktemp("matrix")
    torch.set_num_threads(1)
    requests = []
    for scheme, name in zip(SCHEMES, IDS, strict=True):
        quantize(MODEL, folder / f"ours-{name}", *scheme)
        place = {"source": str(MODEL), "destination": str(folder / f"theirs-{name}")}
        options = dict(zip(("kind", "double", "storage", "shard"), scheme, strict=True))
        requests.append({"op": "save", **place, **options})
    ask(requests, folder)
    for (kind, double, storage, shard), name in zip(SCHEMES, IDS, strict=True):
        other_shard = {"5GB": "2MB", "2MB": "5GB"}[shard]
        model = bnb_models.load(str(folder / f"theirs-{name}"))
        model.save_pretrained(folder / f"again-{name}", max_shard_size=other_shard)
        model = bnb_models.load(str(MODEL), kind, double, storage)
        model.save_pretrained(folder / f"flight-{name}", max_shard_size=shard)
    ask(
        [
            {"op": "answer", "path": str(folder / f"{whose}-{name}"), "out": str(folder / f"{whose}-{name}.answer")}
            for name in IDS
            for whose in ("ours", "theirs", "again")
        ],
        folder,
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_the_command_writes_what_bitsandbytes_saves(folder, name):
    ours, theirs = folder / f"ours-{name}", folder / f"theirs-{name}"
    assert_same(tensors_of(ours), tensors_of(theirs))
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (ours, theirs)]
    assert configs[0] == configs[1]
    indices = [path / "model.safetensors.index.json" for path in (ours, theirs)]
    assert indices[0].exists() == indices[1].exists()
    if indices[0].exists():
        metadata = [json.loads(index.read_text())["metadata"] for index in indices]
        assert metadata[0]["total_size"] == metadata[1]["total_size"]


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_bitsandbytes_reads_what_the_command_writes(folder, name):
    answers = [load_file(folder / f"{whose}-{name}.answer") for whose in ("ours", "theirs")]
    assert_same(*answers)
    assert answers[0]["logits"].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_transformers_on_halfbyte_saves_again_what_bitsandbytes_saved(folder, name):
    assert_same(tensors_of(folder / f"again-{name}"), tensors_of(folder / f"theirs-{name}"))
    sharded = [(folder / f"{whose}-{name}/model.safetensors.index.json").exists() for whose in ("again", "theirs")]
    assert sorted(sharded) == [False, True]
    # And back: what bitsandbytes decodes and computes is the same.
    assert_same(load_file(folder / f"again-{name}.answer"), load_file(folder / f"theirs-{name}.answer"))


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_transformers_on_halfbyte_quantizes_to_the_files_of_bitsandbytes(folder, name):
    ours, theirs = folder / f"flight-{name}", folder / f"theirs-{name}"
    assert [file.name for file in sorted(ours.iterdir())] == [file.name for file in sorted(theirs.iterdir())]
    assert_same(tensors_of(ours), tensors_of(theirs))
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (ours, theirs)]
    assert configs[0] == configs[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_the_command_decodes_what_bitsandbytes_saves(folder, name, tmp_path):
    run("dequantize", folder / f"theirs-{name}", tmp_path / "out", "--quiet")
    found, original = tensors_of(tmp_path / "out"), tensors_of(MODEL)
    assert found.keys() == original.keys()
    decoded = load_file(folder / f"theirs-{name}.answer")
    for key, tensor in original.items():
        if "_proj" not in key:
            assert torch.equal(found[key], tensor)
        elif "int8" not in name:
            # By value: the sign of FP4's zero depends on which of its kernels bitsandbytes takes.
            assert torch.equal(found[key], decoded[key]) and found[key].dtype == decoded[key].dtype, key
    # And back: the float checkpoint loads where there is nothing of either.
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def tiny(name):
    """A model of a few thousand weights, of an architecture with something of its own."""
    common = {"vocab_size": 64, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2}
    llama = {**common, **heads, "intermediate_size": 128, "num_key_value_heads": 2}
    bert = {**common, **heads, "intermediate_size": 128, "max_position_embeddings": 32}
    t5 = {**common, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
    options = {
        "LlamaForCausalLM": llama,
        "Qwen2ForCausalLM": llama,
        "LlamaForSequenceClassification": {**llama, "num_labels": 3},
        "Gemma2ForCausalLM": {**llama, "head_dim": 16},
        "GPTNeoXForCausalLM": {**common, **heads, "intermediate_size": 128},
        "GPT2LMHeadModel": {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32},
        "OPTForCausalLM": {**common, **heads, "ffn_dim": 128, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
        "T5ForConditionalGeneration": t5,
        "BertForMaskedLM": bert,
        "DistilBertForSequenceClassification": {**common, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
        "BertForSequenceClassification": bert,
        "BertModel": bert,
        "MambaForCausalLM": {**common, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
    }
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class, model_class(model_class.config_class(**options[name]))


ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "LlamaForSequenceClassification",
    "Gemma2ForCausalLM",
    "GPTNeoXForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "T5ForConditionalGeneration",
    "BertForMaskedLM",
    "DistilBertForSequenceClassification",
    "BertForSequenceClassification",
    "BertModel",
    "MambaForCausalLM",
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_makes_4_bit_layers_of_what_is_quantized_and_of_nothing_else(name, tmp_path):
    model_class, model = tiny(name)
    model.save_pretrained(tmp_path / "src")
    run("quantize", tmp_path / "src", tmp_path / "out", "--quiet")
    loaded, report = model_class.from_pretrained(tmp_path / "out", device_map={"": "cpu"}, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    layers = {key: module for key, module in loaded.named_modules() if isinstance(module, hb.nn.Linear4bit)}
    assert len(layers) >= 4
    original = dict(model.named_modules())
    for key, layer in layers.items():
        weight = original[key].weight.detach()
        if isinstance(original[key], transformers.pytorch_utils.Conv1D):
            weight = weight.T.contiguous()
        packed, state = hb.functional.quantize_4bit(weight, quant_type="nf4")
        assert torch.equal(layer.weight.data, packed), key
        assert torch.equal(layer.weight.quant_state.absmax, state.absmax), key
    # Whole are the layers that transformers leaves whole, or such of which the config says so.
    for key, module in loaded.named_modules():
        if type(module) is torch.nn.Linear:
            assert torch.equal(module.weight, original[key].weight), key
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    in_flight = model_class.from_pretrained(tmp_path / "src", quantization_config=config, device_map={"": "cpu"})
    theirs = {key for key, module in in_flight.named_modules() if isinstance(module, hb.nn.Linear4bit)}
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        assert theirs == layers.keys()

    run("dequantize", tmp_path / "out", tmp_path / "back", "--quiet")
    back, report = model_class.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for (key, a), b in zip(model.named_parameters(), back.parameters(), strict=True):
        assert a.shape == b.shape, key
        assert (a - b).norm() <= 0.2 * a.norm(), key
