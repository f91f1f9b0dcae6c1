"""Layers with quantized weights, under bitsandbytes' names and constructors."""

from halfbyte.nn.embedding8bit import Embedding8bit
from halfbyte.nn.experts4bit import Experts4bit, StackedLinear4bit
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from halfbyte.nn.linear8bit import Linear8bitLt
from halfbyte.nn.params import Params4bit

__all__ = [
    "Embedding8bit",
    "Experts4bit",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StackedLinear4bit",
    "fix_4bit_weight_quant_state_from_module",
]
