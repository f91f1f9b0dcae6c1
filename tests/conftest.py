"""What every test file shares: GPU tests skip themselves, and no test sees what another set, drew or left in memory."""

import fcntl
import gc
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import vllm_runs

import halfbyte

FAILURES = os.environ.get("HALFBYTE_TEST_FAILURES")
"""A file that gets a line for each failure as soon as it is there, whatever becomes of the run and of its log."""


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_runtest_logreport(report):
    if FAILURES and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(report.longrepr if crash is None else crash.message).strip() or "?"
        when = "" if report.when == "call" else f" ({report.when})"
        with Path(FAILURES).open("a", encoding="utf-8") as file:
            print(f"{report.nodeid}{when}: {' '.join(reason.split())[:300]}", file=file)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that halfbyte serves."""
    return request.param


@pytest.fixture(scope="session")
def vllm():
    """Skip what needs vLLM where that is missing, or does not run even without halfbyte."""
    reason = vllm_runs.why_not()
    if reason:
        pytest.skip(reason)


@contextmanager
def locked(path, how):
    """Hold a file's lock, of all processes that take it."""
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield


@pytest.fixture(autouse=True)
def _gpu(request, tmp_path_factory):
    """Give the GPU back as it was: no memory kept, no error pending. Those marked `alone` have it to themselves."""
    node = request.node
    if node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        yield
        return
    alone = node.get_closest_marker("alone") is not None
    with ExitStack() as turns:
        if "PYTEST_XDIST_WORKER" in os.environ:
            shared = tmp_path_factory.getbasetemp().parent
            # Who is to be alone holds the queue while others leave, so that no more of them come.
            with locked(shared / "gpu.queue", fcntl.LOCK_EX):
                turns.enter_context(locked(shared / "gpu", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        if alone:
            torch.cuda.empty_cache()
        yield
        try:
            torch.cuda.synchronize()
            if alone or torch.cuda.memory_reserved() > 1 << 30:
                gc.collect()
                torch.cuda.empty_cache()
        except RuntimeError as error:
            if computes():
                raise
            # A fault on the device is for good: every later test of this process would fail of it.
            if "PYTEST_XDIST_WORKER" not in os.environ:
                pytest.exit(f"the device is of no use any more after {node.nodeid}: {error}", 3)
            print(f"{node.nodeid}: the device is of no use to this process any more: {error}", file=sys.__stderr__)
            os._exit(3)  # pytest-xdist starts another one for the rest


def computes():
    """Whether the GPU still does what it is asked."""
    try:
        return torch.ones(1, device="cuda").item() == 1
    except (RuntimeError, AssertionError):
        return False


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
