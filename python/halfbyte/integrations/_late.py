"""Where halfbyte has the names of bitsandbytes that are looked up when somebody asks for them."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = (
    "halfbyte",
    "halfbyte.functional",
    "halfbyte.nn",
    "halfbyte.optim",
    "halfbyte.optim._pages",
    "halfbyte._optimizer_update",
)


def find(name: str) -> Any | None:
    """Return what halfbyte calls `name`, or None."""
    for home in _HOMES:
        try:
            module = importlib.import_module(home)
        except ModuleNotFoundError as error:
            if error.name is None or not home.startswith(error.name):
                raise
            continue
        if hasattr(module, name):
            return getattr(module, name)
    return None
