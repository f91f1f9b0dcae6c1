"""Processes around the CPU kernels: a forked worker (a DataLoader's, say) has none of its parent's threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FORKING = """
import os, torch
import halfbyte.functional as F
weight = torch.randn(1024, 2048)
want, _ = F.quantize_4bit(weight)  # starts the threads
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    got, _ = F.quantize_4bit(weight)  # must start its own: the parent's did not come along
    os._exit(0 if torch.equal(got, want) else 3)
_, status = os.waitpid(child, 0)
again, _ = F.quantize_4bit(weight)
assert torch.equal(again, want)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_quantizes():
    done = subprocess.run([sys.executable, "-c", FORKING], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
