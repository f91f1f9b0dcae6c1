"""Stacked experts in transformers: 4 bits while loading, old and new files, adapters."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

import halfbyte
from halfbyte import functional as F
from halfbyte.nn import Experts4bit, Linear4bit

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

halfbyte.replace_bitsandbytes()

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
IDS = torch.arange(24).view(1, -1)


def float_model(kind, folder, **sizes):
    torch.manual_seed(0)
    if kind == "qwen3_moe":
        options = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
        config = transformers.Qwen3MoeConfig(**BASE | options | sizes)
        model = transformers.Qwen3MoeForCausalLM(config)
    elif kind == "mixtral":
        options = {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**BASE | options | sizes))
    else:  # transposed, interleaved, with biases and a gate of its own; saved stacked
        options = {
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "layer_types": ["full_attention"] * 2,
            "max_position_embeddings": 4096 * 32,
        }
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**BASE | options | sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def bitsandbytes_config(double=True, kind="nf4", storage="uint8"):
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def load(folder, config=None, dtype=torch.bfloat16, device="cpu", **options):
    options["device_map"] = {"": device}
    if config is not None:
        options["quantization_config"] = config
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS.to(model.device)).logits.float().cpu()


def distance(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, Experts4bit)]


def entries(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors_torch.load_file(file)
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key].reshape(-1).view(torch.uint8), b[key].reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("config", [halfbyte.HalfbyteConfig("nf4"), bitsandbytes_config()], ids=["halfbyte", "bnb"])
def test_quantized_while_loading_and_saved(tmp_path, kind, config, device):
    folder = float_model(kind, tmp_path / "float")
    original = logits(load(folder, device=device))
    model = load(folder, config, device=device)
    assert len(experts_of(model)) == 2
    for experts in experts_of(model):
        state = experts.down_proj.quant_state
        assert experts.down_proj.numel() == state.shape.numel() // 2
    expected = logits(model)
    assert 0.01 < distance(expected, original) < 0.25

    model.save_pretrained(tmp_path / "first", max_shard_size="60KB")
    written = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    saved = entries(tmp_path / "first")
    if kind == "gpt_oss":
        assert "model.layers.1.mlp.experts.gate_up_proj.quant_state.bitsandbytes__nf4" in saved
        own = isinstance(config, halfbyte.HalfbyteConfig)
        assert written["quant_method"] == ("halfbyte" if own else "bitsandbytes")
    else:
        gate = {"qwen3_moe": "mlp.experts.3.gate_proj", "mixtral": "block_sparse_moe.experts.3.w1"}[kind]
        weight = f"model.layers.1.{gate}.weight"
        assert {
            weight,
            f"{weight}.absmax",
            f"{weight}.quant_map",
            f"{weight}.quant_state.bitsandbytes__nf4",
        } <= saved.keys()
        assert written["quant_method"] == "bitsandbytes"
    again = load(tmp_path / "first", device=device)
    assert len(experts_of(again)) == 2
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "second", max_shard_size="60KB")
    assert_same(saved, entries(tmp_path / "second"))

    dense = again.dequantize()
    assert not experts_of(dense)
    assert distance(logits(dense), expected) < 0.03


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_any_experts_implementation_gives_the_same(tmp_path, implementation):
    folder = float_model("qwen3_moe", tmp_path)
    model = load(folder, halfbyte.HalfbyteConfig(), experts_implementation=implementation)
    assert len(experts_of(model)) == 2
    assert torch.equal(logits(model), logits(load(folder, halfbyte.HalfbyteConfig())))


def test_experts_may_stay_in_16_bits(tmp_path):
    folder = float_model("qwen3_moe", tmp_path / "float")
    theirs = bitsandbytes_config()
    theirs.bnb_4bit_experts = False
    for config in (halfbyte.HalfbyteConfig(experts=False), theirs):
        model = load(folder, config)
        assert not experts_of(model)
        assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 2 * 4
        model.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
        assert not experts_of(again)  # as the file has them
        assert torch.equal(logits(again), logits(model))


def test_a_checkpoint_with_some_layers_quantized(tmp_path):
    folder = float_model("qwen3_moe", tmp_path / "float")
    model = load(folder, halfbyte.HalfbyteConfig(skip=["model.layers.1.mlp.experts"]))
    assert len(experts_of(model)) == 1
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    assert len(experts_of(again)) == 1
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "second")
    assert_same(entries(tmp_path / "first"), entries(tmp_path / "second"))


def test_nested_scales_that_fit_stay_nested(tmp_path):
    """A projection of 128 x 128 has 256 scales, which is a whole block of theirs."""
    folder = float_model("qwen3_moe", tmp_path / "float", hidden_size=128, moe_intermediate_size=128, num_experts=4)
    model = load(folder, halfbyte.HalfbyteConfig("nf4"))
    model.save_pretrained(tmp_path / "saved")
    key = "model.layers.0.mlp.experts.2.up_proj.weight"
    saved = entries(tmp_path / "saved")
    assert saved[f"{key}.absmax"].dtype == torch.uint8
    assert saved[f"{key}.nested_absmax"].shape == (1,)
    again = load(tmp_path / "saved")
    for a, b in zip(experts_of(again), experts_of(model), strict=True):
        assert a.gate_up_proj.quant_state.nested
        assert a.gate_up_proj.quant_state == b.gate_up_proj.quant_state
    assert torch.equal(logits(again), logits(model))


def test_experts_whose_blocks_span_projections_are_saved_stacked(tmp_path):
    folder = float_model("qwen3_moe", tmp_path / "float", hidden_size=40, moe_intermediate_size=20, num_experts=4)
    model = load(folder, halfbyte.HalfbyteConfig("nf4"))
    assert len(experts_of(model)) == 2
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "halfbyte"
    assert "model.layers.0.mlp.experts.gate_up_proj.absmax" in entries(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


FORMS = [
    (kind, double, storage) for kind in ("nf4", "fp4") for double in (False, True) for storage in ("uint8", "bfloat16")
]


def one_by_one(folder, target, quantize, kind="nf4", double=False, storage="uint8"):
    """Write a checkpoint as transformers 4 had it: each expert's projections as quantized linear layers."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = bitsandbytes_config(double, kind, storage).to_dict()
    (target / "config.json").write_text(json.dumps(config))
    saved, dense = {}, {}
    for key, value in entries(folder).items():
        if ".mlp.experts." in key or "_proj.weight" in key:
            saved[key], more, dense[key] = quantize(value, kind, double, storage)
            saved |= {f"{key}.{name}": entry for name, entry in more.items()}
        else:
            saved[key] = value
    safetensors_torch.save_file(saved, target / "model.safetensors", {"format": "pt"})
    return dense


