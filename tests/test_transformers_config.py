"""``HalfbyteConfig``: halfbyte in transformers under its own name, whatever ``import bitsandbytes`` finds."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import halfbyte
from halfbyte.errors import ArgumentError, DtypeError
from halfbyte.nn import Linear4bit

transformers = pytest.importorskip("transformers")

MODEL = Path(__file__).parent / "models" / "pycode-llama-7m"


def load(source=MODEL, config=None, dtype=torch.bfloat16, **options):
    if config is not None:
        options["quantization_config"] = config
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, **{"device_map": {"": "cpu"}} | options
    ).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.arange(40, 72).view(1, -1)


@torch.inference_mode()
def logits(model, ids):
    return model(input_ids=ids).logits


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_what_it_says_is_what_the_layers_are(ids, scheme, double):
    model = load(config=halfbyte.HalfbyteConfig(scheme, double_quant=double, blocksize=128, scale_search=True))
    assert len(layers(model)) == 7 * 8
    for layer in layers(model).values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == (scheme, double, 128)
        assert layer.weight.scale_search
        assert layer.compute_dtype == torch.bfloat16  # the model's
    original = logits(load(), ids).float()
    assert (logits(model, ids).float() - original).norm() < 0.3 * original.norm()


def test_a_checkpoint_says_bitsandbytes_and_needs_no_halfbyte_config(tmp_path, ids):
    model = load(config=halfbyte.HalfbyteConfig("nf4", quant_storage="bfloat16", skip=["down_proj"]))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "first", max_shard_size="1MB")
    written = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["load_in_4bit"]) == ("bitsandbytes", True)
    assert (written["bnb_4bit_quant_type"], written["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert (written["bnb_4bit_compute_dtype"], written["bnb_4bit_quant_storage"]) == ("bfloat16", "bfloat16")
    assert {"lm_head", "down_proj"} <= set(written["llm_int8_skip_modules"])
    for config in (None, halfbyte.HalfbyteConfig()):
        again = load(tmp_path / "first", config)
        assert torch.equal(logits(again, ids), expected)
        assert len(layers(again)) == 6 * 8
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(load(tmp_path / "again"), ids), expected)


def test_beside_an_installed_bitsandbytes(tmp_path):
    """With a bitsandbytes that is not ours, HalfbyteConfig still makes halfbyte's layers, and so do its checkpoints."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(
        "supported_torch_devices = {'cpu'}\n__version__ = '0.49.9'\nclass nn:\n"
        "    class Linear4bit: pass\n    class Linear8bitLt: pass\n    class Params4bit: pass\n"
    )
    (tmp_path / "bitsandbytes-0.49.9.dist-info").mkdir()
    (tmp_path / "bitsandbytes-0.49.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.49.9\n"
    )
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
import halfbyte, transformers
from halfbyte import _dropin
assert not _dropin.is_active()
def load(source):
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=halfbyte.HalfbyteConfig("nf4"))
def kinds(model):
    return {{type(m) for n, m in model.named_modules() if n.endswith("q_proj")}}
model = load({str(MODEL)!r})
assert kinds(model) == {{halfbyte.nn.Linear4bit}}
model.save_pretrained({str(tmp_path / "saved")!r})
again = load({str(tmp_path / "saved")!r})
assert kinds(again) == {{halfbyte.nn.Linear4bit}}
ids = torch.arange(20, device=model.device).view(1, -1)
assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
assert transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__name__ == "Bnb4BitHfQuantizer"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": "nf5"}, ArgumentError, "scheme.*'nf5'"),
        ({"blocksize": 48}, ArgumentError, "blocksize.*48"),
        ({"quant_storage": torch.int64}, DtypeError, "quant_storage"),
        ({"compute_dtype": "bf17"}, ArgumentError, "compute_dtype.*'bf17'"),
        ({"doublequant": True}, ArgumentError, "no such argument: doublequant"),
    ],
)
def test_what_does_not_exist_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        halfbyte.HalfbyteConfig(**options)


@pytest.mark.parametrize("device_map", ["cpu", "auto", None])
def test_device_maps(ids, device_map):
    model = load(config=halfbyte.HalfbyteConfig(), device_map=device_map)
    assert len(layers(model)) == 7 * 8
    assert logits(model, ids.to(model.device)).isfinite().all()


def test_a_device_map_that_offloads_is_refused():
    with pytest.raises(ValueError, match="device_map"):
        load(config=halfbyte.HalfbyteConfig(), device_map={"model": "cpu", "lm_head": "disk"})


