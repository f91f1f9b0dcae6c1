"""``bitsandbytes.consts``: names of files and places."""

from pathlib import Path
from typing import Final

DYNAMIC_LIBRARY_SUFFIX: Final = ".so"
PACKAGE_DIR: Final = Path(__file__).parent
PACKAGE_GITHUB_URL: Final = "https://github.com/bitsandbytes-foundation/bitsandbytes"
NONPYTORCH_DOC_URL: Final = f"{PACKAGE_GITHUB_URL}/blob/main/docs/source/nonpytorchcuda.mdx"

__all__ = ["DYNAMIC_LIBRARY_SUFFIX", "NONPYTORCH_DOC_URL", "PACKAGE_DIR", "PACKAGE_GITHUB_URL"]
