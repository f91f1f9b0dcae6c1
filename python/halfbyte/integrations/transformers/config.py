"""``HalfbyteConfig``, and what it has in common with ``BitsAndBytesConfig``."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from halfbyte import ops
from halfbyte._tables import QUANT_TYPES, STORAGE_DTYPES
from halfbyte.errors import ArgumentError

METHOD: Final = "halfbyte"
SCHEMES: Final = (*QUANT_TYPES, "int8")


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model, whichever configuration says so. `skip` None means transformers' defaults."""

    scheme: str
    double_quant: bool
    blocksize: int
    compute_dtype: torch.dtype | None
    quant_storage: torch.dtype
    scale_search: bool
    experts: bool
    skip: list[str] | None
    add_default_skips: bool
    threshold: float = 6.0
    has_fp16_weights: bool = False
    offload: bool = False

    @property
    def is_int8(self) -> bool:
        """Whether this is LLM.int8()."""
        return self.scheme == "int8"


class HalfbyteConfig(QuantizationConfigMixin):  # type: ignore[misc]
    r"""How ``from_pretrained`` quantizes a model with halfbyte, whatever ``import bitsandbytes`` finds.

    Parameters
    ----------
    scheme
        ``"nf4"``, ``"fp4"`` or ``"int8"`` (LLM.int8()).
    double_quant
        Quantize the scales too; 4-bit only.
    blocksize
        Weights that share a scale; 4-bit only.
    compute_dtype
        What activations are cast to for the product; default: the dtype that the model is loaded in. A name
        (``"bfloat16"``) will do.
    quant_storage
        Element type that packed bytes are viewed as. The model's own dtype is what FSDP wants.
    scale_search
        Pick scales by least squared error; see :func:`~halfbyte.functional.quantize_4bit`.
    skip
        Names or patterns of modules that are left alone, beside the output embedding and tied weights: the start of a
        name up to a dot, its end, or a regular expression for its start (``"lm_head"``, ``"model.layers.0"``,
        ``"down_proj"``, ``r"model\.layers\.[01]"``).
    experts
        Whether stacked experts (3-D parameters) are quantized too, which 4-bit schemes can.
    threshold
        Activations at least this large are multiplied in 16 bits; int8 only.

    Raises
    ------
    ArgumentError, DtypeError
        If an argument does not exist.

    Notes
    -----
    What is saved says ``bitsandbytes`` wherever bitsandbytes can read it, so that the files load without halfbyte; only
    experts that transformers saves stacked have no such form, and those checkpoints say ``halfbyte``.

    Examples
    --------
    >>> HalfbyteConfig("nf4", double_quant=True, skip=["down_proj"]).scheme
    'nf4'
    """

    def __init__(
        self,
        scheme: str = "nf4",
        *,
        double_quant: bool = True,
        blocksize: int = 64,
        compute_dtype: torch.dtype | str | None = None,
        quant_storage: torch.dtype | str = torch.uint8,
        scale_search: bool = False,
        skip: list[str] | tuple[str, ...] | None = None,
        experts: bool = True,
        threshold: float = 6.0,
        **rest: Any,
    ) -> None:
        unknown = rest.keys() - {"quant_method"}
        if unknown:
            raise ArgumentError(f"HalfbyteConfig: no such argument: {', '.join(sorted(unknown))}")
        if scheme not in SCHEMES:
            raise ArgumentError(f"scheme: expected one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")
        if isinstance(skip, str):
            skip = [skip]
        ops.check_blocksize(blocksize)
        self.quant_method = METHOD
        self.scheme = scheme
        self.double_quant = bool(double_quant)
        self.blocksize = blocksize
        self.compute_dtype = as_dtype(compute_dtype, "compute_dtype")
        storage = as_dtype(quant_storage, "quant_storage")
        ops.check_dtype("quant_storage", storage, STORAGE_DTYPES)
        self.quant_storage: torch.dtype = storage  # type: ignore[assignment]
        self.scale_search = bool(scale_search)
        self.skip = None if skip is None else list(skip)
        self.experts = bool(experts)
        self.threshold = float(threshold)

    @property
    def load_in_4bit(self) -> bool:
        """Whether weights get 4 bits."""
        return self.scheme != "int8"

    @property
    def load_in_8bit(self) -> bool:
        """Whether weights get 8 bits."""
        return self.scheme == "int8"

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint's ``config.json`` holds: bitsandbytes' form, unless it has none for the model."""
        if getattr(self, "_stacked", False):
            kept = {k: v for k, v in copy.deepcopy(self.__dict__).items() if not k.startswith("_")}
            return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in kept.items()}
        skip = getattr(self, "_skipped", self.skip)
        if self.load_in_8bit:
            there = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold, llm_int8_skip_modules=skip)
        else:
            there = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.scheme,
                bnb_4bit_use_double_quant=self.double_quant,
                bnb_4bit_compute_dtype=self.compute_dtype,
                bnb_4bit_quant_storage=self.quant_storage,
                llm_int8_skip_modules=skip,
            )
        written: dict[str, Any] = there.to_dict()
        return written

    def to_diff_dict(self) -> dict[str, Any]:
        """Return :meth:`to_dict`: nothing is left out for being a default."""
        return self.to_dict()

    def __repr__(self) -> str:
        kept = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k != "quant_method")
        return f"HalfbyteConfig({kept})"

    @classmethod
    def from_bitsandbytes(cls, config: BitsAndBytesConfig | dict[str, Any]) -> HalfbyteConfig:
        """Return what loads the checkpoint that `config`, bitsandbytes' own, describes."""
        if isinstance(config, dict):
            config = BitsAndBytesConfig.from_dict(config)
        of = recipe(config)
        return cls(
            of.scheme,
            double_quant=of.double_quant,
            compute_dtype=of.compute_dtype,
            quant_storage=of.quant_storage,
            skip=of.skip,
            threshold=of.threshold,
        )


def recipe(config: Any) -> Recipe:
    """Return what `config` asks for; of a ``BitsAndBytesConfig`` also in attributes that only halfbyte knows."""
    if isinstance(config, HalfbyteConfig):
        return Recipe(
            scheme=config.scheme,
            double_quant=config.double_quant,
            blocksize=config.blocksize,
            compute_dtype=config.compute_dtype,
            quant_storage=config.quant_storage,
            scale_search=config.scale_search,
            experts=config.experts and not config.load_in_8bit,
            skip=config.skip,
            add_default_skips=True,
            threshold=config.threshold,
        )
    int8 = bool(config.load_in_8bit)
    return Recipe(
        scheme="int8" if int8 else config.bnb_4bit_quant_type,
        double_quant=config.bnb_4bit_use_double_quant,
        blocksize=getattr(config, "bnb_4bit_blocksize", None) or 64,
        compute_dtype=config.bnb_4bit_compute_dtype,
        quant_storage=config.bnb_4bit_quant_storage,
        scale_search=bool(getattr(config, "bnb_4bit_scale_search", False)),
        experts=bool(getattr(config, "bnb_4bit_experts", True)) and not int8,
        skip=config.llm_int8_skip_modules,
        add_default_skips=False,
        threshold=config.llm_int8_threshold,
        has_fp16_weights=config.llm_int8_has_fp16_weight,
        offload=config.llm_int8_enable_fp32_cpu_offload,
    )


def as_dtype(dtype: torch.dtype | str | None, name: str = "dtype") -> torch.dtype | None:
    """Resolve the name of a dtype, which ``save_pretrained`` and JSON leave where there was one."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ArgumentError(f"{name}: expected a dtype of torch, got {dtype!r}")
        return found
    return dtype
