"""``bitsandbytes.diagnostics.utils``: headers and indented text."""

import textwrap

__all__ = ["HEADER_WIDTH", "print_dedented", "print_header"]

HEADER_WIDTH = 60


def print_header(txt: str, width: int = HEADER_WIDTH, filler: str = "=") -> None:
    """Print `txt` in the middle of a line of `filler`."""
    print(f" {txt} ".center(width, filler) if txt else filler * width)


def print_dedented(text: str) -> None:
    """Print the lines of `text` that are not blank, without their common indentation."""
    print("\n".join(line for line in textwrap.dedent(text).strip().splitlines() if line.strip()))
