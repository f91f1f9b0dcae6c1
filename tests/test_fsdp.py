"""FSDP and tensor parallelism: processes that hold a piece of each 4-bit parameter do as one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch_distributed = pytest.importorskip("torch.distributed")

pytestmark = pytest.mark.skipif(not torch_distributed.is_gloo_available(), reason="needs gloo")

WORKER = Path(__file__).parent / "fsdp_worker.py"
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")],
    ),
]


def run(case, world, folder, device="cpu"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, WORKER, case]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), port, folder, device],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert output.count("passed") == len(case.split(",")), output


@pytest.mark.parametrize("device", DEVICES)
def test_two_processes(tmp_path, device):
    pytest.importorskip("peft")
    run("pieces,refused,experts,train,tensor_parallel,save,read,offloaded", 2, tmp_path, device)
    run("read", 1, tmp_path, device)  # the same checkpoint, by one


@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_of_fsdp1(tmp_path, device):
    run("fsdp1,fsdp1_refused", 2, tmp_path, device)


def test_three_processes(tmp_path):
    run("pieces,experts", 3, tmp_path)
