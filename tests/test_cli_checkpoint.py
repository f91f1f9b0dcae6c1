"""``halfbyte quantize``, ``dequantize`` and ``inspect``: what they write, say and survive."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import MODEL, assert_same, bytes_of, raw, tensors_of, write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import halfbyte as hb
from halfbyte import _native, functional
from halfbyte.cli import main
from halfbyte.cli.checkpoint.options import size
from halfbyte.errors import HalfbyteError

DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def run(*arguments):
    return main([str(argument) for argument in arguments])


def expected(weight, name, **options):
    """The entries of a weight that the functions in Python quantize."""
    packed, state = functional.quantize_4bit(weight, **options)
    return {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def quantized_like(source, device="cpu", **options):
    """What `source` is when every linear layer's weight is quantized in Python."""
    entries = {}
    for name, tensor in tensors_of(source).items():
        if "_proj" in name:
            found = expected(tensor.to(device), name, **options)
            entries |= {key: value.cpu() for key, value in found.items()}
        else:
            entries[name] = tensor
    return entries


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("scheme", "storage", "blocksize"), [("nf4", "uint8", 64), ("fp4", "bf16", 128), ("nf4", "fp32", 32)]
)
def test_the_bytes_are_those_of_quantizing_in_python(tmp_path, scheme, storage, blocksize, double, search):
    options = ["--double-quant"] * double + ["--scale-search"] * search
    arguments = ["--scheme", scheme, "--storage", storage, "--blocksize", blocksize, "--shard-size", "2MB", *options]
    assert run("quantize", MODEL, tmp_path / "out", *arguments) == 0
    python = quantized_like(
        MODEL,
        quant_type=scheme,
        compress_statistics=double,
        blocksize=blocksize,
        quant_storage=DTYPES[storage],
        scale_search=search,
    )
    found = tensors_of(tmp_path / "out")
    assert_same(found, python)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in found.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)


@pytest.mark.gpu
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("scheme", "storage", "double"), [("nf4", "uint8", True), ("fp4", "bf16", False)])
def test_on_a_gpu_the_bytes_are_those_of_quantizing_there(tmp_path, scheme, storage, double, search):
    options = ["--double-quant"] * double + ["--scale-search"] * search
    assert (
        run("quantize", MODEL, tmp_path / "out", "--device", "cuda", "--scheme", scheme, "--storage", storage, *options)
        == 0
    )
    python = quantized_like(
        MODEL,
        "cuda",
        quant_type=scheme,
        compress_statistics=double,
        quant_storage=DTYPES[storage],
        scale_search=search,
    )
    assert_same(tensors_of(tmp_path / "out"), python)


@pytest.mark.gpu
def test_on_a_gpu_int8_rows_are_those_of_quantizing_there(tmp_path):
    assert run("quantize", MODEL, tmp_path / "out", "--device", "cuda", "--scheme", "int8") == 0
    found = tensors_of(tmp_path / "out")
    for name, tensor in tensors_of(MODEL).items():
        if "_proj" in name:
            codes, scales, _ = functional.int8_vectorwise_quant(tensor.cuda().half())
            assert torch.equal(found[name], codes.cpu()) and found[name].dtype == torch.int8, name
            assert torch.equal(found[name.replace(".weight", ".SCB")], scales.cpu()), name


