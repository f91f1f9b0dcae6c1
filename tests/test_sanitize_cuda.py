"""The program for compute-sanitizer: what it takes, what it says, and that it knows every family of kernels."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import sanitize_cuda
import torch

ROOT = Path(__file__).parents[1]


def test_it_refuses_parts_that_there_are_not(capsys):
    with pytest.raises(SystemExit) as stop:
        sanitize_cuda.main(["four_bit", "five_bit"])
    assert stop.value.code == 2
    assert "expected one of four_bit, experts, int8, optim, got 'five_bit'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert sanitize_cuda.main([]) == 2
    assert capsys.readouterr().err == "no CUDA device\n"


def test_every_family_of_images_is_of_a_part():
    manifest = tomllib.loads((ROOT / "cuda/ptx/manifest.toml").read_text(encoding="utf-8"))
    families = {image["family"] for image in manifest["image"]}
    parts = {family: sanitize_cuda.part_of(family) for family in families}
    assert set(parts.values()) == set(sanitize_cuda.PARTS)
    assert parts["four_bit_wgmma_bf16_m32"] == parts["eight_bit"] == "four_bit"
    assert parts["four_bit_experts"] == "experts"
    assert parts["int8_rows"] == "int8"
    assert parts["optim_group"] == "optim"


@pytest.mark.gpu
def test_it_runs(capsys):
    """As a program without the sanitizer, which a GPU's driver may not allow."""
    command = [sys.executable, ROOT / "tests/sanitize_cuda.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == list(sanitize_cuda.PARTS)
    if torch.cuda.get_device_capability() == (9, 0):
        # Beside those for Hopper there is nothing but what they take the place of.
        left = {line.strip() for line in lines[5:]}
        assert all(kernel.startswith(("four_bit_mma_", "none")) for kernel in left), left
