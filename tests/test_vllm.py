"""halfbyte in a real vLLM, in an environment of its own: the plugin, its loaders, the server.

Needs ``HALFBYTE_VLLM_PYTHON``, the interpreter of an environment where vLLM (for the CPU will do) and halfbyte are
installed; ``.ci/vllm`` makes one. Everything is computed in fp32, where vLLM's and transformers' models agree to the
last token.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from vllm_runs import MODEL, PYTHON, case, run

pytestmark = [pytest.mark.usefixtures("vllm"), pytest.mark.timeout(900)]
transformers = pytest.importorskip("transformers")

TOKENS = 16

SCHEMES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


# LLM.int8() finds outlier columns over all tokens of a call, so what else is in a batch matters to the last digits.
ALONE = {"int8": {"max_num_seqs": 1}}


def check(name: str, got: list[list[int]], expected: list[list[int]]) -> None:
    """Every prompt goes on in the same way; with int8, a last digit can flip the rounding of an activation."""
    different = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
    assert len(different) <= (2 if name == "int8" else 0), (name, different, got, expected)


def texts(answer: dict) -> list[list[int]]:
    assert "error" not in answer, answer["error"] + "\n" + answer["log"][-3000:]
    return answer["texts"]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Twenty, of 8 to 46 tokens of held-out text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    held_out = json.loads((MODEL / "heldout.json").read_text(encoding="utf-8"))
    found = [tokenizer(text)["input_ids"] for text in held_out]
    return [found[i % len(found)][16 * i : 16 * i + 8 + 2 * i] for i in range(20)]


def continued(model, prompts: list[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    """What transformers generates, greedily."""
    out = []
    torch.set_num_threads(1)  # as in run()
    for ids in prompts:
        with torch.inference_mode():
            whole = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        out.append(whole[0, len(ids) :].tolist())
    return out


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, prompts):
    """Folders of quantized checkpoints by scheme, and what transformers makes of the prompts with them."""
    made = {}
    for name, options in SCHEMES.items():
        config = transformers.BitsAndBytesConfig(**options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            MODEL, quantization_config=config, dtype=torch.float32
        ).eval()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
        made[name] = (folder, continued(model, prompts))
    return made


def test_prequantized_checkpoints(checkpoints, prompts):
    """Recognized from config.json alone; the tokens are those of transformers."""
    answers = run(*(case(folder, prompts, **ALONE.get(name, {})) for name, (folder, _) in checkpoints.items()))
    for (name, (_, expected)), answer in zip(checkpoints.items(), answers, strict=True):
        check(name, texts(answer), expected)
        kinds = {kind for kind, *_ in answer["layers"].values()}
        assert kinds == {"HalfbyteLinearMethod"}, name
        assert set(answer["gates"]) == {"silu"}
        assert len(answer["gates"]) == sum("down_proj" in name for name in answer["layers"])
        _, dtype, codes, _ = answer["layers"]["model.layers.0.self_attn.qkv_proj.weight"]
        assert (dtype, codes) == (("torch.int8", [512, 256]) if name == "int8" else ("torch.uint8", [512, 128]))


def test_quantized_while_loading(checkpoints, prompts):
    """The same tokens from the full-precision checkpoint, by a method's name, by overrides and by the old flags."""
    ways = {
        "nf4": {"quantization": "halfbyte"},
        "fp4": {"quantization": "halfbyte_fp4"},
        "int8": {"quantization": "halfbyte_int8"},
        "nf4_dq": {"quantization": "bitsandbytes", "load_format": "bitsandbytes"},
    }
    overridden = {"quant_method": "halfbyte", "scheme": "nf4", "double_quant": True, "skip": ["down_proj"]}
    cases = [case(MODEL, prompts, **way, **ALONE.get(name, {})) for name, way in ways.items()]
    cases.append(case(MODEL, prompts, hf_overrides={"quantization_config": overridden}))
    *answers, partly = run(*cases)
    for name, answer in zip(ways, answers, strict=True):
        check(name, texts(answer), checkpoints[name][1])
    assert texts(partly)
    assert not any("down_proj" in name for name in partly["layers"])
    assert any("gate_up_proj" in name for name in partly["layers"])


