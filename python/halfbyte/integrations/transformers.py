"""halfbyte in transformers, behind the unmodified ``BitsAndBytesConfig(load_in_4bit=True)``.

transformers' own 4-bit quantizer does the work, on halfbyte's layers; :class:`Halfbyte4BitHfQuantizer` mends what it
leaves open: a reloaded model can be saved again, ``dequantize()`` works after a save and in any dtype, ``generate`` may
compile, and ``config.bnb_4bit_blocksize`` chooses a block size other than 64. Tested with transformers 5.17 and 5.23.
This module imports transformers; :mod:`halfbyte._dropin` imports it when, and only when, transformers is there.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from halfbyte import _dropin
from halfbyte.nn import Linear4bit
from halfbyte.ops import check_blocksize

METHOD = "bitsandbytes_4bit"


class Halfbyte4BitHfQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' 4-bit bitsandbytes quantizer, with its holes closed."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        # An attribute that BitsAndBytesConfig knows nothing of, and carries. Quantizing reads it off the parameter;
        # a checkpoint says its own block size.
        blocksize = getattr(self.quantization_config, "bnb_4bit_blocksize", None)
        if blocksize is not None and not self.pre_quantized:
            check_blocksize(blocksize)
            for module in model.modules():
                if isinstance(module, Linear4bit):
                    module.weight.blocksize = blocksize

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        # On saving, transformers runs every conversion of the load backwards. Ours has no way back and needs none:
        # the layers' state dict is the checkpoint format.
        conversions = getattr(model, "_weight_conversions", None)
        if conversions:
            model._weight_conversions = [c for c in conversions if not self._reads_ours(c)]
        return model

    def _reads_ours(self, conversion: Any) -> bool:
        from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

        return any(isinstance(operation, Bnb4bitDeserialize) for operation in getattr(conversion, "operations", ()))

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the forward pass when the cache is static: halfbyte's layers can be."""
        return _dropin.is_active()

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        before = _as_dtype(model.config.dtype)
        dtype = _as_dtype(dtype)
        if any(isinstance(module, Linear4bit) for module in model.modules()):
            model = super()._dequantize(model, dtype=dtype)
        if dtype is not None:
            # Biases, norms and embeddings follow, except what was kept in another dtype on purpose.
            for parameter in model.parameters():
                if parameter.dtype == before:
                    parameter.data = parameter.data.to(dtype)
            model.config.dtype = dtype
        model.is_loaded_in_4bit = False
        return model


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Resolve the name of a dtype, which ``save_pretrained`` leaves in a config."""
    if isinstance(dtype, str):
        found: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
        return found
    return dtype


def register() -> None:
    """Have transformers use :class:`Halfbyte4BitHfQuantizer` for 4-bit bitsandbytes models.

    Does nothing where another library has put its own quantizer in that place.
    """
    if auto.AUTO_QUANTIZER_MAPPING.get(METHOD) is Bnb4BitHfQuantizer:
        auto.AUTO_QUANTIZER_MAPPING[METHOD] = Halfbyte4BitHfQuantizer
