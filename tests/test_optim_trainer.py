"""transformers' Trainer with the names it has for bitsandbytes' optimizers, on a small trained model."""

import json
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte import optim

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

halfbyte.replace_bitsandbytes()

MODEL = Path(__file__).parent / "models" / "pycode-llama-7m"
NAMES = {
    "adamw_bnb_8bit": (optim.AdamW, 8, False),
    "adamw_8bit": (optim.AdamW, 8, False),
    "paged_adamw_8bit": (optim.AdamW, 8, True),
    "paged_adamw_32bit": (optim.AdamW, 32, True),
    "ademamix": (optim.AdEMAMix, 32, False),
    "ademamix_8bit": (optim.AdEMAMix, 8, False),
    "paged_ademamix_8bit": (optim.AdEMAMix, 8, True),
    "paged_ademamix_32bit": (optim.AdEMAMix, 32, True),
    "lion_8bit": (optim.Lion, 8, False),
    "lion_32bit": (optim.Lion, 32, False),
    "paged_lion_8bit": (optim.Lion, 8, True),
    "paged_lion_32bit": (optim.Lion, 32, True),
    "rmsprop_bnb": (optim.RMSprop, 32, False),
    "rmsprop_bnb_8bit": (optim.RMSprop, 8, False),
    "rmsprop_bnb_32bit": (optim.RMSprop, 32, False),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_overrides():
    optim.GlobalOptimManager.get_instance().initialize()
    yield
    optim.GlobalOptimManager.get_instance().initialize()


@pytest.fixture(scope="module")
def texts():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    texts = json.loads((MODEL / "heldout.json").read_text())
    ids = [i for text in texts[:8] for i in tokenizer(text)["input_ids"]]
    rows = [ids[start : start + 64] for start in range(0, 64 * 16, 64)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(texts, folder, device, lora=True, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=32, target_modules="all-linear", lora_dropout=0.0))
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": device == "cpu",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(**(arguments | options))
    return transformers.Trainer(model=model, args=arguments, train_dataset=texts)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def plain(optimizer):
    return getattr(optimizer, "optimizer", optimizer)


def test_the_stand_in_for_bitsandbytes_has_the_same_classes():
    import bitsandbytes.optim
    import bitsandbytes.optim.ademamix
    import bitsandbytes.optim.optimizer

    for name in set(optim.__all__) - {"MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit", "Options"}:
        assert getattr(bitsandbytes.optim, name) is getattr(optim, name)
        if name != "GlobalOptimManager":
            module = getattr(optim, name).__module__.rpartition(".")[2]
            assert getattr(getattr(bitsandbytes.optim, module), name) is getattr(optim, name)
    for name in ("MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit", "GlobalOptimManager"):
        assert getattr(bitsandbytes.optim.optimizer, name) is getattr(optim, name)
    assert bitsandbytes.optim.ademamix._ReferenceAdEMAMix is optim.ademamix._ReferenceAdEMAMix


ON_A_GPU = ("adamw_bnb_8bit", "paged_adamw_8bit", "paged_ademamix_32bit", "lion_8bit")


@pytest.mark.parametrize(
    ("name", "device"),
    [(name, "cpu") for name in NAMES] + [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ON_A_GPU],
)
def test_every_name_trains(name, texts, tmp_path, device):
    cls, bits, paged = NAMES[name]
    run = trainer(texts, tmp_path, device, optim=name, learning_rate=1e-4 if "lion" in name else 1e-3, max_steps=8)
    run.train()
    optimizer = plain(run.optimizer)
    assert type(optimizer) is cls
    assert optimizer.args.optim_bits == bits and optimizer.is_paged == paged
    large = [p for p in run.model.parameters() if p.requires_grad and p.numel() >= 4096]
    assert large
    assert {optimizer.state[p]["state1"].dtype for p in large} == {torch.uint8 if bits == 8 else torch.float32}
    assert all(state["step"] == 8 for state in optimizer.state.values())
    seen = losses(run)
    assert sum(seen[-4:]) < sum(seen[:4])


@pytest.mark.parametrize("device", DEVICES)
def test_embeddings_keep_32_bits_beside_8_bit_states(texts, tmp_path, device):
    """The Trainer asks for it where the text of the optimizer's class has bitsandbytes in it."""
    run = trainer(texts, tmp_path, device, lora=False, optim="adamw_bnb_8bit", max_steps=1)
    run.train()
    state = plain(run.optimizer).state
    assert state[run.model.get_input_embeddings().weight]["state1"].dtype == torch.float32
    assert state[run.model.model.layers[0].mlp.up_proj.weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["paged_adamw_8bit", "lion_8bit", "ademamix_8bit"])
def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_one(name, texts, tmp_path, device):
    options = {"optim": name, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = trainer(texts, tmp_path / "whole", device, **options)
    whole.train()
    resumed = trainer(texts, tmp_path / "whole", device, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    weights = dict(whole.model.named_parameters())
    for key, weight in resumed.model.named_parameters():
        assert torch.equal(weight, weights[key]), key
    for key, state in plain(whole.optimizer).state_dict()["state"].items():
        other = plain(resumed.optimizer).state_dict()["state"][key]
        assert state["step"] == other["step"] == 6
        for tensor, value in state["__bnb_optimizer_quant_state__"].items():
            assert torch.equal(value, other["__bnb_optimizer_quant_state__"][tensor]), (key, tensor)
