"""The scripts of the guides that people copy, as they are published but for ``import halfbyte``, each in a process.

They run on the transformers that is installed; ``HALFBYTE_TRANSFORMERS_PATHS`` (folders, with ``:`` between) names
others to run them on as well.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import halfbyte

pytest.importorskip("transformers")
pytest.importorskip("peft")

GUIDES = Path(__file__).parent / "guides"
MODEL = Path(__file__).parent / "models" / "pycode-llama-7m"
PACKAGE = Path(halfbyte.__file__).parents[1]
VERSIONS = ["", *filter(None, os.environ.get("HALFBYTE_TRANSFORMERS_PATHS", "").split(":"))]
NAMES = ["load_in_4bit", "load_in_8bit", "qlora", "custom_model", "accelerate_quantization"]
if importlib.util.find_spec("trl") is not None:
    NAMES.append("sft")


def run(name, version, folder):
    path = [str(PACKAGE), *([version] if version else []), os.environ.get("PYTHONPATH", "")]
    env = {key: value for key, value in os.environ.items() if not key.startswith("HALFBYTE_")}
    env |= {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folder.mkdir()
    command = [sys.executable, GUIDES / f"{name}.py", MODEL, folder]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder, env=env)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each script printed, as words and values; two run at a time, as most of the time they import."""
    root = tmp_path_factory.mktemp("guides")
    with ThreadPoolExecutor(2) as pool:
        runs = {
            (name, version): pool.submit(run, name, version, root / f"{name}-{number}")
            for number, version in enumerate(VERSIONS)
            for name in NAMES
        }
    found = {}
    for key, future in runs.items():
        done = future.result()
        lines = [line.partition(" ") for line in done.stdout.splitlines()]
        found[key] = done, {word: value for word, _, value in lines}
    return found


@pytest.fixture(params=VERSIONS, ids=lambda version: Path(version).name or "installed")
def printed(request, results):
    def of(name):
        if name not in NAMES:
            pytest.skip(f"{name} needs what is not there")
        done, words = results[name, request.param]
        assert done.returncode == 0, done.stderr
        return words

    return of


def test_loading_in_4_bits(printed):
    words = printed("load_in_4bit")
    assert float(words["footprint"]) < 0.5  # the embedding of this little model is a quarter of it
    assert "return" in ast.literal_eval(words["written"])
    assert words["reloaded"] == "True"
    assert int(words["dequantized"]) >= 1


def test_loading_in_8_bits(printed):
    words = printed("load_in_8bit")
    assert float(words["footprint"]) < 0.7
    assert "return" in ast.literal_eval(words["written"])
    assert words["reloaded"] == "True"


def test_accelerates_own_loader(printed):
    words = printed("accelerate_quantization")
    assert "return" in ast.literal_eval(words["written"])
    assert words["reloaded"] == "True"
    assert "return" in ast.literal_eval(words["in_4_bits"])


def test_qlora_with_trainer(printed):
    words = printed("qlora")
    first, last = map(float, words["losses"].split())
    assert last < 0.8 * first
    assert float(words["reloaded"]) == 0.0
    assert words["merged"] == "LlamaForCausalLM"


def test_supervised_fine_tuning_with_trl(printed):
    first, last = map(float, printed("sft")["losses"].split())
    assert last < 0.8 * first


def test_a_model_of_your_own(printed):
    words = printed("custom_model")
    assert 0 < float(words["error"]) < 0.2
    assert words["reloaded"] == "True"
