"""Names that are looked up when somebody asks for them, as attributes of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.integrations._late import find

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["attributes", "find"]


def attributes(module: str, names: frozenset[str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module: it serves `names`.

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
