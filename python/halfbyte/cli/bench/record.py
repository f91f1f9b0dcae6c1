"""Figures as JSON lines, and what machine, versions and command they belong to.

The first line is ``{"provenance": {...}}``; each one after it is a figure:

======================  ====================================================================================
``op``                  as in :data:`~halfbyte.cli.bench.options.OPERATIONS`; ``copy`` and ``dense`` for the floor
``peer``, ``form``      ``torch``, ``bitsandbytes`` or ``halfbyte``; ``bf16``, ``nf4``, ``nf4 dq`` or ``8-bit``
``m``, ``n``, ``k``     sizes of a product; or ``elements``, ``block``, ``dtype``; or as the operation needs
``us``                  microseconds a call
``floor_us``            what the bytes or the arithmetic need at the measured speeds
``host_us``             microseconds of ``us`` in which the host was busy (``eager`` on a GPU)
``timing``              ``graph``, ``stream``, ``eager`` or ``wall``
``error``               instead of ``us``: why there is no figure
======================  ====================================================================================
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import halfbyte
from halfbyte import _dropin, _native
from halfbyte.cli.doctor import driver_version
from halfbyte.errors import HalfbyteError

Row = dict[str, Any]


def provenance(device: torch.device, commit: str | None = None) -> Row:
    """Say what a figure belongs to.

    Parameters
    ----------
    device
        Where it was measured.
    commit
        Which build it is of; None asks git, if this package is in its working tree.
    """
    facts: Row = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": shlex.join(["halfbyte", *sys.argv[1:]]),
        "halfbyte": halfbyte.__version__,
        "commit": commit or _commit(),
        "torch": torch.__version__,
        "bitsandbytes": _dropin.installed_version(),
        "python": platform.python_version(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return facts | {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver_version() or _asked_driver(),
        }
    return facts | {"cpu": _cpu_name(), "simd": _native.simd_level(), "threads": torch.get_num_threads()}


def _commit() -> str | None:
    root = Path(halfbyte.__file__).parents[2]
    if not (root / "rust" / "halfbyte" / "Cargo.toml").is_file():  # installed, perhaps inside another repository
        return None
    return _said_by("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*")


def _asked_driver() -> str | None:
    said = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return said.splitlines()[0].strip() if said else None


def _said_by(program: str, *arguments: str) -> str | None:
    """Return what a program prints, None if it is not there or fails."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name() -> str:
    known = Path("/proc/cpuinfo")
    if known.is_file():
        for line in known.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


class Recorder:
    """Collects figures, and writes each to a file as it comes."""

    def __init__(self, facts: Row, path: Path | None) -> None:
        self.facts, self.path = facts, path
        self.rows: list[Row] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_line({"provenance": facts}), encoding="utf-8")

    def add(self, row: Row) -> None:
        """Take one figure."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))


def _line(value: Row) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def read(path: Path) -> tuple[Row, list[Row]]:
    """Return the provenance and the figures of a file.

    Raises
    ------
    HalfbyteError
        If the file is not one that :class:`Recorder` wrote.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return dict(lines[0]["provenance"]), [dict(line) for line in lines[1:]]
    except (ValueError, LookupError, TypeError) as error:
        raise HalfbyteError(f"{path}: not figures of `halfbyte bench`: {error}") from None
