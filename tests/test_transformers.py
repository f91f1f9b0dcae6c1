"""An unmodified transformers and peft on halfbyte, on a small trained model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import halfbyte

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

halfbyte.replace_bitsandbytes()

MODEL = Path(__file__).parent / "models" / "pycode-llama-7m"
# Of bitsandbytes 0.50.2 in bf16 on all held-out texts; what halfbyte's arithmetic order may change.
PERPLEXITY = {("nf4", False): 5.5080, ("nf4", True): 5.5071, ("fp4", False): 5.7372}
TOLERANCE = 0.003
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def config(quant_type="nf4", double=True, **options):
    options = {"bnb_4bit_compute_dtype": torch.bfloat16} | options
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double, **options
    )


def load(source=MODEL, quantization=None, device="cpu", dtype=torch.bfloat16):
    options = {} if quantization is None else {"quantization_config": quantization}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map={"": device}, **options)
    return model.eval()


@pytest.fixture(scope="module")
def ids():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = json.loads((MODEL / "heldout.json").read_text())[0]
    return torch.tensor([[0, *tokenizer(text)["input_ids"][:63]]])


@torch.inference_mode()
def logits(model, ids):
    return model(input_ids=ids.to(model.device)).logits.cpu()


def tensors(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= safetensors_torch.load_file(file)
    return found


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert same_bytes(a[key], b[key]), key


def same_bytes(a, b):
    """Packed codes that are stored as floats hold NaNs, which equal nothing."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def quantized_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, halfbyte.nn.Linear4bit)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("quant_type", "double"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)])
def test_quantizing_while_loading(ids, device, quant_type, double):
    model = load(quantization=config(quant_type, double), device=device)
    layers = quantized_layers(model)
    assert len(layers) == 7 * 8
    assert not isinstance(model.lm_head, halfbyte.nn.Linear4bit)
    assert model.is_loaded_in_4bit
    for layer in layers.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == (quant_type, double, 64)
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.device.type == device
        assert layer.weight.numel() == math.prod(state.shape) / 2
    # Quantizing moves the logits a little: close to the original's, not equal to them.
    original = logits(load(device=device), ids).float()
    error = (logits(model, ids).float() - original).norm() / original.norm()
    assert 0.01 < error < (0.2 if quant_type == "nf4" else 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("quant_type", "double"), list(PERPLEXITY))
def test_perplexity_is_that_of_bitsandbytes(device, quant_type, double):
    from halfbyte.cli import measure

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    tokens = measure.windows(tokenizer, measure.read_texts(MODEL / "heldout.json"), 2048)
    assert sum(window.numel() - 1 for window in tokens) == 29612
    model = load(quantization=config(quant_type, double), device=device)
    assert measure.perplexity(model, tokens) <= PERPLEXITY[quant_type, double] + TOLERANCE


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
def test_save_reload_and_save_again_are_exact(tmp_path, ids, storage, double):
    model = load(quantization=config(double=double, bnb_4bit_quant_storage=storage))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "first")
    reloaded = load(tmp_path / "first")
    assert torch.equal(logits(reloaded, ids), expected)
    assert len(quantized_layers(reloaded)) == 7 * 8

    reloaded.save_pretrained(tmp_path / "second")
    first = tensors(tmp_path / "first")
    same_tensors(first, tensors(tmp_path / "second"))
    assert torch.equal(logits(load(tmp_path / "second"), ids), expected)

    prefix = "model.layers.3.mlp.down_proj.weight"
    suffixes = {"", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"}
    if double:
        suffixes |= {".nested_absmax", ".nested_quant_map"}
    assert {key.removeprefix(prefix) for key in first if key.startswith(prefix)} == suffixes
    assert first[prefix].dtype == storage
    assert first[prefix].nbytes == 256 * 768 // 2
    saved = json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["load_in_4bit"], saved["bnb_4bit_quant_type"]) == ("bitsandbytes", True, "nf4")


