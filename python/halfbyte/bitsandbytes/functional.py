"""``bitsandbytes.functional``: 4-bit and blockwise 8-bit quantization, and the quantization state."""

from halfbyte.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]
