"""Every byte that quantizing on CUDA writes, against the rules written out here.

Each block's largest magnitude is made a power of two, so that x / absmax is exact and so is the comparison with a
decision point: the points themselves and their neighbours are among the values.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from halfbyte import _native
from halfbyte import functional as F

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
# The reciprocals of greater ones are flushed to zero, here as in bitsandbytes.
LARGEST = {torch.bfloat16: 2.0**126, torch.float16: 65504.0, torch.float32: 2.0**126}
SIZES = [1, 31, 1024, 1025, 8 * 4096, 70001, 1 << 20]


def fp32(decimals: str) -> torch.Tensor:
    """The nearest fp32 of each number. By way of a double, four of NF4's points would be others: they are halfway."""
    found = []
    for text in decimals.split():
        near = torch.tensor(float(text))
        some = [near, *(torch.nextafter(near, torch.tensor(to)) for to in (-2.0, 2.0))]
        found.append(min(some, key=lambda x: abs(Fraction(x.item()) - Fraction(text))))
    return torch.stack(found)


# bitsandbytes' CUDA source, decimal by decimal.
NF4_POINTS = fp32(
    "-0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544 -0.23460740596055984 "
    "-0.13791173323988914 -0.045525018125772476 0.03979014977812767 0.1202552504837513 0.2035212516784668 "
    "0.2920137718319893 0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784181118011"
)
FP4_POINTS = fp32("0.00260417 0.0859375 0.20833333 0.29166667 0.4166667 0.583333 0.8333333")
FP4_CODES = [0, 1, 6, 7, 4, 5, 2, 3]


