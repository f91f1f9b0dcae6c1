"""``bitsandbytes.nn``: the 4-bit layers and parameter."""

from . import modules
from .modules import Int8Params, Linear4bit, Linear8bitLt, LinearFP4, LinearNF4, Params4bit

__all__ = ["Int8Params", "Linear4bit", "Linear8bitLt", "LinearFP4", "LinearNF4", "Params4bit", "modules"]
