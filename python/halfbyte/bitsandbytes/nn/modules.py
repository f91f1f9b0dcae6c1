"""``bitsandbytes.nn.modules``: where the layers live in bitsandbytes.

``Linear8bitLt`` and ``Int8Params`` are names without content: libraries ask ``isinstance(layer, Linear8bitLt)`` of
every layer, 4-bit ones included, and must be told no. Making one raises.
"""

from typing import Any, NoReturn

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit

__all__ = ["Int8Params", "Linear4bit", "Linear8bitLt", "LinearFP4", "LinearNF4", "Params4bit"]


def _no_int8(name: str) -> NoReturn:
    raise HalfbyteError(
        f"{name}: bitsandbytes is served by halfbyte here, which does not do LLM.int8() in this version. "
        "Use load_in_4bit=True, or install bitsandbytes and do not replace it"
    )


class Linear8bitLt(torch.nn.Linear):
    """Answers ``isinstance`` with no; cannot be made.

    Raises
    ------
    HalfbyteError
        Always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        _no_int8("Linear8bitLt")


class Int8Params(torch.nn.Parameter):
    """Answers ``isinstance`` with no; cannot be made.

    Raises
    ------
    HalfbyteError
        Always.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG004, D102
        _no_int8("Int8Params")
