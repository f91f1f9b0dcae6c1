"""How tests share a GPU, without one: those marked `alone` run by themselves, and failures are written down at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import halfbyte

TESTS = Path(__file__).parent

# A device that is there for the fixtures of conftest.py, and one test of which breaks it.
FAKE = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.empty_cache = lambda: None
torch.cuda.memory_reserved = lambda: 0
broken = []
def synchronize():
    if broken:
        raise RuntimeError("an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
from real_conftest import _gpu, pytest_runtest_logreport
"""

SUITE = """
import json, time
import conftest, pytest
pytestmark = pytest.mark.gpu

def stay(name, seconds=0.15):
    start = time.time()
    time.sleep(seconds)
    with open("times", "a") as file:
        print(json.dumps([name, start, time.time()]), file=file)

def test_wrong():
    assert 1 == 2, "one is not\\ntwo"

@pytest.mark.parametrize("i", range(6))
def test_together(i):
    stay("together")

@pytest.mark.alone
@pytest.mark.parametrize("i", range(2))
def test_alone(i):
    stay("alone")

def test_fault():
    conftest.broken.append(1)

@pytest.mark.parametrize("i", range(4))
def test_after(i):
    stay("after")
"""


def run(folder, *arguments):
    shutil.copy(TESTS / "conftest.py", folder / "real_conftest.py")
    (folder / "conftest.py").write_text(FAKE, encoding="utf-8")
    (folder / "test_suite.py").write_text(SUITE, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n    alone: x\n", encoding="utf-8")
    # TESTS for what conftest.py imports.
    path = os.pathsep.join(map(str, (folder, TESTS, Path(halfbyte.__file__).parents[1])))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"PYTHONPATH": path, "HALFBYTE_TEST_FAILURES": str(folder / "failures"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500, check=False)
    lines = (folder / "failures").read_text(encoding="utf-8").splitlines()
    times = [json.loads(line) for line in (folder / "times").read_text(encoding="utf-8").splitlines()]
    return done, lines, times


def test_failures_are_lines_of_a_file_and_a_fault_of_the_device_is_no_failure_of_later_tests(tmp_path):
    done, failures, times = run(tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    (line,) = failures
    assert line.startswith("test_suite.py::test_wrong: AssertionError: one is not two")
    assert "the device is of no use any more after test_suite.py::test_fault" in done.stdout
    assert "1 failed, 9 passed" in done.stdout
    assert len(times) == 8


def test_nobody_runs_beside_those_that_need_it_alone_and_a_fault_costs_one_process(tmp_path):
    pytest.importorskip("xdist")
    done, failures, times = run(tmp_path, "-n", "2")
    # The test of the fault itself has passed when its process ends.
    assert "2 failed, 13 passed" in done.stdout, done.stdout + done.stderr
    assert sorted(line.split(":")[2].split(" ")[0] for line in failures) == ["test_fault", "test_wrong"]
    assert any("crashed" in line for line in failures)
    alone = [(start, end) for name, start, end in times if name == "alone"]
    assert (len(times), len(alone)) == (12, 2)
    for start, end in alone:
        others = [(a, b) for _, a, b in times if (a, b) != (start, end)]
        assert not any(a < end and start < b for a, b in others)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_script_says_that_there_is_no_gpu(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "FAILURES": str(tmp_path / "failures")}
    done = subprocess.run([TESTS / "run_gpu.sh"], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "no CUDA device for torch" in done.stderr
    assert not (tmp_path / "failures").exists()