def test_sharded_saving(tmp_path, ids):
    model = load(quantization=config())
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same_tensors(tensors(tmp_path / "whole"), tensors(tmp_path / "shards"))
    reloaded = load(tmp_path / "shards")
    assert torch.equal(logits(reloaded, ids), logits(model, ids))
    reloaded.save_pretrained(tmp_path / "again", max_shard_size="1MB")
    same_tensors(tensors(tmp_path / "whole"), tensors(tmp_path / "again"))


def test_parameters_are_counted_as_weights_not_as_bytes():
    original = load()
    assert load(quantization=config()).num_parameters() == original.num_parameters()


@pytest.mark.parametrize("blocksize", [32, 256])
def test_another_block_size(tmp_path, ids, blocksize):
    options = config()
    options.bnb_4bit_blocksize = blocksize
    model = load(quantization=options)
    assert {layer.weight.quant_state.blocksize for layer in quantized_layers(model).values()} == {blocksize}
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path)
    assert {layer.weight.quant_state.blocksize for layer in quantized_layers(reloaded).values()} == {blocksize}
    assert torch.equal(logits(reloaded, ids), logits(model, ids))


def test_a_block_size_that_does_not_exist_is_refused():
    options = config()
    options.bnb_4bit_blocksize = 48
    with pytest.raises(halfbyte.errors.ArgumentError, match=r"blocksize.*48"):
        load(quantization=options)


@pytest.mark.parametrize("saved_before", [False, True])
def test_dequantizing(tmp_path, ids, saved_before):
    model = load(quantization=config())
    expected = logits(model, ids)
    if saved_before:
        model.save_pretrained(tmp_path)  # leaves the name of the dtype in model.config.dtype
    weight = model.model.layers[0].mlp.up_proj.weight
    plain = halfbyte.functional.dequantize_4bit(weight.data, weight.quant_state)
    model = model.dequantize()
    assert not quantized_layers(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, plain)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(model, ids).float(), expected.float(), atol=0.25)
    assert model.num_parameters() == load().num_parameters()
    model.to(torch.float32)  # an ordinary model again


def test_dequantizing_in_fp32_gives_a_model_that_runs(ids):
    model = load(quantization=config(bnb_4bit_compute_dtype=torch.float32))
    expected = logits(model, ids).float()
    model = model.dequantize(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    error = (logits(model, ids) - expected).norm() / expected.norm()
    assert error < 0.02


@pytest.mark.parametrize("device", DEVICES)
def test_generating(ids, device):
    model = load(quantization=config(), device=device)
    prompt = ids[:, :16].to(model.device)
    assert model.hf_quantizer.is_compileable
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    written = model.generate(prompt, **options)
    assert written.shape == (1, 28)
    static = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(written, static)
    if device == "cuda":  # where generate compiles by itself
        compiled = model.generate(prompt, cache_implementation="static", **options)
        assert compiled.shape == written.shape
        assert torch.equal(compiled[:, :17], written[:, :17])
    # The first token is the one that the logits say.
    assert written[0, 16] == logits(model, ids[:, :16])[0, -1].argmax()


def test_skip_patterns_are_heeded():
    model = load(quantization=config(llm_int8_skip_modules=["lm_head", "down_proj"]))
    names = quantized_layers(model)
    assert len(names) == 6 * 8
    assert not any("down_proj" in name for name in names)


def lora_model(reference=False):
    peft = pytest.importorskip("peft")
    model = load(quantization=config()) if not reference else load(quantization=config()).dequantize()
    if not reference:
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    options = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, options)


def test_preparing_for_training_leaves_packed_weights_alone():
    peft = pytest.importorskip("peft")
    model = load(quantization=config(bnb_4bit_quant_storage=torch.bfloat16))
    before = {name: layer.weight.data.clone() for name, layer in quantized_layers(model).items()}
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, layer in quantized_layers(model).items():
        assert same_bytes(layer.weight.data, before[name])
    assert model.model.norm.weight.dtype == torch.float32
    assert model.is_gradient_checkpointing


