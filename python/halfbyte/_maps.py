"""Maps of 256 values for blockwise 8-bit quantization, beside the dynamic ones: linear, small floats, normal quantiles.

All are fp32 ``[256]`` on the CPU, ascending. Maps with fewer values hold zeros in the remaining places.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError

_SIZE = 256


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Return evenly spaced values from −1 (0 if not `signed`) to 1.

    Parameters
    ----------
    signed
        Whether there are negative values.
    total_bits
        Bits of a code, 2 to 8.
    add_zero
        Whether 0 must be among the values of a signed map, which then has one value less. It is with fewer than 8 bits.

    Raises
    ------
    ArgumentError
        If `total_bits` is not 2 to 8.
    """
    _check_bits(total_bits)
    count = 2**total_bits - (1 if signed and (add_zero or total_bits < 8) else 0)
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count, dtype=torch.float32, device="cpu")
    return torch.cat([values, values.new_zeros(_SIZE - count)]).sort().values


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """Return the values of a small float format, divided by the largest.

    Parameters
    ----------
    signed
        Whether one bit is the sign.
    exponent_bits, precision_bits
        Bits of exponent and fraction. Exponent 0 is subnormal; as in bitsandbytes, the other values start two powers
        of two above where the subnormal ones end.
    total_bits
        All bits of a code: the sum of these.

    Raises
    ------
    ArgumentError
        If the bits do not add up to `total_bits`, or that is not 2 to 8.
    """
    _check_bits(total_bits)
    if exponent_bits < 0 or precision_bits < 0 or exponent_bits + precision_bits + int(signed) != total_bits:
        raise ArgumentError(
            f"exponent_bits, precision_bits: expected a sum of total_bits={total_bits} with the {int(signed)} for the "
            f"sign, got {exponent_bits} and {precision_bits}"
        )
    steps = 2**precision_bits
    bias = 2.0 ** (exponent_bits - 1)
    values = [step / steps * 2.0**-bias for step in range(steps)]
    for exponent in range(1, 2**exponent_bits):
        values += [(1 + step / steps) * 2.0 ** (bias + 1 - exponent) for step in range(steps)]
    if signed:
        values += [-value for value in values]
    table = torch.tensor(sorted(values + [0.0] * (_SIZE - len(values))), dtype=torch.float32, device="cpu")
    return table / table.max()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Return quantiles of a normal distribution, divided by the largest: how NF4's values are made.

    Parameters
    ----------
    offset
        Probability of the outermost quantile.
    use_extra_value
        Whether there are eight positive values to seven negative ones, and not seven to seven.

    Raises
    ------
    ArgumentError
        If `offset` is not between 0.5 and 1.
    """
    if not 0.5 < offset < 1:
        raise ArgumentError(f"offset: expected a probability between 0.5 and 1, got {offset}")

    def quantiles(count: int) -> list[float]:
        points = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32, device="cpu")[:-1]
        return [NormalDist().inv_cdf(point) for point in points.tolist()]

    values = quantiles(8 if use_extra_value else 7) + [-value for value in quantiles(7)]
    table = torch.tensor(sorted(values + [0.0] * (_SIZE - len(values))), dtype=torch.float32, device="cpu")
    return table / table.max()


def _check_bits(total_bits: int) -> None:
    if not 2 <= total_bits <= 8:
        raise ArgumentError(f"total_bits: expected 2 to 8, got {total_bits}")
