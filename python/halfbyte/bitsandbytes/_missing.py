"""Classes of LLM.int8() for a version of halfbyte without it.

Names without content: libraries ask ``isinstance(layer, Linear8bitLt)`` of every layer, 4-bit ones included, and must
be told no. Making one raises.
"""

from typing import Any, NoReturn

import torch

from halfbyte.errors import HalfbyteError


def _no_int8(name: str) -> NoReturn:
    raise HalfbyteError(
        f"{name}: bitsandbytes is served by halfbyte here, which does not do LLM.int8() in this version. "
        "Use load_in_4bit=True, or install bitsandbytes and do not replace it"
    )


class Linear8bitLt(torch.nn.Linear):
    """Answers ``isinstance`` with no; cannot be made: HalfbyteError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        _no_int8("Linear8bitLt")


class Embedding8bit(torch.nn.Embedding):
    """Answers ``isinstance`` with no; cannot be made: HalfbyteError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        _no_int8("Embedding8bit")


class Int8Params(torch.nn.Parameter):
    """Answers ``isinstance`` with no; cannot be made: HalfbyteError."""

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG004
        _no_int8("Int8Params")


class MatmulLtState:
    """Cannot be made: HalfbyteError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        _no_int8("MatmulLtState")


def matmul(*args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG001
    """Raise HalfbyteError."""
    _no_int8("matmul")