def test_dummy_weights(prompts):
    """A benchmark's made-up weights are quantized like any."""
    (answer,) = run(case(MODEL, prompts[:2], quantization="halfbyte_int8", load_format="dummy"))
    assert all(len(text) == TOKENS for text in texts(answer))
    assert answer["layers"]


def test_tensor_parallel(checkpoints, prompts):
    """Two ranks give the tokens of one, from packed weights cut at blocks and from those quantized whole."""
    few = prompts[:6]
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    cut, whole = run(
        case(checkpoints["nf4_dq"][0], few, **two),
        case(MODEL, few, quantization="bitsandbytes", **two),
        processes=True,
        VLLM_CPU_OMP_THREADS_BIND="0|1" if (os.cpu_count() or 1) > 1 else "0|0",
    )
    assert texts(cut) == checkpoints["nf4_dq"][1][:6]
    assert texts(whole) == checkpoints["nf4_dq"][1][:6]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A mixture of four experts with random weights, as a checkpoint of full precision."""
    torch.manual_seed(3)
    config = transformers.MixtralConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    model = transformers.MixtralForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so that tokens differ by more than rounding
    folder = tmp_path_factory.mktemp("mixture")
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_mixtures(mixture, prompts, tmp_path, scheme):
    """Experts in both layouts of checkpoints, and quantized while loading; int8 has one layout."""
    few = prompts[:6]
    folders = {"one by one": tmp_path / "single"}
    command = [PYTHON, "-m", "halfbyte", "quantize", str(mixture), str(folders["one by one"]), "--scheme", scheme]
    subprocess.run(command, check=True, capture_output=True)
    if scheme == "nf4":
        import halfbyte as hb

        model = transformers.AutoModelForCausalLM.from_pretrained(
            mixture, quantization_config=hb.HalfbyteConfig("nf4", double_quant=False), dtype=torch.float32
        )
        expected = continued(model, few)
        folders["stacked"] = tmp_path / "stacked"
        model.save_pretrained(folders["stacked"])
    for file in mixture.glob("tokenizer*"):
        for folder in folders.values():
            (folder / file.name).write_bytes(file.read_bytes())
    cases = [case(folder, few) for folder in folders.values()]
    cases.append(case(mixture, few, quantization=f"halfbyte_{scheme}"))
    answers = run(*cases)
    if scheme == "int8":  # transformers leaves stacked experts in full precision there
        expected = texts(answers[-1])
    for name, answer in zip([*folders, "while loading"], answers, strict=True):
        assert texts(answer) == expected, name
        kinds = {kind for kind, *_ in answer["layers"].values()}
        assert kinds == {"HalfbyteLinearMethod", "HalfbyteMoEMethod"}, name


def test_adapter(checkpoints, prompts, tmp_path):
    """LoRA on top gives what peft gives on the same weights."""
    peft = pytest.importorskip("peft")
    folder, _ = checkpoints["nf4"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path)
    few = prompts[:6]
    expected = continued(model, few)
    lora = {"enable_lora": True, "max_lora_rank": 8}
    (answer,) = run({**case(folder, few, **lora), "lora": str(tmp_path)})
    assert texts(answer) == expected
    assert expected != checkpoints["nf4"][1][:6]


CHAINS = """
from torch import nn
from halfbyte.integrations.vllm.gated import _gated, _only_chains

class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.act_fn, self.down_proj = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x):
        x, _ = self.gate_up_proj(x)
        x = self.act_fn(x)
        x, _ = self.down_proj(x)
        return x

class Scaled(Chain):
    def forward(self, x):
        return 2 * super().forward(x)

class Limited(Chain):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0].clamp(max=7)))[0]

class Twice(Chain):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.act_fn(self.gate_up_proj(x)[0])))[0]

class Residual(Chain):
    def forward(self, x):
        return super().forward(x), x

class Elsewhere(Chain):
    def forward(self, x):
        super().forward(x)
        return x

