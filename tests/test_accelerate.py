"""accelerate's own loader of quantized models, saving, and offloading, with halfbyte answering for bitsandbytes."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from checkpoints import MODEL, assert_same, tensors_of

import halfbyte as hb
from halfbyte.nn import Embedding4bit, Embedding8bit, Int8Params, Linear4bit, Linear8bitLt, Params4bit

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

hb.replace_bitsandbytes()

from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model  # noqa: E402

LAYERS = 8 * 7  # of the model: q, k, v, o, gate, up, down in each block


def empty():
    config = transformers.AutoConfig.from_pretrained(MODEL)
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    return model


def four(**options):
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bf16", "torch_dtype": "bf16"} | options
    return BnbQuantizationConfig(load_in_4bit=True, **options)


def eight(**options):
    return BnbQuantizationConfig(load_in_8bit=True, **{"torch_dtype": "bf16"} | options)


def load(config, device_map=None, location=MODEL, **options):
    model = load_and_quantize_model(
        empty(), config, weights_location=str(location), device_map=device_map or {"": "cpu"}, **options
    )
    return model.eval()


def with_a_layer_on(place, device):
    """Return a device map with everything on `device` but the last block."""
    names = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(7)),
    ]
    return dict.fromkeys(names, device) | {"model.layers.7": place}


@torch.no_grad()
def logits(model, device="cpu"):
    return model(input_ids=torch.arange(40, 72, device=device)[None]).logits


def quantized(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_transformers(kind, double):
    model = load(four(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double))
    assert model.is_loaded_in_4bit and len(quantized(model)) == LAYERS and type(model.lm_head) is torch.nn.Linear
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    other = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert_same(model.state_dict(), other.state_dict())
    assert torch.equal(logits(model), logits(other.eval()))


def test_eight_bits_are_those_of_transformers():
    # Codes are of weights in fp16, to which transformers does not round first.
    model = load(eight(torch_dtype="fp16", llm_int8_threshold=6.0))
    assert model.is_loaded_in_8bit and len(quantized(model)) == LAYERS
    other = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL,
        quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float16,
        device_map={"": "cpu"},
    )
    assert_same(model.state_dict(), other.state_dict())
    assert torch.equal(logits(model), logits(other.eval()))


@pytest.mark.parametrize("config", [four, eight])
def test_skipped_modules_and_modules_in_fp32(config):
    model = load(config(torch_dtype="fp16", skip_modules=["lm_head", "o_proj"], keep_in_fp32_modules=["norm"]))
    found = quantized(model)
    assert len(found) == LAYERS - 8 and not any("o_proj" in name for name in found)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float16
    assert model.model.norm.weight.dtype == torch.float32
    assert logits(load(config(skip_modules=["lm_head", "o_proj"]))).isfinite().all()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is there, and accelerate takes it")
@pytest.mark.parametrize("device_map", [None, "auto", "sequential"])
@pytest.mark.parametrize("config", [four, eight])
def test_without_a_gpu_everything_is_on_the_cpu(config, device_map):
    model = load_and_quantize_model(empty(), config(), weights_location=str(MODEL), device_map=device_map)
    assert len(quantized(model)) == LAYERS and {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model.eval()), logits(load(config())))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="8-bit weights go through the GPU")
def test_eight_bit_layers_on_the_disk_come_back_for_each_call(tmp_path):
    wanted = load(eight())
    model = load(eight(), with_a_layer_on("disk", "cpu"), offload_folder=str(tmp_path / "offload"))
    away, here = model.model.layers[7].self_attn.q_proj, model.model.layers[0].self_attn.q_proj
    for _ in range(2):
        assert away.weight.is_meta and away.weight.SCB is None and here.weight.dtype == torch.int8
        assert torch.equal(logits(model), logits(wanted))
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "saved")
    saved, entries = tensors_of(tmp_path / "saved"), wanted.state_dict()
    assert_same(saved, {key: entries[key] for key in entries if key != "lm_head.weight"})


@pytest.mark.parametrize("config", [four, eight])
def test_weights_wait_on_the_disk_while_others_load(config):
    model = load(config(), offload_state_dict=True)
    assert len(quantized(model)) == LAYERS
    assert torch.equal(logits(model), logits(load(config())))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a layer on the GPU would be quantized")
def test_four_bit_maps_of_several_entries_leave_the_cpu_and_the_disk_whole(tmp_path):
    # So says accelerate: what a map names on the CPU is skipped.
    model = load(four(skip_modules=["lm_head"]), with_a_layer_on("disk", "cpu"), offload_folder=str(tmp_path))
    assert not quantized(model)
    whole = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize("shard", ["10GB", "2MB"])
@pytest.mark.parametrize("double", [False, True])
def test_saved_four_bits_load_into_a_quantized_model(double, shard, tmp_path):
    config = four(bnb_4bit_use_double_quant=double)
    model = load(copy.deepcopy(config))
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "2MB")
    entries = tensors_of(tmp_path)
    other = load(copy.deepcopy(config))
    with torch.no_grad():
        for layer in quantized(other).values():
            layer.weight.data.zero_()
    missing, unexpected = other.load_state_dict(entries, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    assert_same(other.state_dict(), model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("shard", ["10GB", "2MB"])
def test_saved_eight_bits_load_by_accelerate_as_they_are(shard, tmp_path):
    model = load(eight())
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size=shard)
    other = load(eight(), location=tmp_path)
    assert_same(other.state_dict(), model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("four_bits", [True, False])
def test_layers_made_empty_keep_their_class_copies_and_state_dicts(four_bits):
    def make():
        if four_bits:
            layers = Linear4bit(64, 32, quant_type="nf4", compress_statistics=False), Embedding4bit(10, 64)
        else:
            layers = (Linear8bitLt(64, 32, has_fp16_weights=False),)
        return torch.nn.ModuleList(layers)

    kind = Params4bit if four_bits else Int8Params
    with accelerate.init_empty_weights():
        layers = make()
    real = make().to("cpu")
    for layer in (*layers, *copy.deepcopy(layers), *pickle.loads(pickle.dumps(layers))):
        assert layer.weight.is_meta and type(layer.weight) is kind and not layer.weight.requires_grad
        again = layer.weight.to(torch.float16).to("meta")
        assert type(again) is kind and again.dtype == torch.float16
    layers.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(layers[0](x), real[0](x))
    assert_same(layers.state_dict(), real.state_dict())
    with accelerate.init_empty_weights():
        table = Embedding8bit(10, 64)
    assert table.weight.is_meta and type(table.weight) is Int8Params


def test_with_an_accelerator_everything_is_left_to_accelerate(monkeypatch):
    from halfbyte.integrations import accelerate as integration

    before = accelerate.utils.bnb.get_quantized_model_device_map
    integration.register()
    assert accelerate.utils.bnb.get_quantized_model_device_map is before
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ValueError, match="dispatched on the CPU or the disk"):
        load(four())


@pytest.mark.parametrize("first", ["accelerate, accelerate.utils", "halfbyte"])
def test_whichever_is_imported_first(first, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("everything is accelerate's")
    code = f"""
        import {first}
        from accelerate.utils import load_and_quantize_model, set_module_tensor_to_device
        import accelerate, torch, halfbyte
        halfbyte.replace_bitsandbytes()
        from accelerate.utils import BnbQuantizationConfig
        with accelerate.init_empty_weights():
            model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        torch.save(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).state_dict(), "weights.bin")
        config = BnbQuantizationConfig(load_in_8bit=True, skip_modules=[])
        model = load_and_quantize_model(model, config, weights_location="weights.bin", device_map={{"": "cpu"}})
        assert type(model[0]) is halfbyte.nn.Linear8bitLt and model[0].weight.dtype == torch.int8
        assert model(torch.randn(2, 64, dtype=torch.float16)).isfinite().all()
    """
    env = {**os.environ, "PYTHONPATH": str(Path(hb.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("config", [four, eight])
def test_on_a_gpu(config):
    model = load(config(), {"": 0})
    assert len(quantized(model)) == LAYERS and model.lm_head.weight.is_cuda
    alone = load_and_quantize_model(empty(), config(), weights_location=str(MODEL)).eval()
    assert torch.equal(logits(model, "cuda"), logits(alone, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_eight_bit_layers_beside_a_gpu(place, tmp_path):
    model = load(eight(), with_a_layer_on(place, 0), offload_folder=str(tmp_path))
    assert model.model.layers[7].self_attn.q_proj.weight.is_meta
    wanted = load(eight(), {"": 0})
    for _ in range(2):
        torch.testing.assert_close(logits(model, "cuda"), logits(wanted, "cuda"))
