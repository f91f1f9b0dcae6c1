"""halfbyte in vLLM: the quantization methods ``halfbyte`` and, where nobody else provides it, ``bitsandbytes``.

================  ======================================================================================================
``config.py``     which layers are quantized, and how; read from ``config.json``, ``--hf-overrides`` or a method's name
``packed.py``     quantized weights that loaders cut and copy as if they were dense
``checkpoint.py`` entries of one quantized weight become one tensor
``loading.py``    vLLM's loaders, with the above between files and model
``storage.py``    a layer's packed weight, and the loader that fills it
``linear.py``     linear layers; fused ones are one matrix
``gated.py``      feed-forward layers whose activation is done in the product
``moe.py``        experts
================  ======================================================================================================

vLLM calls :func:`register` in each of its processes, through the entry point ``vllm.general_plugins``. Weights are
quantized one by one as they are read; a model never exists in full precision.
"""

from __future__ import annotations

from importlib.util import find_spec


def register() -> None:
    """Make vLLM know halfbyte. May be called any number of times."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from halfbyte.integrations.vllm import loading
    from halfbyte.integrations.vllm.config import BITSANDBYTES, CONFIGS, BitsAndBytesConfig, takes_over

    if BITSANDBYTES in loading.METHODS or CONFIGS[0].NAME in loading.METHODS:
        return
    configs = list(CONFIGS)
    # In vLLM's tree up to 0.27; since then in a plugin of its own, which may be loaded after this one.
    taken = BITSANDBYTES in QUANTIZATION_METHODS or find_spec("vllm_bnb_plugin") is not None
    if takes_over() or not taken:
        configs.append(BitsAndBytesConfig)
    for config in configs:
        register_quantization_config(config.NAME)(config)
    loading.register(config.NAME for config in configs)
