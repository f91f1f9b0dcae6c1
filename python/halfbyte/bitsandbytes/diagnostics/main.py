"""``bitsandbytes.diagnostics.main``: what ``python -m bitsandbytes`` prints."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

import halfbyte
from halfbyte._dropin import SERVED_VERSION as bnb_version

from ..consts import PACKAGE_GITHUB_URL
from ..cuda_specs import get_cuda_specs
from .cuda import print_diagnostics
from .utils import print_dedented, print_header

__all__ = ["PACKAGE_GITHUB_URL", "bnb_version", "get_package_version", "main", "sanity_check", "show_environment"]

_RELATED_PACKAGES = ["accelerate", "diffusers", "numpy", "peft", "safetensors", "transformers", "triton", "trl"]


def get_package_version(name: str) -> str:
    """Return the installed version of a package, or ``"not found"``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not found"


def show_environment() -> None:
    """Print platform, versions and related packages."""
    print_dedented(f"""
        Platform: {platform.platform()}
        Python: {platform.python_version()}
        PyTorch: {torch.__version__}
        CUDA: {torch.version.cuda or "N/A"}
        SIMD level: {halfbyte._native.simd_level()}
        Related packages:
    """)
    for name in _RELATED_PACKAGES:
        print(f"  {name}: {get_package_version(name)}")


def sanity_check() -> None:
    """Quantize and multiply once on the CPU and on the GPU, if there is one.

    Raises
    ------
    RuntimeError
        If a result is wrong; and whatever stands in the way.
    """
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        weight, x = torch.eye(64, device=device), torch.randn(2, 64, device=device)
        packed, state = halfbyte.functional.quantize_4bit(weight, quant_type="nf4")
        if not torch.allclose(halfbyte.matmul_4bit(x, packed, state), x):
            raise RuntimeError(f"a product on {device} is wrong")


def main() -> None:
    """Print everything, and end the process with status 1 if nothing can be computed."""
    print_header(f"bitsandbytes {bnb_version}, served by halfbyte {halfbyte.__version__}")
    show_environment()
    print_header("")
    specs = get_cuda_specs()
    if specs is None:
        print("No GPU that torch can use: halfbyte computes on the CPU.")
    else:
        print_diagnostics(specs)
    try:
        sanity_check()
    except Exception as error:  # whatever it is, this is where it is wanted
        print(f"FAILED: {type(error).__name__}: {error}")
        print("`halfbyte doctor` looks closer.")
        sys.exit(1)
    print("SUCCESS!")
