"""Progress bars: shown on a terminal, silent everywhere else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


def on_terminal() -> bool:
    """Whether standard error, where bars go, is a terminal."""
    return sys.stderr.isatty()


def track(items: Iterable[T], description: str, total: int | None = None, show: bool | None = None) -> Iterator[T]:
    """Yield `items`, with a bar on standard error.

    Parameters
    ----------
    items
        What to go through.
    description
        What is being done, shown before the bar.
    total
        How many items there are, when `items` has no length.
    show
        ``None`` shows the bar on a terminal only, ``True`` always (where tqdm is installed), ``False`` never.
    """
    if show is None:
        show = on_terminal()
    if not show:
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:  # comes with the extra `demo`; without it there is no bar
        yield from items
        return
    yield from tqdm(items, desc=description, total=total, leave=False, dynamic_ncols=True)