def test_dynamic_skip_lists_end_at_dots(ids, tmp_path):
    """``layers.1`` is not ``layers.11``, of which this model has none, nor ``mlp.gate`` ``mlp.gate_proj``."""
    skip = ["lm_head", "model.layers.1", "mlp.gate", r"model\.layers\.[23]\.self_attn", "layers.0.mlp.down_proj"]
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skip
    )
    model = load(config=config)
    left = {
        name.removeprefix("model.layers.")
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and "layers" in name
    }
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    wanted = {f"1.self_attn.{name}" for name in attention} | {f"1.mlp.{name}" for name in mlp} | {"0.mlp.down_proj"}
    assert left == wanted | {f"{layer}.self_attn.{name}" for layer in (2, 3) for name in attention}
    # What a file holds counts, not what its configuration says.
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    again = load(tmp_path)
    assert layers(again).keys() == layers(model).keys()
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_tied_embeddings_stay_tied(ids, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", halfbyte.HalfbyteConfig())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(layers(model)) == 2 * 7
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again, ids), expected)


def test_conv1d_layers_are_turned_round(tmp_path, ids):
    config = transformers.GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", halfbyte.HalfbyteConfig(double_quant=False))
    assert len(layers(model)) == 2 * 4
    original = logits(load(tmp_path / "float"), ids).float()
    expected = logits(model, ids)
    assert (expected.float() - original).norm() < 0.3 * original.norm()
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized"), ids), expected)
    dense = model.dequantize()
    assert not layers(dense)
    assert (logits(dense, ids) - expected).float().norm() < 0.02 * original.norm()


def test_generating_with_a_static_cache_compiles_the_forward_pass(ids):
    model = load(config=halfbyte.HalfbyteConfig(), dtype=torch.float32)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    wanted = model.generate(ids[:, :8], **options)
    assert model.hf_quantizer.is_compileable
    counter = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    static = model.generate(ids[:, :8], cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, wanted)
    assert counter.frame_count > 0


def test_a_weight_that_is_not_of_the_layer_is_refused(tmp_path, caplog, monkeypatch):
    # Other tests, and accelerate, leave transformers' logger as they like it.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "disabled", False)
    caplog.set_level(logging.INFO, logger="transformers")
    from safetensors.torch import load_file, save_file

    model = load(config=halfbyte.HalfbyteConfig())
    model.save_pretrained(tmp_path)
    entries = load_file(tmp_path / "model.safetensors")
    wrong = Linear4bit(64, 64, quant_type="nf4").to("cpu").state_dict()
    name = "model.layers.0.self_attn.q_proj"
    entries = {key: value for key, value in entries.items() if not key.startswith(name)}
    entries |= {f"{name}.{key}": value for key, value in wrong.items() if key != "bias"}
    save_file(entries, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion"):  # transformers' own, whose report has ours
        load(tmp_path)
    assert "expected a quantized weight of [256, 256], got one of [64, 64]" in caplog.text


@pytest.mark.skipif(not hasattr(halfbyte.nn, "Linear8bitLt"), reason="this halfbyte has no LLM.int8() layers")
@pytest.mark.parametrize("own", [True, False], ids=["halfbyte", "bnb"])
def test_8_bits(ids, tmp_path, own):
    halfbyte.replace_bitsandbytes()
    config = halfbyte.HalfbyteConfig("int8") if own else transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = load(config=config)
    assert sum(isinstance(module, halfbyte.nn.Linear8bitLt) for module in model.modules()) == 7 * 8
    assert model.is_loaded_in_8bit
    expected, original = logits(model, ids), logits(load(), ids).float()
    assert 0.001 < (expected.float() - original).norm() / original.norm() < 0.05
    model.save_pretrained(tmp_path / "first")
    written = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["load_in_8bit"]) == ("bitsandbytes", True)
    again = load(tmp_path / "first")
    assert torch.equal(logits(again, ids), expected)
    again.save_pretrained(tmp_path / "second")  # which bitsandbytes cannot
    assert torch.equal(logits(load(tmp_path / "second"), ids), expected)
    dense = again.dequantize()
    assert (logits(dense, ids) - expected).float().norm() < 0.05 * original.norm()
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_two_devices(ids, tmp_path):
    config = halfbyte.HalfbyteConfig("nf4")
    one = load(config=config, device_map={"": 1})
    assert torch.cuda.current_device() == 0
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 0}
    model = load(config=config, device_map=places | {f"model.layers.{i}": int(i > 3) for i in range(8)})
    assert {layer.weight.device.index for layer in layers(model).values()} == {0, 1}
    wanted = logits(one, ids.to(1)).cpu()
    assert torch.equal(logits(model, ids.to(model.device)).cpu(), wanted)
    assert model.generate(ids.to(model.device), max_new_tokens=4, do_sample=False).shape == (1, 36)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, device_map={"": 0}), ids.to(0)).cpu(), wanted)
    dense = model.dequantize()
    assert logits(dense, ids.to(dense.device)).isfinite().all()