def test_a_folder_is_complete_and_says_what_it_is(tmp_path, capsys):
    assert (
        run("quantize", MODEL, tmp_path / "out", "--double-quant", "--skip", "layers.0", "--skip", r".*\.7\..*k_proj")
        == 0
    )
    said = capsys.readouterr()
    assert "48 weights to nf4" in said.out
    assert "8 skipped" in said.out and "1 embedding" in said.out
    assert not said.err  # no bar where there is no terminal
    config = json.loads((tmp_path / "out/config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((MODEL / "config.json").read_text())
    assert quantization["load_in_4bit"] and quantization["quant_method"] == "bitsandbytes"
    assert quantization["bnb_4bit_compute_dtype"] == "bfloat16"
    skipped = quantization["llm_int8_skip_modules"]
    assert len(skipped) == 9 and {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.7.self_attn.k_proj"} < set(
        skipped
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (MODEL / name).read_bytes()
    assert not (tmp_path / "out/.halfbyte").exists()


def test_inspect_counts_every_bit(tmp_path, capsys):
    run("quantize", MODEL, tmp_path / "out", "--double-quant", "--quiet")
    assert capsys.readouterr().out == ""
    assert run("inspect", tmp_path / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    by_name = {weight["name"]: weight for weight in report["weights"]}
    weight = by_name["model.layers.0.mlp.down_proj.weight"]
    assert (weight["scheme"], weight["blocksize"], weight["double_quant"], weight["shape"]) == (
        "nf4",
        64,
        True,
        [256, 768],
    )
    found = tensors_of(tmp_path / "out")
    parts = [t for name, t in found.items() if name.startswith("model.layers.0.mlp.down_proj.weight")]
    assert weight["bytes"] == sum(t.numel() * t.itemsize for t in parts)
    assert weight["bits"] == 8 * weight["bytes"] / (256 * 768)
    assert by_name["model.embed_tokens.weight"]["scheme"] == "bfloat16"
    assert report["total"]["bytes"] == sum(t.numel() * t.itemsize for t in found.values())
    assert report["total"]["quantized_elements"] == 8 * (3 * 256 * 768 + 2 * 256 * 256 + 2 * 128 * 256)

    assert run("inspect", tmp_path / "out/model.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(by_name) + 2
    assert lines[0].split() == ["name", "scheme", "shape", "of", "block", "bits", "bytes"]
    assert any(line.startswith("model.layers.0.mlp.down_proj.weight") and "nf4 dq" in line for line in lines)


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_dequantize_decodes(tmp_path, scheme, dtype):
    run("quantize", MODEL, tmp_path / "q", "--scheme", scheme, "--quiet")
    assert run("dequantize", tmp_path / "q", tmp_path / "out", *(["--dtype", dtype] if dtype else []), "--quiet") == 0
    target = DTYPES[dtype or "bf16"]
    packed, found = tensors_of(tmp_path / "q"), tensors_of(tmp_path / "out")
    for name, tensor in tensors_of(MODEL).items():
        if "_proj" not in name:
            expected = tensor.to(target)
        elif scheme == "int8":
            scales = packed[name.replace(".weight", ".SCB")][:, None]
            expected = (packed[name].float() * scales * (1 / 127)).to(target)
        else:
            entries = {key: value for key, value in packed.items() if key.startswith(f"{name}.")}
            state = hb.functional.QuantState.from_dict(entries, "cpu")
            expected = functional.dequantize_4bit(packed[name], state, out=torch.empty(tensor.shape, dtype=target))
        assert torch.equal(found[name], expected), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == str(target).removeprefix("torch.")


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/x").write_text("mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:-1])
    run("quantize", MODEL, tmp_path / "q", "--quiet")
    for arguments, says in [
        (["quantize", MODEL, tmp_path / "used"], "something in it already"),
        (["quantize", MODEL, MODEL, "--overwrite"], "where the checkpoint is read from"),
        (["quantize", tmp_path / "none", tmp_path / "x"], "cannot read"),
        (["quantize", tmp_path / "bad", tmp_path / "x"], "bytes of data"),
        (["quantize", tmp_path / "q", tmp_path / "x"], "not quantized"),
        (["quantize", MODEL, tmp_path / "x", "--blocksize", "63"], "blocksize"),
        (["quantize", MODEL, tmp_path / "x", "--skip", "("], "regular expression"),
        (["quantize", MODEL, tmp_path / "x", "--scheme", "int8", "--double-quant"], "--double-quant"),
        (["quantize", MODEL, tmp_path / "x", "--device", "tpu"], "--device"),
        (["dequantize", MODEL, tmp_path / "x"], "that bitsandbytes quantized"),
        (["inspect", tmp_path / "used"], "neither"),
    ]:
        assert run(*arguments) == 1, arguments
        said = capsys.readouterr()
        assert said.err.startswith("halfbyte: ") and says in said.err and said.err.count("\n") == 1, said.err
    assert not (tmp_path / "x").exists()
    assert bytes_of(tmp_path / "used") == {"x": b"mine"}
    with pytest.raises(hb.errors.FileError) as error:
        _native.inspect_checkpoint(tmp_path / "none")
    assert isinstance(error.value, HalfbyteError | OSError)
    with pytest.raises(SystemExit) as usage:
        run("quantize", MODEL, tmp_path / "x", "--resume", "--overwrite")
    assert usage.value.code == 2


def test_an_error_of_the_caller_comes_back(tmp_path):
    def fails(_):
        raise RuntimeError("mine")

    def job(skip=lambda _: False):
        return _native.Conversion.quantize(
            MODEL,
            tmp_path / "x",
            "nf4",
            double_quant=True,
            blocksize=64,
            scale_search=False,
            storage="uint8",
            dtype=None,
            compute_dtype=None,
            skip=skip,
            stacked_experts=False,
            shard_size=10**9,
            existing="overwrite",
            device="cpu",
        )

    with pytest.raises(RuntimeError, match="mine"):
        job(fails)
    conversion = job()
    with pytest.raises(RuntimeError, match="mine"):
        while conversion.next() is not None:
            conversion.convert(fails)


@pytest.mark.parametrize(("text", "bytes_"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("100", 100), ("2kb", 2000)])
def test_sizes(text, bytes_):
    assert size(text) == bytes_


@given(st.text(max_size=12))
def test_other_sizes_are_wrong_usage(text):
    try:
        assert size(text) >= 1
    except Exception as error:
        assert type(error).__name__ == "ArgumentTypeError", text


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 2**64 - 1) | st.integers(0, 60), st.text(max_size=40))
def test_random_files_are_checkpoint_errors(tmp_path_factory, data, length, text):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "a.safetensors").write_bytes(length.to_bytes(8, "little") + data)
    (folder / "model.safetensors.index.json").write_text(text, errors="replace")
    for path in (folder, folder / "a.safetensors"):
        with pytest.raises(hb.errors.CheckpointError):
            _native.inspect_checkpoint(path)