assert [_only_chains(kind()) for kind in (Chain, Scaled, Limited, Twice, Residual, Elsewhere)] == [True] + [False] * 5
wrapped = Chain()
wrapped.down_proj.forward = wrapper = lambda x: x
assert _only_chains(wrapped) and wrapped.down_proj.forward is wrapper
assert "forward" not in wrapped.act_fn.__dict__
assert issubclass(_gated(Chain), Chain) and _gated(Chain) is _gated(Chain) and _gated(Chain).__name__ == "Chain"
"""


def test_what_is_only_a_chain():
    """A layer that does anything besides is not one whose activation the product may do."""
    done = subprocess.run([PYTHON, "-c", CHAINS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


REGISTRATION = """
import importlib.metadata, sys
from vllm.model_executor.layers import quantization as q
from vllm.model_executor import model_loader
(entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "halfbyte"]
entry.load()()
loaders = dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
entry.load()()
assert loaders == model_loader._LOAD_FORMAT_TO_MODEL_LOADER
assert issubclass(loaders["auto"], model_loader.DefaultModelLoader)
names = [n for n in q.QUANTIZATION_METHODS if "halfbyte" in n or n == "bitsandbytes"]
assert len(names) == len(set(names))
print(sorted(names), "bitsandbytes" in loaders)

from halfbyte.integrations.vllm.config import *
four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ours = {"quant_method": "halfbyte", "scheme": "fp4", "blocksize": 128}
print([[c.override_quantization_method(config, user) for user in (None, "halfbyte", "halfbyte_int8", "bitsandbytes")]
       for c in (HalfbyteConfig, HalfbyteInt8, BitsAndBytesConfig) for config in (four, ours, {"quant_method": "awq"})])
assert HalfbyteConfig.from_config(ours).form == Format("fp4", 128)
assert HalfbyteInt8().form.is_int8 and HalfbyteFP4().form.scheme == "fp4" and BitsAndBytesConfig().double_quant
assert HalfbyteConfig.from_config_dict_json('{"scheme": "int8", "threshold": 4}').threshold == 4.0
config = HalfbyteConfig(skip=["lm_head", "layers.1.mlp", "q_proj"])
config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
skipped = ["model.layers.1.mlp.gate_up_proj", "model.layers.0.self_attn.qkv_proj", "lm_head"]
assert all(map(config.skips, skipped))
assert not any(map(config.skips, ["model.layers.0.mlp.gate_up_proj", "model.layers.11.mlp.down_proj", "x.o_proj"]))
"""


@pytest.mark.parametrize("taken", ["", "1", "0"], ids=["alone", "taken over", "beside its plugin"])
def test_registration(taken, tmp_path):
    """Idempotent; ``bitsandbytes`` is left to whoever has it, unless the user says otherwise."""
    env = dict(os.environ)
    if taken:
        (tmp_path / "vllm_bnb_plugin").mkdir()
        (tmp_path / "vllm_bnb_plugin" / "__init__.py").touch()
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), env.get("PYTHONPATH")]))
        env["HALFBYTE_VLLM"] = taken
    done = subprocess.run([PYTHON, "-c", REGISTRATION], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names, overrides = [line for line in done.stdout.splitlines() if line.startswith("[")]
    own = ["halfbyte", "halfbyte_fp4", "halfbyte_int8", "halfbyte_nf4"]
    assert names == (f"{own} False" if taken == "0" else f"{['bitsandbytes', *own]} True")
    claims = "halfbyte" if taken == "1" else None
    assert json.loads(overrides.replace("None", "null").replace("'", '"')) == [
        [claims, "halfbyte", claims, claims],  # halfbyte, of bitsandbytes' checkpoint
        ["halfbyte", "halfbyte", None, None],
        [None] * 4,
        [None, None, "halfbyte_int8", None],  # halfbyte_int8, of the same
        [None, None, "halfbyte_int8", None],
        [None] * 4,
        [None] * 4,  # bitsandbytes: nothing to override
        [None, None, None, "bitsandbytes"],
        [None] * 4,
    ]


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [line for line in README.splitlines() if line.startswith("vllm serve ")])
def test_server(command, tmp_path):
    """``vllm serve`` as README has it answers a completion and a chat of the official client."""
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}", encoding="utf-8")
    arguments = [str(MODEL), *command.split()[3:], "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "256", "--served-model-name", "pycode", "--chat-template", str(template)]
    asked = {"serve": arguments, "model": "pycode", "prompt": "def add(a, b):\n", "tokens": 12, "patience": 600}
    (answer,) = run(asked, processes=True)
    assert "error" not in answer, answer["error"] + answer["log"][-3000:]
    assert answer["completion"].strip()
    assert answer["chat"] == answer["completion"]
