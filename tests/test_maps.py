"""Maps of 256 values: what their definitions say, and bitsandbytes' own values."""

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import ArgumentError

F = hb.functional


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero", [False, True])
def test_linear(signed, bits, zero):
    table = F.create_linear_map(signed, bits, zero)
    assert (table.shape, table.dtype) == ((256,), torch.float32)
    assert bool((table.diff() >= 0).all())
    used = 2**bits - (1 if signed and (zero or bits < 8) else 0)
    distinct = table.unique()
    assert distinct.numel() in (used, used + 1)
    assert table[0] == (-1 if signed else 0)
    assert table[-1] == 1
    if signed and used % 2:
        torch.testing.assert_close(distinct, -distinct.flip(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("exponent", range(1, 7))
def test_small_floats(exponent):
    table = F.create_fp8_map(True, exponent, 7 - exponent)
    assert (table.shape, table.dtype) == ((256,), torch.float32)
    assert table.max() == 1
    assert torch.equal(table, -table.flip(0))
    positive = table[table > 0].double()
    assert positive.numel() == 127
    steps = 2 ** (7 - exponent)
    # Subnormal values go up by the smallest; the others by parts of a power of two, from four times further on.
    torch.testing.assert_close(positive[: steps - 1] / positive[0], torch.arange(1.0, steps, dtype=torch.double))
    normal = positive[steps - 1 :].view(-1, steps) / positive[0] / (4 * steps)
    expected = (1 + torch.arange(steps, dtype=torch.double) / steps) * 2.0 ** torch.arange(2**exponent - 1)[:, None]
    torch.testing.assert_close(normal, expected)


def test_normal_quantiles():
    for extra in (True, False):
        table = F.create_normal_map(use_extra_value=extra)
        assert (table.shape, table.dtype) == ((256,), torch.float32)
        values = table[table != 0]
        assert values.numel() == (15 if extra else 14)
        assert (values.min() == -1 or extra, values.max() == 1) == (True, True)
    nf4 = F.get_4bit_type("nf4", "cpu")
    ours = F.create_normal_map().unique()
    assert ours.numel() == 16
    torch.testing.assert_close(ours, nf4, atol=2e-3, rtol=0)


def test_a_map_quantizes():
    a = torch.randn(1000)
    for table in (F.create_linear_map(), F.create_fp8_map(True, 4, 3), F.create_fp8_map(True, 2, 1, 4)):
        codes, state = F.quantize_blockwise(a, table, blocksize=64)
        scaled = a / state.absmax.repeat_interleave(64)[:1000]
        nearest = (scaled[:, None] - table).abs().min(dim=1).values
        torch.testing.assert_close((scaled - table[codes.long()]).abs(), nearest, atol=1e-6, rtol=0)


def test_what_makes_no_map_is_refused():
    for call, name in (
        (lambda: F.create_linear_map(True, 9), "total_bits"),
        (lambda: F.create_linear_map(True, 0), "total_bits"),
        (lambda: F.create_fp8_map(True, 5, 3), "exponent_bits, precision_bits"),
        (lambda: F.create_fp8_map(False, 5, 2), "exponent_bits, precision_bits"),
        (lambda: F.create_normal_map(0.5), "offset"),
        (lambda: F.create_normal_map(float("nan")), "offset"),
    ):
        with pytest.raises(ArgumentError, match=name):
            call()