def test_experts_are_said_to_be_what_they_are(tmp_path, capsys):
    tensors = {
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.randn(64, 64),
        "model.layers.0.mlp.experts.1.up_proj.weight": torch.randn(64, 64),
        "model.layers.0.mlp.gate.weight": torch.randn(2, 64),
        "model.layers.1.mlp.experts.gate_up_proj": torch.randn(2, 64, 64),
    }
    (tmp_path / "src").mkdir()
    save_file(tensors, tmp_path / "src/model.safetensors")
    assert run("quantize", tmp_path / "src", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "1 stacks of experts stay whole" in said and "2 of the weights are experts" in said
    assert run("quantize", tmp_path / "src", tmp_path / "all", "--stacked-experts", "--quiet") == 0
    stack = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    found = tensors_of(tmp_path / "all")
    python = expected(stack, "model.layers.1.mlp.experts.gate_up_proj", quant_type="nf4")
    assert_same({key: value for key, value in found.items() if "gate_up" in key}, python)
    assert torch.equal(raw(found["model.layers.0.mlp.gate.weight"]), raw(tensors["model.layers.0.mlp.gate.weight"]))


def command(*arguments, code="import sys; from halfbyte.cli import main; sys.exit(main(sys.argv[1:]))"):
    environment = {**os.environ, "PYTHONPATH": str(Path(hb.__file__).parents[1]), "OMP_NUM_THREADS": "2"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, stdout=subprocess.PIPE)


@pytest.mark.slow
def test_killed_at_random_points_and_resumed_the_bytes_are_the_same(tmp_path):
    write_llama(tmp_path / "src", layers=40, width=256)
    options = ["--double-quant", "--shard-size", "300KB"]
    assert command("quantize", tmp_path / "src", tmp_path / "whole", *options).wait() == 0
    whole = bytes_of(tmp_path / "whole")
    shards = sum(name.endswith(".safetensors") for name in whole)
    assert shards >= 40
    killed, out = 0, tmp_path / "out"
    for _ in range(30):
        before = len(list(out.glob("*.safetensors"))) if out.exists() else 0
        goal, wait = before + random.randint(0, shards // 3), random.random() * 0.02
        process = command("quantize", tmp_path / "src", out, *options, "--resume")
        while process.poll() is None:
            if out.exists() and len(list(out.glob("*.safetensors"))) >= max(goal, 1):
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005)
        if process.wait() == 0:
            if killed:
                break
            shutil.rmtree(out)  # it was through before it was hit: once more
            continue
        assert process.returncode == -signal.SIGKILL
        killed += 1
        for name, data in bytes_of(out).items():
            assert name.startswith(".halfbyte") or data == whole[name], name
        if not (out / ".halfbyte").exists() and bytes_of(out) == whole:
            break  # it was hit when there was nothing left to do, and so nothing to resume
    assert killed >= 1
    if (out / ".halfbyte").exists():
        assert command("quantize", tmp_path / "src", out, *options, "--resume").wait() == 0
    assert bytes_of(out) == whole


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own account of a process's memory")
def test_memory_stays_below_three_of_the_largest_tensor(tmp_path):
    largest = write_llama(tmp_path / "src", layers=1, width=5120)  # 210 MB the largest: torch alone may be 500
    # Not what wait() says of a child: that counts the memory of this process, which it was forked from.
    code = (
        "import re, sys; from halfbyte.cli import main; assert main(sys.argv[1:]) == 0;"
        "print('peak', re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    for i, (name, source, options) in enumerate(
        [("quantize", "src", ["--double-quant"]), ("quantize", "src", ["--scale-search"]), ("dequantize", "0", [])]
    ):
        process = command(name, tmp_path / source, tmp_path / str(i), *options, code=code)
        output, _ = process.communicate()
        assert process.returncode == 0
        peak = int(output.split()[-1]) * 1024
        assert peak < 3 * largest + 300e6, (name, options, peak)
