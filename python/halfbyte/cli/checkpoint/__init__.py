"""The commands on checkpoints: ``quantize``, ``dequantize`` and ``inspect``.

The Rust core reads, plans and writes; here are options, the sum of scales (torch's, so that its last bits are those of
a model quantized in Python), the GPU, and what is printed. Nothing here imports transformers.
"""
