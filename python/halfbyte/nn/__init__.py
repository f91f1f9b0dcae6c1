"""Layers with quantized weights, under bitsandbytes' names and constructors."""

from halfbyte.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from halfbyte.nn.params import Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4", "Params4bit", "fix_4bit_weight_quant_state_from_module"]
