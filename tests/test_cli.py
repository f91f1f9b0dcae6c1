"""The command line, as a user runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import halfbyte
from halfbyte import cli
from halfbyte.cli import measure, selfcheck

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "models" / "pycode-llama-7m"


def command(*arguments, **environment):
    env = os.environ | {"PYTHONPATH": str(Path(halfbyte.__file__).parents[1])} | environment
    return subprocess.run(
        [sys.executable, "-m", "halfbyte", *map(str, arguments)], capture_output=True, text=True, env=env, timeout=500
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One demo on the CPU, on one text: its output and its figures."""
    file = tmp_path_factory.mktemp("demo") / "figures.json"
    done = command("demo", MODEL, "--device", "cpu", "--limit-texts", 1, "--max-new-tokens", 8, "--json", file)
    assert done.returncode == 0, done.stderr
    return done, json.loads(file.read_text())


def test_demo_measures_both_models(demo):
    _, figures = demo
    original, quantized = figures["original"], figures["quantized"]
    assert 1.0 < original["perplexity"] < quantized["perplexity"] < 1.1 * original["perplexity"]
    # 6.3 M of 7.3 M weights go from 16 bits to 4 and an eighth.
    assert 4.12 < quantized["bits_a_weight"] < 4.14
    assert original["bits_a_weight"] is None
    assert original["weight_bytes"] == pytest.approx(2 * 7_343_360, rel=0.01)
    assert quantized["weight_bytes"] < 0.4 * original["weight_bytes"]
    assert quantized["checkpoint_bytes"] < 0.4 * original["checkpoint_bytes"]
    for model in (original, quantized):
        assert model["prefill"] > model["decode"] > 0
        assert model["text"].strip()
    assert figures["reload"] == {"same_logits": True, "largest_difference": 0.0} | {
        "load_seconds": figures["reload"]["load_seconds"]
    }


def test_demo_prints_one_table_and_nothing_else_when_not_on_a_terminal(demo):
    done, figures = demo
    assert done.stderr == ""
    for expected in ("perplexity", "weights in memory", "prefill", "decode", "same logits", "continues the prompt"):
        assert expected in done.stdout
    assert f"{figures['quantized']['perplexity']:.4f}" in done.stdout


def test_demo_with_other_options():
    done = command(
        "demo", MODEL, "--device", "cpu", "--text", ROOT / "README.md", "--scheme", "fp4", "--no-double-quant",
        "--blocksize", 128, "--dtype", "fp32", "--prompt", "import ", "--max-new-tokens", 4, "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["quantized"]["bits_a_weight"] == pytest.approx(4 + 32 / 128)
    assert figures["quantized"]["scheme"] == "fp4, block 128"
    assert figures["reload"]["same_logits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "no heldout.json there"),
        (["."], "holds no model"),
        ([MODEL, "--text", "no/such.txt"], "there is no file no/such.txt"),
        ([MODEL, "--text", MODEL / "config.json"], "expected a list of texts"),
        ([MODEL, "--device", "abacus"], "there is no device 'abacus'"),
        ([MODEL, "--blocksize", "48"], "blocksize.*48"),
        ([MODEL, "--device", "meta"], "halfbyte runs on cpu and cuda, not on meta"),
        ([MODEL, "--device", "cuda:99"], "cuda:99|no CUDA GPU"),
        ([MODEL, "--limit-texts", "1", "--prompt", "", "--max-new-tokens", "1"], "the prompt has no tokens"),
    ],
)
def test_errors_of_the_demo_are_one_line(arguments, message, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["demo", *map(str, arguments)]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("halfbyte: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


def test_a_quantized_model_is_not_quantized_again(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((MODEL / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}})
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "heldout.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    assert cli.main(["demo", str(tmp_path), "--device", "cpu"]) == 1
    assert "is quantized already" in capsys.readouterr().err


def test_traceback_shows_the_traceback():
    with pytest.raises(halfbyte.errors.HalfbyteError):
        cli.main(["demo", "no/such/folder", "--traceback"])


def test_wrong_usage_is_exit_code_2(capsys):
    for arguments in (
        [],
        ["nonsense"],
        ["demo", str(MODEL), "--scheme", "q4"],
        ["demo", str(MODEL), "--limit-texts", "0"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    assert "usage: halfbyte" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('No module named rich')\n")
    environment = os.pathsep.join([str(tmp_path), str(Path(halfbyte.__file__).parents[1])])
    done = command("demo", MODEL, PYTHONPATH=environment)
    assert done.returncode == 1
    assert done.stderr == "halfbyte: No module named rich: the demo needs more packages, pip install 'halfbyte[demo]'\n"


def test_doctor():
    done = command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("torch", "transformers", "bitsandbytes", "CPU", "CUDA", "self-check", "cpu: matmul, one row"):
        assert expected in done.stdout
    assert "FAIL" not in done.stdout
    assert "\nOK" in done.stdout


def test_doctor_in_json():
    done = command("doctor", "--json", HALFBYTE_SIMD="scalar")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["halfbyte"] == halfbyte.__version__
    assert found["cpu"]["simd"] == "scalar"
    assert "scalar" in found["cpu"]["simd_levels"]
    assert {check["device"] for check in found["checks"]} >= {"cpu"}
    assert "devices" in found["cuda"] or found["cuda"]["unavailable"]


def test_doctor_says_when_something_is_wrong(monkeypatch, capsys):
    known = selfcheck._KNOWN_CODES | {"nf4": "00" * 32}
    monkeypatch.setattr(selfcheck, "_KNOWN_CODES", known)
    monkeypatch.setattr(halfbyte, "matmul_4bit", lambda x, packed, state: x.new_zeros(*x.shape[:-1], state.shape[0]))

    def broken(*_):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(halfbyte.functional, "dequantize_4bit", broken)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  cpu: quantize: nf4 gives" in out
    assert "FAIL  cpu: dequantize: RuntimeError: no such thing" in out
    assert "checks failed" in out


def test_windows_cover_the_text_and_overlap_by_the_token_they_predict_from():
    class Tokenizer:
        bos_token_id = 7

        def __call__(self, text, verbose):
            return {"input_ids": list(range(100, 100 + int(text)))}

    found = measure.windows(Tokenizer(), ["2100", "20"], 1024)
    assert [window.shape[1] for window in found] == [1025, 1025, 53]
    assert found[0][0, :2].tolist() == [7, 100]
    assert found[1][0, 0] == found[0][0, -1]
    with pytest.raises(halfbyte.errors.HalfbyteError, match="too short"):
        measure.windows(Tokenizer(), ["20"], 1024)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary():
    import torch

    class Uniform:
        device = torch.device("cpu")

        def __call__(self, input_ids, use_cache):
            class Output:
                logits = torch.zeros(*input_ids.shape, 50, dtype=torch.bfloat16)

            return Output

    tokens = [torch.randint(0, 50, (1, 41)), torch.randint(0, 50, (1, 101))]
    assert measure.perplexity(Uniform(), tokens) == pytest.approx(50.0, rel=1e-5)
