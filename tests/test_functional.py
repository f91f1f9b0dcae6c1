"""halfbyte.functional: accuracy, arguments, layouts, and independence of process-wide settings."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte
from halfbyte import functional as F
from halfbyte._tables import dynamic_values
from halfbyte.errors import ArgumentError, DeviceError, DtypeError, HalfbyteError, ShapeError

BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

# Mean absolute and mean relative error of N(0, 1), by block size: bitsandbytes' own, measured over many draws. What its
# tests allow is the mean and seven standard deviations, which are 0.1 % of it at block 64 and 0.5 % at 4096.
ERRORS = {
    "nf4": (
        [0.067746, 0.072798, 0.076831, 0.080337, 0.083547, 0.086610, 0.089592, 0.092547],
        [0.18973, 0.20334, 0.21524, 0.22611, 0.23608, 0.24537, 0.25416, 0.26247],
    ),
    "fp4": (
        [0.088925, 0.096543, 0.102969, 0.108684, 0.114115, 0.119333, 0.124556, 0.129536],
        [0.24244, 0.26013, 0.27582, 0.28983, 0.30288, 0.31500, 0.32661, 0.33717],
    ),
}


def relative_deviation(block: int) -> float:
    """One standard deviation of the mean error, as a part of it."""
    return 0.001 + 0.004 * BLOCKS.index(block) / 7


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_within_the_limits_of_bitsandbytes(device, quant_type, block, dtype):
    a = torch.randn(1024, 1024, device=device).to(dtype)
    packed, state = F.quantize_4bit(a, blocksize=block, quant_type=quant_type)
    back = F.dequantize_4bit(packed, state)
    assert back.dtype == dtype
    assert back.shape == a.shape
    error = (back.float() - a.float()).abs()
    i = BLOCKS.index(block)
    limit = 1 + 7 * relative_deviation(block)
    assert error.mean() < ERRORS[quant_type][0][i] * limit
    assert (error / (a.float().abs() + 1e-8)).mean() < ERRORS[quant_type][1][i] * limit


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_error_with_nested_statistics(device, quant_type, block):
    a = torch.randn(1024, 1024, device=device)
    packed, state = F.quantize_4bit(a, blocksize=block, quant_type=quant_type, compress_statistics=True)
    plain_packed, plain = F.quantize_4bit(a, blocksize=block, quant_type=quant_type)
    assert torch.equal(packed, plain_packed)
    assert state.absmax.dtype == torch.uint8
    assert state.nested
    error = (F.dequantize_4bit(packed, state) - a).abs()
    assert error.mean() < 0.11
    assert (error / (a.abs() + 1e-8)).mean() < 0.28
    # Nested scales are within an 8-bit step of the plain ones.
    scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert ((scales - plain.absmax).abs() / plain.absmax).max() < 0.02


@pytest.mark.parametrize("block", [64, 256, 4096])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_error_of_8_bit(device, block, signed, nested):
    a = torch.randn(512, 1024, device=device) if signed else torch.rand(512, 1024, device=device)
    code = F.create_dynamic_map(signed).to(device)
    codes, state = F.quantize_blockwise(a, code=code, blocksize=block, nested=nested)
    assert codes.shape == a.shape
    assert codes.dtype == torch.uint8
    error = (F.dequantize_blockwise(codes, state) - a).abs()
    assert error.mean() < 0.011
    assert (error / (a.abs() + 1e-8)).mean() < 0.018 * (1.2 if nested else 1)


def test_8_bit_codes_are_the_nearest_where_values_are_small(device):
    a = torch.randn(4096, device=device) * 1e-5
    a[0] = 1.0
    codes, state = F.quantize_blockwise(a, blocksize=4096)
    table = state.code.double()
    nearest = (a.double()[:, None] - table).abs().min(dim=1).values
    chosen = (a.double() - table[codes.long()]).abs()
    assert worst(chosen, nearest) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 700),
    block=st.sampled_from(BLOCKS),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    nested=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_codes_are_the_nearest_values(n, block, quant_type, dtype, scale, nested, seed):
    a = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    packed, state = F.quantize_4bit(a, blocksize=block, quant_type=quant_type, compress_statistics=nested)
    assert packed.shape == ((n + 1) // 2, 1)
    table = F.get_4bit_type(quant_type, device="cpu").double()
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[:n].long()
    blocks = torch.arange(n) // block
    absmax = torch.zeros(-(-n // block), dtype=torch.float64).scatter_reduce(0, blocks, a.double().abs(), "amax")
    x = a.double() / absmax[blocks].clamp(min=1e-38)
    chosen = (x - table[codes]).abs()
    best = (x[:, None] - table).abs().min(dim=1).values
    # FP4's decision points, as everywhere, are fp32; a value beside one may go either way.
    assert worst(chosen, best) < 1e-6
    scales = state.absmax.double()
    if nested:
        scales = (F.dequantize_blockwise(state.absmax, state.state2) + state.offset).double()
    else:
        assert torch.equal(scales, absmax)
    decoded = (table[codes] * scales[blocks]).to(dtype)
    assert worst(F.dequantize_4bit(packed, state), decoded) <= 2e-3 * absmax.max()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 256, 128), (5, 96, 200), (40, 130, 64), (3, 17, 33), (2, 64, 4096)])
@pytest.mark.parametrize("block", [64, 256])
def test_matmul_against_fp64(device, dtype, nested, shape, block):
    m, n, k = shape
    weight = torch.randn(n, k, device=device).to(dtype)
    packed, state = F.quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=nested)
    x = torch.randn(m, k, device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype)
    fp32_state = halfbyte.QuantState(**{**vars_of(state), "dtype": torch.float32})
    dense = F.dequantize_4bit(packed, fp32_state).double()
    exact = x.double() @ dense.t() + bias.double()
    result = halfbyte.matmul_4bit(x, packed, state, bias=bias)
    assert result.dtype == dtype
    size = (x.double().abs() @ dense.abs().t() + bias.double().abs()).max()
    # Sums in fp32, one rounding to dtype; above 16 rows CUDA rounds the weight to dtype as well.
    eps = {torch.float32: 3e-7, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}[dtype]
    assert worst(result, exact) < eps * size.item()


def vars_of(state):
    return {name: value for name, value in vars(state).items() if name != "nested"}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [128, 256, 512, 1024, 2048])
def test_gemv_error_is_that_of_bitsandbytes_tests(device, dtype, dim):
    errors = []
    for _ in range(10):
        a = torch.randn(1, dim, device=device).to(dtype)
        b = (torch.randn(dim * 4, dim, device=device) / dim**0.5).to(dtype)
        packed, state = F.quantize_4bit(b, quant_type="nf4")
        result = F.gemv_4bit(a, packed.t(), state=state)
        reference = torch.nn.functional.linear(a, F.dequantize_4bit(packed, state))
        errors.append(((result.float() - reference.float()).abs() / dim**0.5).mean().item())
    limits = {
        torch.float32: (3.4e-8, 2.4e-8),
        torch.float16: (9.6e-5, 3.8e-5),
        torch.bfloat16: (8.3e-4, 2.1e-4),
    }[dtype]
    assert sum(errors) / len(errors) < limits[dim > 512]


def test_matmul_of_the_identity_returns_the_activations(device):
    packed, state = F.quantize_4bit(torch.eye(128, device=device), quant_type="nf4")
    x = torch.randn(7, 128, device=device)
    torch.testing.assert_close(halfbyte.matmul_4bit(x, packed, state), x)


def test_fp32_products_are_fp32_whatever_the_process_allows(device):
    weight, x = torch.randn(256, 1024, device=device), torch.randn(64, 1024, device=device)
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    dense = F.dequantize_4bit(packed, state).double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        result = halfbyte.matmul_4bit(x, packed, state)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(halfbyte.matmul_4bit(x, packed, state).sum(), x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert worst(result, x.double() @ dense.t()) < 2e-4
    assert worst(gradient, dense.sum(0).expand_as(x)) < 2e-4


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 64, 65, 1001])
def test_storage_is_a_view_of_the_same_bytes(device, storage, n):
    a = torch.randn(n, device=device)
    plain, state = F.quantize_4bit(a, quant_type="nf4")
    packed, stored_state = F.quantize_4bit(a, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    assert packed.shape[1] == 1
    stored = packed.view(-1).view(torch.uint8)
    used = (n + 1) // 2
    assert used <= stored.numel() < used + storage.itemsize
    assert torch.equal(stored[:used], plain.flatten())
    assert not stored[used:].any()
    assert torch.equal(F.dequantize_4bit(packed, stored_state), F.dequantize_4bit(plain, state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_default_dtype_does_not_matter(device, dtype):
    a = torch.randn(300, 64, device=device)
    packed, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    stored = state.as_dict(packed=True)
    torch.set_default_dtype(dtype)
    packed2, state2 = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, packed2)
    assert {k: v.dtype for k, v in state2.as_dict(packed=True).items()} == {k: v.dtype for k, v in stored.items()}
    for key, value in state2.as_dict(packed=True).items():
        assert torch.equal(value, stored[key]), key
    read = halfbyte.QuantState.from_dict(stored, device)
    assert read.offset.dtype == torch.float32
    assert read.offset.item() == state.offset.item()
    assert torch.equal(F.dequantize_4bit(packed, read), F.dequantize_4bit(packed, state))
    assert F.create_dynamic_map().dtype == torch.float32
    assert F.get_4bit_type("nf4", device=device).dtype == torch.float32


def test_default_device_does_not_matter():
    a = torch.randn(300, 64)
    packed, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    with torch.device("meta"):
        packed2, state2 = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
        stored = state2.as_dict(packed=True)
        read = halfbyte.QuantState.from_dict(stored, "cpu")
        product = halfbyte.matmul_4bit(a, packed2, read)
        codes, _ = F.quantize_blockwise(a)
        table = F.create_dynamic_map(True, 5, 6)
    assert {t.device.type for t in (packed2, product, codes, table, *stored.values())} == {"cpu"}
    assert torch.equal(packed, packed2)
    assert torch.equal(product, halfbyte.matmul_4bit(a, packed, state))


def layouts(a):
    rows, columns = a.shape
    wide = torch.zeros(rows, 2 * columns, dtype=a.dtype, device=a.device)
    wide[:, ::2] = a
    return {
        "transposed": a.t().contiguous().t(),
        "every second": wide[:, ::2],
        "shifted": torch.cat([a.flatten()[:1], a.flatten()])[1:].view_as(a),
    }


@pytest.mark.parametrize("layout", ["transposed", "every second", "shifted"])
def test_any_layout(device, layout):
    a = torch.randn(100, 96, device=device)
    other = layouts(a)[layout]
    packed, state = F.quantize_4bit(a, quant_type="nf4")
    packed2, state2 = F.quantize_4bit(other, quant_type="nf4")
    assert torch.equal(packed, packed2)
    assert state == state2
    codes, state8 = F.quantize_blockwise(a, blocksize=64)
    codes2, state82 = F.quantize_blockwise(other, blocksize=64)
    assert torch.equal(codes, codes2)
    assert state8 == state82
    assert torch.equal(
        F.dequantize_blockwise(codes.t(), state8), F.dequantize_blockwise(codes.t().contiguous(), state8)
    )
    assert torch.equal(halfbyte.matmul_4bit(other, packed, state), halfbyte.matmul_4bit(a, packed, state))
    spread = torch.stack([packed.flatten(), packed.flatten()], 1)[:, :1]
    assert not spread.is_contiguous()
    assert torch.equal(F.dequantize_4bit(spread, state), F.dequantize_4bit(packed, state))
    assert torch.equal(halfbyte.matmul_4bit(a, spread, state), halfbyte.matmul_4bit(a, packed, state))


def test_results_go_where_they_are_wanted(device):
    a = torch.randn(30, 64, device=device)
    packed, state = F.quantize_4bit(a, quant_type="nf4")
    out, absmax = torch.empty_like(packed), torch.empty_like(state.absmax)
    result, state2 = F.quantize_4bit(a, absmax, out, quant_type="nf4")
    assert result is out
    assert state2.absmax is absmax
    assert torch.equal(out, packed)
    assert torch.equal(absmax, state.absmax)
    _, nested = F.quantize_4bit(a, absmax.zero_(), quant_type="nf4", compress_statistics=True)
    assert torch.equal(absmax, state.absmax)
    assert nested.absmax.dtype == torch.uint8

    dense = F.dequantize_4bit(packed, state)
    for place in (torch.empty_like(a), torch.empty(64, 30, device=device).t(), torch.empty(1920, device=device)):
        assert F.dequantize_4bit(packed, state, out=place) is place
        assert torch.equal(place.reshape(30, 64), dense)
    half = torch.empty(30, 64, dtype=torch.float16, device=device)
    assert torch.equal(F.dequantize_4bit(packed, absmax=state.absmax, out=half, quant_type="nf4"), dense.half())

    product = halfbyte.matmul_4bit(a, packed, state)
    for place in (torch.empty_like(product), torch.empty(30, 30, device=device).t()):
        assert halfbyte.matmul_4bit(a, packed, state, out=place) is place
        assert torch.equal(place, product)
    one = torch.empty(1, 30, device=device)
    assert F.gemv_4bit(a[:1], packed, out=one, state=state) is one
    torch.testing.assert_close(one, product[:1])

    codes, state8 = F.quantize_blockwise(a)
    codes2, absmax8 = torch.empty_like(codes), torch.empty_like(state8.absmax)
    assert F.quantize_blockwise(a, None, absmax8, codes2)[0] is codes2
    assert torch.equal(codes, codes2)
    assert torch.equal(absmax8, state8.absmax)
    place = torch.empty_like(a)
    assert F.dequantize_blockwise(codes, state8, out=place) is place
    assert torch.equal(place, F.dequantize_blockwise(codes, state8))
    assert torch.equal(place, F.dequantize_blockwise(codes, absmax=absmax8))


def test_packed_transposes_decode_transposed(device):
    a = torch.randn(30, 64, device=device)
    packed, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())
    x = torch.randn(2, 64, device=device)
    assert torch.equal(halfbyte.matmul_4bit(x, packed.t(), state), halfbyte.matmul_4bit(x, packed, state))
    tiny, tiny_state = F.quantize_4bit(torch.ones(1, 2, device=device))
    assert F.dequantize_4bit(tiny, tiny_state).shape == (1, 2)


def test_matmul_by_a_weight_that_was_quantized_transposed(device):
    weight = torch.randn(64, 48, device=device)  # [K, N]
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    x = torch.randn(5, 64, device=device, requires_grad=True)
    bias = torch.randn(48, device=device)
    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        product = halfbyte.matmul_4bit(x, packed, state, bias=bias)
    dense = F.dequantize_4bit(packed, state)
    torch.testing.assert_close(product, x @ dense + bias)
    (gradient,) = torch.autograd.grad(product.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(product) @ dense.t())


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0)])
def test_empty_tensors(device, shape):
    a = torch.empty(shape, device=device)
    for nested in (False, True):
        packed, state = F.quantize_4bit(a, compress_statistics=nested)
        assert packed.shape == (0, 1)
        assert F.dequantize_4bit(packed, state).shape == shape
    codes, state = F.quantize_blockwise(a)
    assert codes.shape == shape
    assert F.dequantize_blockwise(codes, state).shape == shape


def test_matmul_with_no_rows_or_no_columns(device):
    packed, state = F.quantize_4bit(torch.randn(8, 64, device=device))
    assert halfbyte.matmul_4bit(torch.empty(0, 64, device=device), packed, state).shape == (0, 8)
    assert halfbyte.matmul_4bit(torch.empty(2, 0, 64, device=device), packed, state).shape == (2, 0, 8)
    packed, state = F.quantize_4bit(torch.empty(8, 0, device=device))
    bias = torch.randn(8, device=device)
    assert torch.equal(
        halfbyte.matmul_4bit(torch.empty(2, 0, device=device), packed, state, bias=bias), bias.expand(2, 8)
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_special_values(device, quant_type):
    a = torch.randn(5, 64, device=device)
    a[0] = 0
    a[1, 3] = float("nan")
    a[2, 3] = float("inf")
    a[3] = 1e-42
    packed, state = F.quantize_4bit(a, quant_type=quant_type)
    back = F.dequantize_4bit(packed, state)
    assert not back[0].any()
    assert back[1].isnan().all()
    assert not back[2].isfinite().all()
    assert back[3].abs().max() < 2e-38
    assert back[4].isfinite().all()


def test_bias_of_another_dtype_is_cast(device):
    packed, state = F.quantize_4bit(torch.randn(32, 64, device=device, dtype=torch.float16), quant_type="nf4")
    x, bias = torch.randn(2, 64, device=device, dtype=torch.float16), torch.randn(32, device=device)
    assert torch.equal(
        halfbyte.matmul_4bit(x, packed, state, bias=bias), halfbyte.matmul_4bit(x, packed, state, bias=bias.half())
    )


def test_an_offset_of_another_dtype_is_cast(device):
    packed, state = F.quantize_4bit(torch.randn(32, 64, device=device), quant_type="nf4", compress_statistics=True)
    x = torch.randn(2, 64, device=device)
    state.offset = state.offset.half()
    rounded = halfbyte.matmul_4bit(x, packed, state)
    state.offset = state.offset.float()
    assert torch.equal(rounded, halfbyte.matmul_4bit(x, packed, state))


def test_a_state_whose_nested_part_was_expanded_by_its_user(device):
    packed, state = F.quantize_4bit(torch.randn(32, 64, device=device), quant_type="nf4", compress_statistics=True)
    x = torch.randn(2, 64, device=device)
    before, dense = halfbyte.matmul_4bit(x, packed, state), F.dequantize_4bit(packed, state)
    # vLLM does this when it loads a model.
    state.absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested = False
    torch.testing.assert_close(halfbyte.matmul_4bit(x, packed, state), before)
    torch.testing.assert_close(F.dequantize_4bit(packed, state), dense)
    state.state2 = state.offset = None
    torch.testing.assert_close(halfbyte.matmul_4bit(x, packed, state), before)


def test_autocast_casts_as_linear_does(device):
    packed, state = F.quantize_4bit(torch.randn(32, 64, device=device), quant_type="nf4")
    x, bias = torch.randn(3, 64, device=device), torch.randn(32, device=device)
    expected = halfbyte.matmul_4bit(x.bfloat16(), packed, state, bias=bias.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        result = halfbyte.matmul_4bit(x, packed, state, bias=bias)
        codes, _ = F.quantize_4bit(x)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)
    assert torch.equal(codes, F.quantize_4bit(x)[0])


def test_quantizing_what_requires_a_gradient(device):
    a = torch.randn(4, 64, device=device, requires_grad=True)
    for storage in (torch.uint8, torch.bfloat16):
        packed, state = F.quantize_4bit(a, compress_statistics=True, quant_storage=storage)
        assert not packed.requires_grad
        assert not state.offset.requires_grad
        assert not F.dequantize_4bit(packed, state).requires_grad
    assert not F.quantize_blockwise(a)[1].absmax.requires_grad


def test_tables_made_in_inference_mode_serve_training(device):
    from halfbyte import _tables

    _tables._cache.clear()
    with torch.inference_mode():
        F.quantize_4bit(torch.randn(4, 64, device=device), compress_statistics=True)
    packed, state = F.quantize_4bit(torch.randn(4, 64, device=device), compress_statistics=True)
    x = torch.randn(2, 64, device=device, requires_grad=True)
    halfbyte.matmul_4bit(x, packed, state).sum().backward()
    assert x.grad is not None


def test_dynamic_maps():
    for signed, md5 in ((True, "82b0fdea5e1a26dc1f5214bbab7360f9"), (False, "511c56042772457f7c057b8673e265b2")):
        table = F.create_dynamic_map(signed)
        assert hashlib.md5(table.numpy().tobytes()).hexdigest() == md5
        computed = torch.tensor(dynamic_values(signed), dtype=torch.float32)
        torch.testing.assert_close(computed, table, rtol=2e-7, atol=0)
    small = F.create_dynamic_map(True, 3, 4)
    assert small.numel() == 256
    assert small.unique().numel() == 16
    for bad in ((False, 3, 8), (True, 7, 9), (True, 0, 8)):
        with pytest.raises(ArgumentError, match=r"_bits"):
            F.create_dynamic_map(*bad)


def test_4bit_types(device):
    for name in ("nf4", "fp4", "af4", "int4"):
        table = F.get_4bit_type(name, device=device)
        assert table.shape == (16,)
        assert table.abs().max() == 1
        table.zero_()  # the caller's own
        assert F.get_4bit_type(name, device=device).abs().max() == 1
    with pytest.raises(ArgumentError, match="quant_type"):
        F.get_4bit_type("nf5", device=device)
    with pytest.raises(ArgumentError, match="blocksize"):
        F.get_4bit_type("af4", device=device, blocksize=128)


def good():
    a = torch.randn(32, 64)
    packed, state = F.quantize_4bit(a, quant_type="nf4")
    codes, state8 = F.quantize_blockwise(a)
    return a, packed, state, codes, state8


REFUSED = {
    "A": [
        (DtypeError, lambda a, p, s, c, s8: F.quantize_4bit(a.double())),
        (DtypeError, lambda a, p, s, c, s8: F.quantize_4bit(a.long())),
        (DtypeError, lambda a, p, s, c, s8: F.quantize_4bit([1.0, 2.0])),
        (DtypeError, lambda a, p, s, c, s8: F.quantize_blockwise(a.double())),
        (DtypeError, lambda a, p, s, c, s8: F.dequantize_blockwise(a, s8)),
        (DtypeError, lambda a, p, s, c, s8: F.dequantize_4bit(p.long(), s)),
        (DtypeError, lambda a, p, s, c, s8: halfbyte.matmul_4bit(a.double(), p, s)),
        (ShapeError, lambda a, p, s, c, s8: halfbyte.matmul_4bit(a[:, :63], p, s)),
        (ShapeError, lambda a, p, s, c, s8: halfbyte.matmul_4bit(a[0, 0], p, s)),
    ],
    "blocksize": [
        (ArgumentError, lambda a, p, s, c, s8: F.quantize_4bit(a, blocksize=48)),
        (ArgumentError, lambda a, p, s, c, s8: F.quantize_4bit(a, blocksize=0)),
        (ArgumentError, lambda a, p, s, c, s8: F.quantize_4bit(a, blocksize=8192)),
        (ArgumentError, lambda a, p, s, c, s8: F.quantize_blockwise(a, blocksize=0)),
        (ArgumentError, lambda a, p, s, c, s8: F.dequantize_4bit(p, absmax=s.absmax, out=a, blocksize=100)),
    ],
    "quant_type": [
        (ArgumentError, lambda a, p, s, c, s8: F.quantize_4bit(a, quant_type="int4")),
        (ArgumentError, lambda a, p, s, c, s8: F.dequantize_4bit(p, absmax=s.absmax, out=a, quant_type="nf3")),
    ],
    "quant_storage": [(DtypeError, lambda a, p, s, c, s8: F.quantize_4bit(a, quant_storage=torch.int64))],
    "absmax": [
        (ArgumentError, lambda a, p, s, c, s8: F.dequantize_4bit(p)),
        (ArgumentError, lambda a, p, s, c, s8: F.dequantize_blockwise(c)),
        (ShapeError, lambda a, p, s, c, s8: F.quantize_4bit(a, absmax=s.absmax[:-1])),
        (DtypeError, lambda a, p, s, c, s8: F.quantize_4bit(a, absmax=s.absmax.double())),
        (DtypeError, lambda a, p, s, c, s8: F.quantize_4bit(a, absmax=[0.0])),
        (DeviceError, lambda a, p, s, c, s8: F.quantize_4bit(a, absmax=s.absmax.to("meta"))),
        (ShapeError, lambda a, p, s, c, s8: F.dequantize_4bit(p, absmax=s.absmax[:-1], out=a, quant_type="nf4")),
        (DtypeError, lambda a, p, s, c, s8: F.dequantize_4bit(p, absmax=s.absmax.half(), out=a, quant_type="nf4")),
        (ShapeError, lambda a, p, s, c, s8: F.dequantize_blockwise(c, absmax=s8.absmax[:0])),
    ],
    "out": [
        (ShapeError, lambda a, p, s, c, s8: F.quantize_4bit(a, out=p[:-1])),
        (ShapeError, lambda a, p, s, c, s8: F.quantize_4bit(a, out=p.repeat(1, 2)[:, :1])),
        (DtypeError, lambda a, p, s, c, s8: F.quantize_4bit(a, out=p.long())),
        (ShapeError, lambda a, p, s, c, s8: F.dequantize_4bit(p, s, out=a[:-1])),
        (DtypeError, lambda a, p, s, c, s8: F.dequantize_4bit(p, s, out=a.double())),
        (ShapeError, lambda a, p, s, c, s8: halfbyte.matmul_4bit(a, p, s, out=a)),
        (DtypeError, lambda a, p, s, c, s8: halfbyte.matmul_4bit(a, p, s, out=torch.empty(32, 32).double())),
        (ShapeError, lambda a, p, s, c, s8: F.quantize_blockwise(a, out=c[:-1])),
        (ShapeError, lambda a, p, s, c, s8: F.dequantize_blockwise(c, s8, out=a[:-1])),
    ],
    "packed": [
        (ShapeError, lambda a, p, s, c, s8: F.dequantize_4bit(p[:-1], s)),
        (ShapeError, lambda a, p, s, c, s8: halfbyte.matmul_4bit(a, p[:-1], s)),
    ],
    "bias": [(ShapeError, lambda a, p, s, c, s8: halfbyte.matmul_4bit(a, p, s, bias=torch.ones(31)))],
    "code": [
        (ShapeError, lambda a, p, s, c, s8: F.quantize_blockwise(a, code=torch.ones(16))),
        (DtypeError, lambda a, p, s, c, s8: F.quantize_blockwise(a, code=torch.arange(256))),
    ],
    "quant_state": [
        (ArgumentError, lambda a, p, s, c, s8: halfbyte.matmul_4bit(a, p, s8)),
        (ArgumentError, lambda a, p, s, c, s8: F.dequantize_4bit(p, s8)),
    ],
    "state": [(ArgumentError, lambda a, p, s, c, s8: F.gemv_4bit(a, p))],
}


@pytest.mark.parametrize(
    ("name", "error", "call"),
    [
        pytest.param(name, error, call, id=f"{name}-{i}")
        for name, calls in REFUSED.items()
        for i, (error, call) in enumerate(calls)
    ],
)
def test_bad_arguments_are_refused_by_name(name, error, call):
    with pytest.raises(error, match=name) as caught:
        call(*good())
    assert isinstance(caught.value, HalfbyteError)


def test_a_k_that_would_fit_the_sizes_but_is_wrong_is_refused():
    # [1, 64] has as many blocks and as many bytes as [1, 63] needs; only the shape says no.
    packed, state = F.quantize_4bit(torch.randn(1, 64))
    with pytest.raises(ShapeError, match="A"):
        halfbyte.matmul_4bit(torch.randn(2, 63), packed, state)


def test_nothing_is_written_when_a_call_is_refused():
    a, packed, state, _, _ = good()
    out = torch.full((32, 64), 7.0)
    state.absmax = state.absmax[:-1]
    with pytest.raises(ShapeError):
        F.dequantize_4bit(packed, state, out=out)
    with pytest.raises(ShapeError):
        halfbyte.matmul_4bit(a, packed, state, out=out[:, :32].contiguous())
    assert (out == 7).all()


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused():
    packed, state = F.quantize_4bit(torch.randn(32, 64, device="cuda"))
    with pytest.raises(DeviceError):
        halfbyte.matmul_4bit(torch.randn(2, 64), packed, state)
    with pytest.raises(DeviceError):
        F.dequantize_4bit(packed.cpu(), state)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing_but_time(threads):
    a = torch.randn(700, 1024)
    x = torch.randn(3, 1024)
    packed, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    dense, product = F.dequantize_4bit(packed, state), halfbyte.matmul_4bit(x, packed, state)
    torch.set_num_threads(threads)
    packed2, state2 = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, packed2)
    assert torch.equal(state.absmax, state2.absmax)
    assert torch.equal(F.dequantize_4bit(packed, state), dense)
    torch.testing.assert_close(halfbyte.matmul_4bit(x, packed, state), product)


def test_states_read_like_the_old_list():
    a = torch.randn(8, 64)
    _, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    absmax, shape, dtype, blocksize, nested, quant_type = (state[i] for i in range(6))
    assert absmax is state.absmax
    assert (shape, dtype, blocksize, quant_type) == ((8, 64), torch.float32, 64, "nf4")
    assert nested == [state.offset, state.state2]
    assert F.quantize_4bit(a)[1][4] is None
    with pytest.raises(IndexError):
        state[6]