def test_qlora_steps_reduce_the_loss_and_train_adapters_only(ids):
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    model = lora_model()
    assert sum(isinstance(module, LoraLinear4bit) for module in model.modules()) == 7 * 8
    model.train()
    before = {name: layer.weight.data.clone() for name, layer in quantized_layers(model).items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, layer in quantized_layers(model).items():
        assert same_bytes(layer.weight.data, before[name])
        assert layer.weight.grad is None


def test_gradients_are_those_of_the_dequantized_model(ids):
    quantized, plain = lora_model(), lora_model(reference=True)
    gradients = []
    for model in (quantized, plain):
        model(input_ids=ids, labels=ids).loss.backward()
        # lora_A has no gradient before the first step: lora_B is zero.
        gradients.append(
            {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None and "lora_B" in name}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 7 * 8
    for name, gradient in gradients[0].items():
        error = (gradient - gradients[1][name]).norm() / gradients[1][name].norm()
        assert error < 0.1, name  # bf16 against bf16 with fp32 norms


def test_merging_adapters(ids):
    model = lora_model().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted = logits(model, ids).float()
    merged = model.merge_and_unload()
    assert len(quantized_layers(merged)) == 7 * 8
    error = (logits(merged, ids).float() - adapted).norm() / adapted.norm()
    assert error < 0.25  # the sum is quantized again


CASES = [("nf4", True, "uint8"), ("nf4", False, "bfloat16"), ("fp4", True, "bfloat16"), ("fp4", False, "uint8")]


@pytest.mark.skipif("HALFBYTE_BITSANDBYTES_PATH" not in os.environ, reason="HALFBYTE_BITSANDBYTES_PATH is not set")
def test_checkpoints_cross_from_the_real_bitsandbytes_and_back(tmp_path, ids):
    """Written there, read and written here, read there: the same bytes, and the same weights, whole and in shards."""
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from safetensors.torch import save_file
import bitsandbytes as bnb
assert "halfbyte" not in sys.modules and bnb.__version__ == "0.50.2"
what, folder, source, cases = sys.argv[1:]
def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map={"": "cpu"}, **options)
def dump(model, path):
    save_file({n: bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
               for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}, path)
for number, (kind, double, storage) in enumerate(json.loads(cases)):
    if what == "write":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
                                    bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=storage)
        model = load(source, quantization_config=config)
        model.save_pretrained(f"{folder}/theirs{number}", max_shard_size="1MB" if number % 2 else "1GB")
        dump(model, f"{folder}/theirs{number}.safetensors")
    else:
        dump(load(f"{folder}/ours{number}"), f"{folder}/read{number}.safetensors")
"""

    def there(what):
        env = os.environ | {"PYTHONPATH": os.environ["HALFBYTE_BITSANDBYTES_PATH"]}
        command = [sys.executable, "-c", code, what, tmp_path, MODEL, json.dumps(CASES)]
        subprocess.run(command, check=True, env=env, timeout=300)

    def dense(model):
        return {
            name: halfbyte.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            for name, layer in quantized_layers(model).items()
        }

    there("write")
    for number, (kind, double, storage) in enumerate(CASES):
        theirs = load(tmp_path / f"theirs{number}")
        assert len(list((tmp_path / f"theirs{number}").glob("*.safetensors"))) == (5 if number % 2 else 1)
        wanted = safetensors_torch.load_file(tmp_path / f"theirs{number}.safetensors")
        found = dense(theirs)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)  # but for the sign of FP4's zero
        theirs.save_pretrained(tmp_path / f"ours{number}", max_shard_size="1GB" if number % 2 else "1MB")
        same_tensors(tensors(tmp_path / f"ours{number}"), tensors(tmp_path / f"theirs{number}"))
        # From the same weights both make the same file.
        own = load(quantization=config(kind, double, bnb_4bit_quant_storage=storage))
        own.save_pretrained(tmp_path / f"own{number}")
        same_tensors(tensors(tmp_path / f"own{number}"), tensors(tmp_path / f"theirs{number}"))
    there("read")
    for number in range(len(CASES)):
        read, written = (
            safetensors_torch.load_file(tmp_path / f"{name}{number}.safetensors") for name in ("read", "theirs")
        )
        same_tensors(read, written)
