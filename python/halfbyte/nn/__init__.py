"""Layers with quantized weights, under bitsandbytes' names and constructors."""

from halfbyte.nn.experts4bit import Experts4bit, StackedLinear4bit
from halfbyte.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from halfbyte.nn.params import Params4bit

__all__ = [
    "Experts4bit",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StackedLinear4bit",
    "fix_4bit_weight_quant_state_from_module",
]
