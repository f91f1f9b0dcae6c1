"""``bitsandbytes.nn``: the layers and parameters."""

from . import modules
from .modules import Embedding8bit, Int8Params, Linear4bit, Linear8bitLt, LinearFP4, LinearNF4, Params4bit

__all__ = [
    "Embedding8bit",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "modules",
]
