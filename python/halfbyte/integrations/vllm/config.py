"""``HalfbyteConfig`` of vLLM: which layers are quantized, and how."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from halfbyte import ops
from halfbyte._model import skip_pattern
from halfbyte._next import Order
from halfbyte._tables import QUANT_TYPES
from halfbyte.errors import ArgumentError
from halfbyte.integrations.vllm.packed import Format

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

logger = init_logger(f"vllm.{__name__}")

SCHEMES: Final = (*QUANT_TYPES, "int8")
BITSANDBYTES: Final = "bitsandbytes"
TAKE_OVER: Final = "HALFBYTE_VLLM"
"""Environment variable that lets halfbyte have what names bitsandbytes even where something else provides it."""


class HalfbyteConfig(QuantizationConfig):  # type: ignore[misc]
    r"""Weights in 4 bits or by LLM.int8(), quantized while they are loaded or before.

    Parameters
    ----------
    scheme
        ``"nf4"``, ``"fp4"`` or ``"int8"``.
    double_quant
        Quantize the scales too, 4-bit only: the weights that a checkpoint with double quantization would have. vLLM
        keeps the scales as they decode, in fp32, because ranks cut them; this saves no memory here.
    blocksize
        Weights that share a scale; 4-bit only. A quantized checkpoint says its own.
    skip
        Names or patterns of layers left alone, as for :func:`halfbyte.quantize_model`.
    experts
        Whether the experts of mixtures are quantized.
    threshold
        Activations at least this large are multiplied in 16 bits; int8 only.

    Raises
    ------
    ArgumentError
        If an argument does not exist.
    """

    NAME: ClassVar[str] = "halfbyte"

    def __init__(
        self,
        scheme: str = "nf4",
        *,
        double_quant: bool = False,
        blocksize: int = 64,
        skip: list[str] | None = None,
        experts: bool = True,
        threshold: float = 6.0,
    ) -> None:
        super().__init__()
        if scheme not in SCHEMES:
            raise ArgumentError(f"scheme: expected one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")
        ops.check_blocksize(blocksize)
        self.form = Format(scheme, 64 if scheme == "int8" else blocksize)
        self.double_quant = double_quant and scheme != "int8"
        self.skip = list(skip or ())
        self.experts = experts
        self.threshold = threshold
        # Weights are loaded long before the first product. Where they are loaded anew, a model's first kernels
        # (embedding, norm) are between the copies and a product, and do not begin before those are done.
        self.order = Order(settled=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form}, double_quant={self.double_quant}, skip={self.skip})"

    @classmethod
    def get_name(cls) -> str:
        """Return the name in ``--quantization``."""
        return cls.NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return what activations may be."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU generation with kernels."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: ``config.json`` says everything."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HalfbyteConfig:
        """Read what a checkpoint's ``config.json``, or ``--hf-overrides``, has under ``quantization_config``.

        Both forms will do: halfbyte's own (``scheme``, ``double_quant``, …) and bitsandbytes' (``load_in_8bit``,
        ``bnb_4bit_quant_type``, …).
        """
        given = {key: value for key, value in config.items() if value is not None}
        if not any(key.startswith(("bnb_4bit", "load_in_", "_load_in_", "llm_int8")) for key in given):
            known = ("scheme", "double_quant", "blocksize", "skip", "experts", "threshold")
            return cls(**{key: given[key] for key in known if key in given})
        int8 = bool(given.get("load_in_8bit", given.get("_load_in_8bit", False)))
        return cls(
            "int8" if int8 else given.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(given.get("bnb_4bit_use_double_quant", False)),
            blocksize=int(given.get("bnb_4bit_blocksize", 64)),
            skip=given.get("llm_int8_skip_modules"),
            experts=bool(given.get("bnb_4bit_experts", True)),
            threshold=float(given.get("llm_int8_threshold", 6.0)),
        )

    @classmethod
    def from_config_dict_json(cls, text: str) -> HalfbyteConfig:
        """Read ``quantization_config_dict_json`` of ``--hf-overrides``."""
        return cls.from_config(json.loads(text))

    @classmethod
    def from_config_file(cls, path: str) -> HalfbyteConfig:
        """Read ``quantization_config_file`` of ``--hf-overrides``."""
        return cls.from_config_dict_json(Path(path).read_text(encoding="utf-8"))

    @classmethod
    def override_quantization_method(
        cls,
        hf_quant_cfg: Mapping[str, Any],
        user_quant: str | None,
        hf_config: Any = None,  # noqa: ARG003
    ) -> str | None:
        """Claim checkpoints that say ``halfbyte``, and bitsandbytes' where the user asked for halfbyte.

        What a checkpoint says of its weights counts, whatever scheme the user's method would have given others.
        """
        method = hf_quant_cfg.get("quant_method")
        asked = user_quant is not None and user_quant == cls.NAME
        if method == HalfbyteConfig.NAME:
            return cls.NAME if asked or (user_quant is None and cls.NAME == HalfbyteConfig.NAME) else None
        if method == BITSANDBYTES and cls.NAME != BITSANDBYTES:
            return cls.NAME if asked or (takes_over() and cls.NAME == HalfbyteConfig.NAME) else None
        return None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Put names of skipped layers into the model's own terms."""
        self.skip = hf_to_vllm_mapper.apply_list(self.skip)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what makes, loads and multiplies the weights of `layer`."""
        from halfbyte.integrations.vllm.linear import HalfbyteLinearMethod
        from halfbyte.integrations.vllm.moe import HalfbyteMoEMethod

        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if self.skips(prefix) else HalfbyteLinearMethod(self)
        if isinstance(layer, RoutedExperts) and self.experts and not self.skips(prefix):
            return HalfbyteMoEMethod(self, layer.moe_config)
        return None

    def skips(self, prefix: str) -> bool:
        """Whether the layer at `prefix`, or any of those that vLLM fused into it, is to be left alone."""
        pattern = skip_pattern(self.skip)
        if pattern is None:
            return False
        outer, _, last = prefix.rpartition(".")
        names = [f"{outer}.{part}" if outer else part for part in self.packed_modules_mapping.get(last, [])]
        found = [pattern.fullmatch(name) is not None for name in (prefix, *names)]
        if any(found[1:]) and not all(found[1:]):
            logger.warning_once(
                "%s: some of %s are to be skipped; vLLM has them as one layer, so all stay in full precision",
                prefix,
                ", ".join(names),
            )
        return any(found)


def takes_over() -> bool:
    """Whether the user wants halfbyte for whatever says bitsandbytes."""
    return os.environ.get(TAKE_OVER, "").strip().lower() not in ("", "0", "false", "no", "off")


class HalfbyteNF4(HalfbyteConfig):
    """``--quantization halfbyte_nf4``."""

    NAME = "halfbyte_nf4"


class HalfbyteFP4(HalfbyteConfig):
    """``--quantization halfbyte_fp4``."""

    NAME = "halfbyte_fp4"

    def __init__(self, scheme: str = "fp4", **options: Any) -> None:
        super().__init__(scheme, **options)


class HalfbyteInt8(HalfbyteConfig):
    """``--quantization halfbyte_int8``."""

    NAME = "halfbyte_int8"

    def __init__(self, scheme: str = "int8", **options: Any) -> None:
        super().__init__(scheme, **options)


class BitsAndBytesConfig(HalfbyteConfig):
    """``--quantization bitsandbytes``: NF4 with double quantization, as that name has always meant in vLLM."""

    NAME = BITSANDBYTES

    def __init__(self, scheme: str = "nf4", *, double_quant: bool = True, **options: Any) -> None:
        super().__init__(scheme, double_quant=double_quant, **options)


CONFIGS: Final = (HalfbyteConfig, HalfbyteNF4, HalfbyteFP4, HalfbyteInt8)
