"""peft's methods on 4-bit layers: adapters of several kinds trained, merged, saved and loaded again."""

import copy
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte.nn import Linear4bit

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

halfbyte.replace_bitsandbytes()

MODEL = Path(__file__).parent / "models" / "pycode-llama-7m"
IDS = torch.arange(40, 88).view(2, -1)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def load(dtype=torch.float32, double=True):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    return quantized(config, dtype)


def quantized(config, dtype):
    """A model on the CPU, also where there is a GPU, to which transformers would take it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    )
    return model.eval()


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS).logits


def distance(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def adapted(model, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM", **options))


def train(model, steps=4):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"init_lora_weights": "olora"}, {"use_rslora": True, "init_lora_weights": "gaussian"}],
    ids=["lora", "dora", "olora", "rslora"],
)
def test_training_saving_loading_and_merging(tmp_path, options):
    base = logits(load())
    model = adapted(load(), **options)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 7 * 8
    assert distance(logits(model), base) < (0.2 if options.get("init_lora_weights") == "olora" else 1e-4)
    train(model)
    expected = logits(model)
    effect = distance(expected, base)
    assert effect > 0.3
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(), tmp_path).eval()
    # OLoRA changes the base weights when it starts; what it saves is meant for those.
    if options.get("init_lora_weights") != "olora":
        assert torch.equal(logits(again), expected)
    dense = halfbyte.functional.dequantize_4bit
    layers = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear4bit)}
    assert len(layers) == 3 * 8
    before = {name: dense(layer.weight.data, layer.weight.quant_state) for name, layer in layers.items()}
    model.merge_adapter()
    for name, layer in layers.items():
        if not options.get("use_dora"):  # the sum, quantized again
            wanted = before[name] + layer.get_delta_weight("default")
            packed, state = halfbyte.functional.quantize_4bit(wanted, quant_type="nf4", compress_statistics=True)
            assert torch.equal(layer.weight.data, packed)
            assert layer.weight.quant_state == state
    assert distance(logits(model), expected) < effect
    model.unmerge_adapter()
    assert distance(logits(model), expected) < effect
    merged = model.merge_and_unload()
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in merged.modules())
    assert sum(isinstance(module, Linear4bit) for module in merged.modules()) == 7 * 8
    assert distance(logits(merged), expected) < effect


def test_several_adapters_on_one_model(tmp_path):
    model = adapted(load())
    train(model)
    first = logits(model)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    train(model)
    assert distance(logits(model), first) > 0.005
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load()))


def test_a_dequantized_merge_is_exact():
    """Merging into float weights, which quantizing again does not come between."""
    model = train(adapted(load()))
    expected = logits(model)
    deltas = {
        name: module.get_delta_weight("default") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    plain = model.unload().dequantize(torch.float32)
    for name, delta in deltas.items():
        plain.get_submodule(name.removeprefix("base_model.model.")).weight.data += delta
    assert distance(logits(plain), expected) < 1e-4


def test_loftq_brings_the_start_closer_to_the_float_weights():
    """What peft's ``replace_lora_weights_loftq`` does to each layer (Li et al. 2023, arXiv:2310.08659), on the CPU."""
    import bitsandbytes
    from peft.utils import loftq_utils

    plain = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = adapted(load())
    done = 0
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear4bit):
            weight = plain.get_submodule(name.removeprefix("base_model.model.")).weight.data
            base = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            factors = loftq_utils._low_rank_decomposition(weight - base, reduced_rank=8)
            module.lora_B["default"].weight.data, module.lora_A["default"].weight.data = factors["L"], factors["R"]
            start = base + module.get_delta_weight("default")
            assert (weight - start).norm() < 0.98 * (weight - base).norm()
            done += 1
    assert done == 3 * 8
    train(model)


@pytest.mark.gpu
def test_loftq_of_peft(tmp_path):
    def loaded():
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return transformers.AutoModelForCausalLM.from_pretrained(
            MODEL, dtype=torch.float32, quantization_config=config, device_map={"": "cuda"}
        )

    plain = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).cuda().eval()
    ids = IDS.cuda()
    with torch.no_grad():
        wanted = plain(input_ids=ids).logits
        model = adapted(loaded())
        before = distance(model(input_ids=ids).logits, wanted)
        peft.replace_lora_weights_loftq(model, model_path=str(MODEL / "model.safetensors"))
        assert distance(model(input_ids=ids).logits, wanted) < before


def test_a_copy_of_a_model_with_adapters():
    model = train(adapted(load(), use_dora=True))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        assert a is not b


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_preparing_for_training_casts_all_but_packed_weights(storage):
    config = halfbyte.HalfbyteConfig("nf4", quant_storage=storage)
    model = quantized(config, torch.bfloat16)
    before = [m.weight.data.clone().view(torch.uint8) for m in model.modules() if isinstance(m, Linear4bit)]
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert all(torch.equal(m.weight.data.view(torch.uint8), b) for m, b in zip(layers, before, strict=True))
    rest = [p for p in model.parameters() if not isinstance(p, halfbyte.nn.Params4bit)]
    assert {p.dtype for p in rest} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    train(adapted(model))
