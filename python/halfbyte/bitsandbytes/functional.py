"""``bitsandbytes.functional``: quantization as functions, the quantization state, and helpers around pointers."""

from __future__ import annotations

import ctypes as ct
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from halfbyte._optimizer_update import optimizer_update_8bit_blockwise, optimizer_update_32bit
from halfbyte.errors import DeviceError
from halfbyte.functional import (
    QuantState,
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    get_4bit_type,
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)
from halfbyte.optim._pages import GlobalPageManager, fill, get_paged, prefetch_tensor

from ._absent import absent
from .cextension import lib
from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "FIRST_CUDA_DEVICE",
    "C",
    "CUBLAS_Context",
    "GlobalPageManager",
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "has_avx512bf16",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "lib",
    "name2qmap",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "prod",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

C = 127.0
"""The largest int8 of LLM.int8()."""

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)

name2qmap: dict[str, Tensor] = {}
"""Maps of 8-bit optimizers by name; they fill it."""

__getattr__ = absent("bitsandbytes.functional")


class CUBLAS_Context:
    """A singleton that there is nothing in: no kernel of halfbyte needs a cuBLAS handle."""

    _instance: ClassVar[CUBLAS_Context | None] = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Set up what there is: nothing."""
        self.context: dict[int, ct.c_void_p] = {}

    @classmethod
    def get_instance(cls) -> CUBLAS_Context:
        """Return the one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def get_context(self, device: torch.device) -> ct.c_void_p:
        """Return a null handle for `device`."""
        return self.context.setdefault(device.index or 0, ct.c_void_p(None))


def get_ptr(A: Tensor | None) -> ct.c_void_p | None:
    """Return the address of a tensor's memory as :mod:`ctypes` passes it; None for None."""
    return None if A is None else ct.c_void_p(A.data_ptr())


def _get_tensor_stream(tensor: Tensor) -> ct.c_void_p:
    """Return torch's current stream of the tensor's device; a null one for the CPU."""
    return ct.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None)


def is_on_gpu(tensors: Iterable[Tensor | None]) -> Literal[True]:
    """Return True if all tensors are on one device. Paged ones, which any device can read, and None do not count.

    Raises
    ------
    DeviceError
        A RuntimeError too, if they are not.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None and not getattr(tensor, "is_paged", False)}
    if len(devices) > 1:
        raise _SeveralDevicesError(f"tensors: expected all on one device, got {', '.join(sorted(map(str, devices)))}")
    return True


class _SeveralDevicesError(DeviceError, RuntimeError):
    """The error that callers of :func:`is_on_gpu` expect."""


def has_avx512bf16() -> bool:
    """Return whether the processor has AVX-512 instructions for bf16, where bitsandbytes repacks weights."""
    test = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return test is not None and bool(test())


def _convert_weight_packed_for_cpu(
    qweight: Tensor,
    quant_state: QuantState,
    block_n: int = 32,  # noqa: ARG001
) -> tuple[Tensor, QuantState]:
    """Return what is given: weights are multiplied as they are stored, on every processor."""
    return qweight, quant_state


def _convert_weight_packed_for_cpu_inverse(
    packed_weight: Tensor,
    quant_state: QuantState,
    block_n: int = 32,  # noqa: ARG001
) -> tuple[Tensor, QuantState]:
    """Return what is given; see :func:`_convert_weight_packed_for_cpu`."""
    return packed_weight, quant_state