def ours(value, kind, double, storage):
    options = {"quant_type": kind, "compress_statistics": double, "quant_storage": getattr(torch, storage)}
    packed, state = F.quantize_4bit(value, **options)
    return packed, state.as_dict(packed=True), F.dequantize_4bit(packed, state)


@pytest.mark.parametrize(("kind", "double", "storage"), FORMS)
def test_files_from_before_transformers_5(tmp_path, kind, double, storage):
    folder = float_model("qwen3_moe", tmp_path / "float")
    dense = one_by_one(folder, tmp_path / "old", ours, kind, double, storage)
    model = load(tmp_path / "old")
    assert len(experts_of(model)) == 2
    for layer, experts in enumerate(experts_of(model)):
        up, down = (F.dequantize_4bit(p.data, p.quant_state) for p in (experts.gate_up_proj, experts.down_proj))
        for expert in range(8):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            assert torch.equal(down[expert], dense[f"{prefix}.down_proj.weight"])
            parts = [dense[f"{prefix}.{name}.weight"] for name in ("gate_proj", "up_proj")]
            assert torch.equal(up[expert], torch.cat(parts))
    model.save_pretrained(tmp_path / "again")
    assert_same(entries(tmp_path / "old"), entries(tmp_path / "again"))


def test_an_expert_without_scales_is_refused(tmp_path, caplog, monkeypatch):
    # Other tests, and accelerate, leave transformers' logger as they like it.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "disabled", False)
    caplog.set_level(logging.INFO, logger="transformers")
    folder = float_model("qwen3_moe", tmp_path / "float")
    one_by_one(folder, tmp_path / "old", ours)
    saved = entries(tmp_path / "old")
    del saved["model.layers.0.mlp.experts.5.up_proj.weight.absmax"]
    safetensors_torch.save_file(saved, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion"):
        load(tmp_path / "old")
    assert "statistics for some experts, but not for all" in caplog.text


@pytest.mark.skipif("HALFBYTE_BITSANDBYTES_PATH" not in os.environ, reason="HALFBYTE_BITSANDBYTES_PATH is not set")
@pytest.mark.parametrize(("kind", "double", "storage"), FORMS)
def test_old_files_of_the_real_bitsandbytes(tmp_path, kind, double, storage):
    """Its own experts, one by one, in; the same bytes out, and decoded to the same weights by it."""
    # Rows of a block or more: of shorter ones, bitsandbytes' CPU code decodes all but the first wrongly.
    folder = float_model("qwen3_moe", tmp_path / "float", moe_intermediate_size=64)
    code = """
import sys, torch, bitsandbytes
from safetensors.torch import load_file, save_file
assert "halfbyte" not in sys.modules
source, target, kind, double, storage = sys.argv[1:]
options = {"quant_type": kind, "compress_statistics": double == "True", "quant_storage": getattr(torch, storage)}
done = {}
for key, value in load_file(source).items():
    packed, state = bitsandbytes.functional.quantize_4bit(value, **options)
    done[key] = packed
    done |= {f"{key}.{name}": entry.clone() for name, entry in state.as_dict(packed=True).items()}
    done["dense:" + key] = bitsandbytes.functional.dequantize_4bit(packed, state)
save_file(done, target)
"""
    weights = {k: v for k, v in entries(folder).items() if ".mlp.experts." in k or "_proj.weight" in k}
    safetensors_torch.save_file(weights, tmp_path / "weights.safetensors")
    env = os.environ | {"PYTHONPATH": os.environ["HALFBYTE_BITSANDBYTES_PATH"]}
    command = [
        sys.executable,
        "-c",
        code,
        tmp_path / "weights.safetensors",
        tmp_path / "theirs.safetensors",
        kind,
        str(double),
        storage,
    ]
    subprocess.run(command, check=True, env=env, timeout=240)
    theirs = safetensors_torch.load_file(tmp_path / "theirs.safetensors")
    keys = iter(weights)

    def quantize(value, *form):
        assert form == (kind, double, storage)
        key = next(keys)
        assert torch.equal(weights[key], value)
        more = {k.removeprefix(f"{key}."): v for k, v in theirs.items() if k.startswith(f"{key}.")}
        return theirs[key], more, theirs["dense:" + key]

    dense = one_by_one(folder, tmp_path / "old", quantize, kind, double, storage)
    model = load(tmp_path / "old")
    state = experts_of(model)[1].down_proj
    stack = F.dequantize_4bit(state.data, state.quant_state)
    assert all(torch.equal(stack[e], dense[f"model.layers.1.mlp.experts.{e}.down_proj.weight"]) for e in range(8))
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert_same(entries(tmp_path / "old"), entries(tmp_path / "again"))


# ---- adapters


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets, **options)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("device", DEVICES)
def test_lora_on_experts_is_what_it_is_on_float_ones(tmp_path, device):
    peft = pytest.importorskip("peft")
    folder = float_model("qwen3_moe", tmp_path / "float")
    # In fp32: a rounding that sends a token to another expert changes gradients by more than rounding.
    quantized = adapted(load(folder, halfbyte.HalfbyteConfig(), torch.float32, device))
    reference = adapted(load(folder, halfbyte.HalfbyteConfig(), torch.float32, device).dequantize())
    saved, wanted = (peft.get_peft_model_state_dict(model) for model in (quantized, reference))
    assert {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in wanted.items()}
    gradients = []
    for model in (quantized, reference):
        model.train()
        model(input_ids=IDS.to(device), labels=IDS.to(device)).loss.backward()
        gradients.append({name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None})
        model.eval()
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 2 * 3
    for name, gradient in gradients[1].items():
        assert distance(gradients[0][name], gradient) < 1e-4, name
    assert distance(logits(quantized), logits(reference)) < 1e-5


def test_lora_on_experts_is_saved_merged_and_unmerged(tmp_path):
    peft = pytest.importorskip("peft")
    folder = float_model("qwen3_moe", tmp_path / "float")
    base = logits(load(folder, halfbyte.HalfbyteConfig()))
    model = adapted(load(folder, halfbyte.HalfbyteConfig())).eval()
    expected = logits(model)
    effect = distance(expected, base)
    assert effect > 0.2
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder, halfbyte.HalfbyteConfig()), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    model.merge_adapter()
    assert distance(logits(model), expected) < 0.2  # quantized again
    model.unmerge_adapter()
    assert distance(logits(model), expected) < 0.2
    merged = model.merge_and_unload(safe_merge=True)
    assert len(experts_of(merged)) == 2
    assert distance(logits(merged), expected) < 0.2


def test_lora_dropout_on_experts_is_refused(tmp_path):
    model = load(float_model("qwen3_moe", tmp_path), halfbyte.HalfbyteConfig())
    with pytest.raises(ValueError, match="lora_dropout"):
        adapted(model, lora_dropout=0.1)
