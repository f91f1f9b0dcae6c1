"""What every test file shares: GPU tests skip themselves, and no test sees what another set or drew."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import halfbyte


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that halfbyte serves."""
    return request.param


@pytest.fixture(autouse=True)
def _fresh_torch():
    """Seed torch, and put back the process-wide settings that tests change."""
    torch.manual_seed(0)
    halfbyte.nn.Linear4bit._casts_bias = False  # the drop-in's behaviour, whatever imported that
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.compiler.reset()
