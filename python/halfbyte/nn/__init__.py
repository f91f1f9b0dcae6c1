"""Layers with quantized weights, under bitsandbytes' names and constructors."""

from halfbyte.nn import parametrize
from halfbyte.nn.embedding import Embedding, Embedding4bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding
from halfbyte.nn.experts4bit import Experts4bit, StackedLinear4bit
from halfbyte.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from halfbyte.nn.params import Params4bit

__all__ = [
    "Embedding",
    "Embedding4bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Experts4bit",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StableEmbedding",
    "StackedLinear4bit",
    "fix_4bit_weight_quant_state_from_module",
    "parametrize",
]
