"""The AttributeError for a name that bitsandbytes may have and halfbyte has not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte._dropin import SERVED_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable


def absent(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module: the error says who answers for bitsandbytes."""

    def refuse(name: str) -> Any:
        raise AttributeError(
            f"bitsandbytes {SERVED_VERSION} is served by halfbyte here, which has no {module}.{name}", name=name
        )

    return refuse
