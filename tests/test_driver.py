"""The host's part of CUDA steps, without a GPU: on a driver that runs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch

from halfbyte import _native

SOURCE = emulation.EMULATION / "driver.cpp"

pytestmark = [
    pytest.mark.skipif(emulation.why_not() is not None, reason=str(emulation.why_not())),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the driver is found by Linux' loader"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real driver, and the GPU's tests"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = [emulation.COMPILER, emulation.STANDARD, "-shared", "-fPIC", "-O1", "-o", library, SOURCE]
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize("case", ["tiles", "managed", "paged", "kept", "asked", "short"])
def test_steps_on_cuda(driver, case):
    packages = [str(Path(_native.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join([str(driver.parent), os.environ.get("LD_LIBRARY_PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, packages)),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("driver_cases.py")
    command = [sys.executable, str(script), str(driver), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
