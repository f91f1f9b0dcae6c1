"""Tensors of other libraries: NumPy, and anything that speaks DLPack."""

import numpy as np
import pytest
import torch

import halfbyte
from halfbyte import functional as F
from halfbyte.errors import DtypeError, HalfbyteError


class Producer:
    """A DLPack producer that is nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class ArrayLibrary:
    """The namespace of a library whose arrays are :class:`Array`."""

    @staticmethod
    def from_dlpack(source):
        return Array(torch.from_dlpack(source))

    __name__ = "arraylibrary"


class Array(Producer):
    def __array_namespace__(self, api_version=None):
        return ArrayLibrary()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_numpy_in_numpy_out(dtype, nested):
    a = np.random.default_rng(0).standard_normal((48, 64)).astype(dtype)
    packed, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=nested)
    expected, expected_state = F.quantize_4bit(torch.from_numpy(a), quant_type="nf4", compress_statistics=nested)
    assert isinstance(packed, np.ndarray)
    assert np.array_equal(packed, expected.numpy())
    assert state == expected_state

    dense = F.dequantize_4bit(packed, state)
    assert isinstance(dense, np.ndarray)
    assert dense.dtype == dtype
    assert np.array_equal(dense, F.dequantize_4bit(expected, expected_state).numpy())

    x = np.random.default_rng(1).standard_normal((3, 64)).astype(dtype)
    bias = np.ones(48, dtype)
    product = halfbyte.matmul_4bit(x, packed, state, bias=bias)
    assert isinstance(product, np.ndarray)
    np.testing.assert_allclose(product, x @ dense.T + bias, rtol=1e-2 if dtype == np.float16 else 1e-5, atol=2e-2)

    codes, state8 = F.quantize_blockwise(a, nested=nested)
    assert isinstance(codes, np.ndarray)
    back = F.dequantize_blockwise(codes, state8)
    assert isinstance(back, np.ndarray)
    assert back.dtype == dtype
    assert np.abs(back - a).mean() < 0.03


def test_numpy_layouts():
    a = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    a.setflags(write=False)
    transposed = a.T
    packed, state = F.quantize_4bit(transposed)
    expected, _ = F.quantize_4bit(torch.tensor(a).t())
    assert np.array_equal(packed, expected.numpy())
    assert np.array_equal(F.dequantize_4bit(np.repeat(packed, 2, 1)[:, :1], state), F.dequantize_4bit(packed, state))


def test_results_are_the_callers_to_write_to():
    packed, _ = F.quantize_4bit(np.ones((4, 64), np.float32))
    packed[:] = 0
    assert not packed.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_producer(device, dtype):
    a = torch.randn(48, 64, device=device).to(dtype)
    expected, state = F.quantize_4bit(a, quant_type="nf4")
    packed, _ = F.quantize_4bit(Producer(a), quant_type="nf4")
    assert isinstance(packed, torch.Tensor)  # it did not say whose array it is
    assert torch.equal(packed, expected)
    ours, _ = F.quantize_4bit(Array(a), quant_type="nf4")
    assert isinstance(ours, Array)
    assert torch.equal(ours.tensor, expected)
    product = halfbyte.matmul_4bit(Array(a), Producer(packed), state)
    assert isinstance(product, Array)
    assert torch.equal(product.tensor, halfbyte.matmul_4bit(a, packed, state))
    dense = F.dequantize_4bit(Array(packed), state)
    assert torch.equal(dense.tensor, F.dequantize_4bit(packed, state))


def test_what_cannot_be_taken_or_given_is_said():
    for bad in ([1.0], "x", None, 3):
        with pytest.raises(DtypeError, match="A"):
            F.quantize_4bit(bad)
    with pytest.raises(DtypeError, match="A"):
        F.quantize_4bit(np.ones(64))  # float64
    with pytest.raises(DtypeError, match="A"):
        F.quantize_4bit(np.array(["a"]))
    packed, state = F.quantize_4bit(torch.randn(4, 64).bfloat16())
    with pytest.raises(DtypeError, match="bfloat16"):
        F.dequantize_4bit(packed.numpy(), state)
    with pytest.raises(HalfbyteError):
        halfbyte.matmul_4bit(torch.randn(2, 64).bfloat16(), "packed", state)


def test_torch_stays_torch():
    a = torch.randn(48, 64)
    packed, state = F.quantize_4bit(a)
    assert type(packed) is torch.Tensor
    assert type(halfbyte.matmul_4bit(a, packed.numpy(), state)) is torch.Tensor
