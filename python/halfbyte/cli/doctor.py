"""``halfbyte doctor``: what is here, and does it work."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import halfbyte
from halfbyte import _dropin, _native
from halfbyte.cli import selfcheck
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    import argparse

_DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = ("torch", "numpy", "safetensors", "transformers", "peft", "accelerate")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings.

    Returns
    -------
    int
        0 if every check passed, else 1.
    """
    found = examine()
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """Collect versions, processors, GPUs and the results of the self-check, ready for JSON."""
    checks = selfcheck.run()
    return {
        "halfbyte": halfbyte.__version__,
        "build": _native.build_info(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "bitsandbytes": {"installed": _dropin.installed_version(), "served_by_halfbyte": _dropin.is_active()},
        "cpu": {
            "simd": _native.simd_level(),
            "simd_levels": _native.simd_levels(),
            "threads": torch.get_num_threads(),
        },
        "cuda": _cuda(),
        "checks": [asdict(check) for check in checks],
        "ok": all(check.ok for check in checks),
    }


def _cuda() -> dict[str, Any]:
    try:
        found = _native.cuda_info()
    except HalfbyteError as error:
        return {"unavailable": str(error)}
    if (driver := driver_version()) is not None:
        found["driver"] = driver
    return found


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, None where the system does not say."""
    if not _DRIVER.is_file():
        return None
    # "NVRM version: NVIDIA UNIX ... Kernel Module  580.95  ..."
    numbers = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER.read_text(encoding="utf-8"))
    return numbers[0] if numbers else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def render(found: dict[str, Any]) -> str:
    """Lay out what :func:`examine` found, for people."""
    rows = [
        ("halfbyte", _flat(found["build"])),
        ("python", f"{found['python']} on {found['platform']}"),
        *((name, here or "not installed") for name, here in found["packages"].items()),
        ("torch's CUDA", found["torch_cuda"] or "none: this torch is built for the CPU"),
        ("bitsandbytes", _who_serves(found["bitsandbytes"])),
        (
            "CPU",
            f"{found['cpu']['simd']} (of {', '.join(found['cpu']['simd_levels'])}), {found['cpu']['threads']} threads",
        ),
        *_cuda_rows(found["cuda"]),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", "self-check"]
    lines += [
        f"  {'ok  ' if check['ok'] else 'FAIL'}  {check['device']}: {check['what']}: {check['detail']}"
        for check in found["checks"]
    ]
    failed = sum(not check["ok"] for check in found["checks"])
    lines += ["", "OK" if found["ok"] else f"FAIL: {failed} of {len(found['checks'])} checks failed"]
    if found["torch_cuda"] and not torch.cuda.is_available():
        lines.append("No GPU was checked: torch finds none.")
    return "\n".join(lines)


def _who_serves(bitsandbytes: dict[str, Any]) -> str:
    installed = bitsandbytes["installed"]
    real = f"{installed} is installed" if installed else "not installed"
    served = "served by halfbyte" if bitsandbytes["served_by_halfbyte"] else "not served by halfbyte"
    return f"{real}; `import bitsandbytes` is {served}"


def _cuda_rows(cuda: dict[str, Any]) -> list[tuple[str, str]]:
    if "unavailable" in cuda:
        return [("CUDA", f"not available: {cuda['unavailable']}")]
    driver = f"driver {cuda['driver']}, " if cuda.get("driver") else ""
    rows = [("CUDA", f"{driver}supports CUDA {cuda['driver_cuda']}")]
    for index, device in enumerate(cuda["devices"]):
        images = ", ".join(f"{family}: {image}" for family, image in device["images"].items() if image)
        rows.append((f"GPU {index}", f"{device['name']}, compute capability {device['capability']}"))
        rows.append(("  kernel images", images or "none serves this GPU"))
    return rows


def _flat(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
