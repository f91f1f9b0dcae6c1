"""``bitsandbytes.nn.modules``: where the layers live in bitsandbytes."""

from halfbyte.nn import (
    Embedding8bit,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
)

__all__ = [
    "Embedding8bit",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
]
