"""``torch.ops.bitsandbytes`` of the drop-in: values, what torch checks of an operation, gradients, errors."""

import copy

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import ArgumentError, DtypeError, ShapeError
from halfbyte.integrations._bitsandbytes_ops import type_of_code

F = hb.functional
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def bnb():
    """The operations, made by importing bitsandbytes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if "halfbyte" not in bitsandbytes.__file__:
        pytest.skip("a real bitsandbytes is installed")
    return torch.ops.bitsandbytes


def packed(n, k, dtype, kind, double, device, storage=torch.uint8):
    weight = torch.randn(n, k, dtype=dtype, device=device)
    return F.quantize_4bit(weight, quant_type=kind, compress_statistics=double, quant_storage=storage)


def scales(state):
    if not state.nested:
        return state.absmax, {}
    nested = {"absmax_8bit": state.absmax, "absmax_code": state.state2.code, "absmax_offset": state.offset}
    return state.state2.absmax, nested


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_quantize_and_dequantize(bnb, device, dtype, kind, storage):
    a = torch.randn(7, 33, dtype=dtype, device=device)
    codes, absmax = bnb.quantize_4bit(a, 64, kind, storage)
    expected, state = F.quantize_4bit(a, quant_type=kind, quant_storage=storage)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(absmax, state.absmax)
    decoded = bnb.dequantize_4bit(codes, absmax, 64, kind, a.shape, dtype)
    assert torch.equal(decoded, F.dequantize_4bit(expected, state))
    for place in (torch.empty_like(a), torch.empty(33, 7, dtype=dtype, device=device).t()):
        assert bnb.dequantize_4bit.out(codes, absmax, 64, kind, a.shape, dtype, place) is None
        assert torch.equal(place, decoded)
    if storage is torch.uint8:
        torch.library.opcheck(bnb.quantize_4bit.default, (a, 64, kind, storage))
    torch.library.opcheck(bnb.dequantize_4bit.default, (codes, absmax, 64, kind, a.shape, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_blockwise(bnb, device, dtype):
    a, code = torch.randn(5, 100, dtype=dtype, device=device), F.create_dynamic_map().to(device)
    codes, absmax = bnb.quantize_blockwise(a, code, 64)
    expected, state = F.quantize_blockwise(a, code, blocksize=64)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, state.absmax)
    decoded = bnb.dequantize_blockwise(codes, absmax, code, 64, dtype)
    assert torch.equal(decoded, F.dequantize_blockwise(expected, state))
    place = torch.empty(100, 5, dtype=dtype, device=device).t()
    bnb.dequantize_blockwise.out(codes, absmax, code, 64, dtype, place)
    assert torch.equal(place, decoded)
    torch.library.opcheck(bnb.quantize_blockwise.default, (a, code, 64))
    torch.library.opcheck(bnb.dequantize_blockwise.default, (codes, absmax, code, 64, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_with_gradients(bnb, device, dtype, double, has_bias):
    weight, state = packed(24, 64, dtype, "nf4", double, device)
    absmax, nested = scales(state)
    x = torch.randn(2, 3, 64, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(24, dtype=dtype, device=device, requires_grad=True) if has_bias else None
    twin, twin_bias = copy.deepcopy(x), copy.deepcopy(bias)
    y = bnb.gemm_4bit(x, weight, [24, 64], absmax, 64, "nf4", bias=bias, **nested)
    expected = hb.matmul_4bit(twin, weight, state, bias=twin_bias)
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(x.grad, twin.grad)
    if bias is not None:
        assert torch.equal(bias.grad, twin_bias.grad)
    if dtype is torch.float32:
        torch.library.opcheck(
            bnb.gemm_4bit.default, (x, weight, [24, 64], absmax, 64, "nf4"), kwargs={"bias": bias, **nested}
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_offset_of_half_precision_is_taken_as_it_is(bnb, device, dtype):
    weight, state = packed(24, 64, torch.float32, "nf4", True, device)
    x = torch.randn(2, 64, device=device)
    rounded = state.offset.to(dtype)
    absmax, nested = scales(state)
    results = [
        bnb.gemm_4bit(x, weight, [24, 64], absmax, 64, "nf4", **{**nested, "absmax_offset": offset})
        for offset in (rounded, rounded.float())
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_old_product_knows_the_type_by_its_table(bnb, device, kind):
    weight, state = packed(24, 64, torch.float32, kind, False, device)
    x = torch.randn(1, 1, 64, device=device)
    expected = hb.matmul_4bit(x, weight, state)
    for code in (state.code, state.code.clone(), state.code.to(torch.bfloat16), F.get_4bit_type(kind, device)):
        for _ in range(2):
            y = bnb.gemv_4bit(x, weight, [24, 64], state.absmax, code, 64)
            assert torch.equal(y, expected)
        place = torch.empty_like(y)
        bnb.gemv_4bit.out(x, weight, [24, 64], state.absmax, code, 64, place)
        assert torch.equal(place, expected)
    torch.library.opcheck(bnb.gemv_4bit.default, (x, weight, [24, 64], state.absmax, state.code, 64))


def test_a_table_that_is_written_over_is_looked_at_again(device):
    table = F.get_4bit_type("nf4", device)
    assert type_of_code(table) == "nf4"
    table.copy_(F.get_4bit_type("fp4", device))
    assert type_of_code(table) == "fp4"
    table.zero_()
    for wrong in (table, table[:8]):
        with pytest.raises(ArgumentError, match="code: expected the 16 values"):
            type_of_code(wrong)


def test_errors_name_the_argument(bnb):
    weight, state = packed(24, 64, torch.float32, "nf4", False, "cpu")
    x = torch.randn(2, 64)
    arguments = (weight, [24, 64], state.absmax, 64, "nf4")
    with pytest.raises(ShapeError, match="A: expected shape"):
        bnb.gemm_4bit(x[:, :32], *arguments)
    with pytest.raises(ArgumentError, match="absmax_code, absmax_offset"):
        bnb.gemm_4bit(x, *arguments, absmax_8bit=state.absmax.byte())
    with pytest.raises(DtypeError, match="bias"):
        bnb.gemm_4bit(x, *arguments, bias=torch.zeros(24, dtype=torch.half))
    with pytest.raises(ArgumentError, match="blocksize"):
        bnb.quantize_4bit(x, 48, "nf4", torch.uint8)
    with pytest.raises(ShapeError, match="out: expected shape"):
        bnb.dequantize_4bit.out(weight, state.absmax, 64, "nf4", [24, 64], torch.float32, torch.empty(24, 32))
    with pytest.raises(DtypeError, match="out: expected dtype"):
        place = torch.empty(24, 64, dtype=torch.half)
        bnb.dequantize_4bit.out(weight, state.absmax, 64, "nf4", [24, 64], torch.float32, place)


def test_it_compiles_whole(bnb, device):
    torch.compiler.reset()
    weight, state = packed(24, 64, torch.float32, "nf4", True, device)
    absmax, nested = scales(state)

    def product(x):
        return bnb.gemm_4bit(x, weight, [24, 64], absmax, 64, "nf4", **nested).relu()

    x = torch.randn(3, 64, device=device, requires_grad=True)
    y = torch.compile(product, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, product(x))
    y.sum().backward()
    assert x.grad is not None