def scaled_blocks(n: int, block: int, dtype: torch.dtype, special: torch.Tensor, largest: int) -> tuple:
    """Values ``[n]``, their ``x / absmax`` and the absmax ``[blocks]``: 2**k of each block, ``|k| <= largest``."""
    unit = torch.rand(n, device="cuda") * 2 - 1
    unit *= 2.0 ** -torch.randint(0, 12, (n,), device="cuda")
    special = special.float().cuda()
    infinity = torch.full_like(special, float("inf"))
    near = torch.cat([special, torch.nextafter(special, infinity), torch.nextafter(special, -infinity)])
    at = torch.randperm(n, device="cuda")[: near.numel() * 8]
    unit[at] = near.repeat(8)[: at.numel()]
    unit = unit.to(dtype).float().clamp(-1, 1)
    unit[::block] = torch.where(unit[::block] < 0, -1.0, 1.0)
    absmax = 2.0 ** torch.randint(-largest, largest + 1, (-(-n // block),), device="cuda").float()
    values = (unit.double() * absmax.double().repeat_interleave(block)[:n]).to(dtype)
    unit = (values.double() / absmax.double().repeat_interleave(block)[:n]).float()  # fp16 may have lost small ones
    return values, unit, absmax


def nibbles(packed: torch.Tensor, n: int) -> torch.Tensor:
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:n].long()


def codes_4bit(unit: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "nf4":
        return torch.searchsorted(NF4_POINTS.cuda(), unit)
    magnitude = torch.searchsorted(FP4_POINTS.cuda(), unit.abs())
    return torch.tensor(FP4_CODES, device="cuda")[magnitude] + 8 * (unit < 0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_four_bit_bytes(kind, dtype, block):
    special = NF4_POINTS if kind == "nf4" else FP4_POINTS
    special = torch.cat([special, -special, torch.tensor([0.0, -0.0, 1e-7, -1e-7])])
    for n in SIZES:
        for offset, target in ((0, 0), (3, 0), (0, 1), (0, 16)):  # of input and output, in elements and bytes
            values, unit, want_absmax = scaled_blocks(n, block, dtype, special, 10)
            a = torch.cat([values.new_zeros(offset), values])[offset:]
            place = torch.full(((n + 1) // 2 + target + 16,), 0xA5, dtype=torch.uint8, device="cuda")
            packed = place[target : target + (n + 1) // 2]
            absmax = torch.full((want_absmax.numel() + 1,), -7.0, device="cuda")
            _native.quantize_4bit(a, packed, absmax[:-1], kind, block)
            assert torch.equal(absmax[:-1], want_absmax)
            assert absmax[-1] == -7
            assert torch.equal(nibbles(packed, n), codes_4bit(unit, kind)), n
            if n % 2:
                assert packed[-1] & 15 == (7 if kind == "nf4" else 0)
            assert (place[:target] == 0xA5).all()
            assert (place[target + packed.numel() :] == 0xA5).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [32, 256, 4096])
def test_four_bit_blocks_without_a_scale(kind, dtype, block):
    """Zeros, the least and the largest magnitudes there are, and blocks with NaN or infinity."""
    a = torch.randn(6 * block).to(dtype)
    a[:block] = torch.tensor([0.0, -0.0]).repeat(block // 2)
    least = torch.finfo(dtype).smallest_normal
    a[block : 2 * block] = torch.tensor([least, -least / 4]).repeat(block // 2)
    a[2 * block : 3 * block] = LARGEST[dtype]
    a[3 * block + 5], a[4 * block + 7], a[5 * block + 11] = float("nan"), float("inf"), float("-inf")
    packed = torch.empty(3 * block, dtype=torch.uint8, device="cuda")
    absmax = torch.empty(6, device="cuda")
    _native.quantize_4bit(a.cuda(), packed, absmax, kind, block)
    assert torch.equal(
        absmax.nan_to_num(-1, posinf=-2), a.float().view(6, block).abs().amax(1).cuda().nan_to_num(-1, posinf=-2)
    )
    codes = nibbles(packed, 6 * block).view(6, block).cpu()
    zero, top, low = (7, 15, 4) if kind == "nf4" else (0, 3, 15)
    assert (codes[0] == 0).all()
    assert torch.equal(codes[1], torch.tensor([top, low]).repeat(block // 2))
    assert (codes[2] == top).all()
    for row, at in ((3, 5), (4, 7), (5, 11)):
        assert codes[row, at] == top
        assert (codes[row] == zero).sum() == block - 1


def maps() -> dict[str, torch.Tensor]:
    even = torch.linspace(-1, 1, 256)
    return {
        "dynamic": torch.tensor(_native.dynamic_map(True)),
        "unsigned": torch.tensor(_native.dynamic_map(False)),
        "even": even,
        "dense": even**5,
        "beyond": even * 3,
        "tiny": even * 1e-8,
        "one place": torch.linspace(0.9, 0.91, 256),
        "repeats": torch.cat([torch.linspace(-1, 0, 100), torch.zeros(56), torch.linspace(0, 1, 100)]),
    }


@pytest.mark.parametrize("name", maps())
@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bit_codes(name, dtype):
    code = maps()[name].cuda()
    middles = (code[1:] + code[:-1]) * 0.5
    special = torch.cat([middles[middles.abs() < 1].cpu(), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    for block in [*BLOCKS, 100, 8192] if name == "dynamic" else (64, 4096, 100):
        for n in SIZES:
            # 2^60 is more than the fast way takes.
            values, unit, want_absmax = scaled_blocks(n, block, dtype, special, 4 if dtype == torch.float16 else 60)
            codes = torch.full((n + 16,), 0xA5, dtype=torch.uint8, device="cuda")
            absmax = torch.full((want_absmax.numel() + 1,), -7.0, device="cuda")
            _native.quantize_blockwise(values, code, codes[:n], absmax[:-1], block)
            assert torch.equal(absmax[:-1], want_absmax)
            assert absmax[-1] == -7
            assert torch.equal(codes[:n].long(), torch.searchsorted(middles, unit)), (block, n)
            assert (codes[n:] == 0xA5).all()


@pytest.mark.parametrize("block", [32, 256, 4096, 100])
def test_eight_bit_offset(block):
    """What is left of scales when their mean is taken off, with an end that is ragged."""
    code = maps()["dynamic"].cuda()
    middles = (code[1:] + code[:-1]) * 0.5
    offset = torch.tensor(0.75, device="cuda")
    for n in SIZES:
        _, unit, _ = scaled_blocks(n, block, torch.float32, middles.cpu(), 0)
        unit = (unit * 4096).round() / 4096  # so that adding the offset is exact
        codes = torch.empty(n, dtype=torch.uint8, device="cuda")
        absmax = torch.empty(-(-n // block), device="cuda")
        _native.quantize_blockwise(unit + offset, code, codes, absmax, block, offset)
        assert (absmax == 1).all()
        assert torch.equal(codes.long(), torch.searchsorted(middles, unit)), n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [32, 4096, 100])
def test_eight_bit_blocks_without_a_scale(dtype, block):
    a = torch.randn(4 * block).to(dtype)
    a[:block] = torch.tensor([0.0, -0.0]).repeat(block // 2)
    a[block + 3], a[2 * block + 5] = float("nan"), float("inf")
    a[3 * block :] = LARGEST[dtype]
    code = maps()["dynamic"].cuda()
    codes = torch.empty(4 * block, dtype=torch.uint8, device="cuda")
    absmax = torch.empty(4, device="cuda")
    _native.quantize_blockwise(a.cuda(), code, codes, absmax, block)
    assert torch.equal(
        absmax.nan_to_num(-1, posinf=-2), a.float().view(4, block).abs().amax(1).cuda().nan_to_num(-1, posinf=-2)
    )
    codes = codes.view(4, block).cpu()
    assert (codes[0] == 127).all()
    assert codes[1, 3] == 255
    assert codes[2, 5] == 255
    assert (codes[2] == 127).sum() == block - 1
    assert (codes[3] == 255).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_double_quantization(block):
    """Its offset is torch's mean to the last bit, and it is three kernels."""
    a = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    packed, plain = F.quantize_4bit(a, blocksize=block, quant_type="nf4")
    # The first of a process brings the map of the statistics.
    F.quantize_4bit(a, blocksize=block, quant_type="nf4", compress_statistics=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        nested_packed, nested = F.quantize_4bit(a, blocksize=block, quant_type="nf4", compress_statistics=True)
        torch.cuda.synchronize()
    # torch clears the semaphores of its mean, now and then: no kernel.
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith("Memset")]
    assert len(kernels) <= 3, kernels
    assert torch.equal(nested_packed, packed)
    assert torch.equal(nested.offset, plain.absmax.mean())
    left = plain.absmax - nested.offset
    whole = left.numel() // 256 * 256
    scale = left[:whole].view(-1, 256).abs().amax(1)
    assert torch.equal(nested.state2.absmax[: whole // 256], scale)
    # No code's value is further from the mark than the nearest's, but for the rounding of x / absmax.
    ratio = (left[:whole].view(-1, 256) / scale[:, None]).flatten()
    code = nested.state2.code
    nearest = (ratio[:, None] - code).abs().amin(1) if whole <= 1 << 16 else None
    if nearest is not None:
        assert ((ratio - code[nested.absmax[:whole].long()]).abs() - nearest).max() <= 2**-22
