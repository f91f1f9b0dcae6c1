"""Names of bitsandbytes that a version of halfbyte may have or not: looked up when they are asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_HOMES = ("halfbyte", "halfbyte.functional", "halfbyte.nn", "halfbyte.optim")


def find(name: str) -> Any | None:
    """Return what halfbyte calls `name`, or None."""
    for home in _HOMES:
        try:
            module = importlib.import_module(home)
        except ModuleNotFoundError as error:
            if error.name != home:
                raise
            continue
        if hasattr(module, name):
            return getattr(module, name)
    return None


def attributes(module: str, names: frozenset[str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module: it serves `names` as far as halfbyte has them.

    Any other name, and one that is not there, is an AttributeError that says who answers.
    """

    def lookup(name: str) -> Any:
        found = find(name) if name in names else None
        if found is None:
            from halfbyte import __version__ as version

            raise AttributeError(
                f"bitsandbytes is served by halfbyte {version} here, which has no {module}.{name}", name=name
            )
        return found

    return lookup
