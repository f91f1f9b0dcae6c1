"""README says what is true: every Python snippet in it runs, and its Rust snippet is an example that is compiled."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_runs import PYTHON

import halfbyte

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


# A snippet for GPUs alone has this line before it.
NEEDS_GPU = "<!-- needs a GPU -->"
# And one for an environment with vLLM this one.
NEEDS_VLLM = "<!-- needs vLLM -->"


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def python_snippets():
    needs = f"{NEEDS_GPU}|{NEEDS_VLLM}"
    found = re.findall(rf"^(?:({needs})\n+)?```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == len(snippets("python"))
    marks = {
        "": [],
        NEEDS_GPU: [pytest.mark.gpu],
        NEEDS_VLLM: [pytest.mark.timeout(900)],
    }
    return [
        pytest.param(need == NEEDS_VLLM, snippet, id=str(number), marks=marks[need])
        for number, (need, snippet) in enumerate(found)
    ]


def test_there_are_snippets():
    assert len(snippets("python")) >= 8
    assert len(snippets("rust")) == 1


@pytest.mark.parametrize(("in_vllm", "snippet"), python_snippets())
def test_python_snippets_run(in_vllm, snippet, request):
    if in_vllm:
        request.getfixturevalue("vllm")
    env = {name: value for name, value in os.environ.items() if not name.startswith("HALFBYTE_")}
    env["PYTHONPATH"] = str(Path(halfbyte.__file__).parents[1])
    with socket.socket() as free:  # what torchrun sets for one process
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [PYTHON if in_vllm else sys.executable, "-W", "error::UserWarning:halfbyte", "-c", snippet],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=600 if in_vllm else 300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_rust_snippet_is_the_example():
    assert snippets("rust") == [(ROOT / "rust/halfbyte/examples/quickstart.rs").read_text(encoding="utf-8")]


def test_the_quick_start_is_two_commands_on_files_that_are_there():
    commands = [line for block in snippets("sh") for line in block.splitlines()]
    assert commands[:2] == [
        "pip install '.[demo]' && halfbyte demo tests/models/pycode-llama-7m",
        "pip install '.[test]' && pytest",
    ]
    assert (ROOT / "tests/models/pycode-llama-7m/heldout.json").is_file()


def test_commands_on_checkpoints_run(tmp_path):
    commands = [line for block in snippets("sh") for line in block.splitlines()][2:]
    assert [command.split()[1] for command in commands] == ["quantize", "inspect", "dequantize"]
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    env = {**os.environ, "PYTHONPATH": str(Path(halfbyte.__file__).parents[1])}
    for command in commands:
        arguments = [sys.executable, "-m", "halfbyte", *command.split()[1:]]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() and not done.stderr
    assert (tmp_path / "float/config.json").is_file()


def test_what_the_readme_names_exists():
    for name in set(re.findall(r"`((?:[A-Z]\w*)Error)`", README)) - {"ValueError", "RuntimeError", "OSError"}:
        assert issubclass(getattr(halfbyte.errors, name), halfbyte.errors.HalfbyteError), name
    for name in re.findall(r"`(halfbyte\.[\w.]+)`", README):
        found = halfbyte
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"`make ([\w\- ]+)`", README):
        for target in command.split():
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
