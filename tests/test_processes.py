"""Processes around the CPU kernels: a forked worker (a DataLoader's, say) has none of its parent's threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Nothing of torch's that is parallel runs in the child: GNU OpenMP itself does not survive a fork.
FORKING = """
import os, torch
from halfbyte import _native
weight = torch.randn(1024, 2048)
def quantize():
    packed, absmax = torch.empty(1024 * 1024, dtype=torch.uint8), torch.empty(1024 * 32)
    _native.set_num_threads(2)
    _native.quantize_4bit(weight, packed, absmax, "nf4", 64)
    return bytes(packed.numpy())
want = quantize()  # on threads
child = os.fork()
if child == 0:
    os._exit(0 if quantize() == want else 3)  # must find its own: the parent's did not come along
_, status = os.waitpid(child, 0)
assert quantize() == want
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_quantizes():
    done = subprocess.run([sys.executable, "-c", FORKING], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
