"""halfbyte in transformers: :class:`HalfbyteConfig`, and the unmodified ``BitsAndBytesConfig``.

==================  ====================================================================================================
``config.py``       :class:`HalfbyteConfig`, for ``from_pretrained(..., quantization_config=…)``
``quantizer.py``    the quantizers: one implementation under three names that transformers asks for
``operations.py``   what the loader does to one parameter: quantize it, or put it together from a checkpoint's entries
``checkpoint.py``   which parameters of a checkpoint are quantized, from its headers
``experts.py``      experts of one layer: stacked in the model, one by one in files
==================  ====================================================================================================

transformers' own bitsandbytes quantizers leave holes, which these mend: a reloaded model can be saved again,
``dequantize()`` works after a save and in any dtype, ``generate`` may compile, stacked experts are quantized, and
mixture checkpoints from before transformers 5 load. Tested with transformers 5.17 and 5.24. Importing this imports
transformers; :mod:`halfbyte._hooks` does so when, and only when, transformers is there.
"""

import transformers.quantizers.auto  # noqa: F401  # first: its import has :mod:`halfbyte._hooks` come here

from halfbyte.integrations.transformers.config import HalfbyteConfig
from halfbyte.integrations.transformers.quantizer import (
    Halfbyte4BitHfQuantizer,
    Halfbyte8BitHfQuantizer,
    HalfbyteHfQuantizer,
    register,
)

__all__ = [
    "Halfbyte4BitHfQuantizer",
    "Halfbyte8BitHfQuantizer",
    "HalfbyteConfig",
    "HalfbyteHfQuantizer",
    "register",
]
