"""matmul_4bit_group: several weights, one input, the results of one at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte
from halfbyte import _native, matmul_4bit_group
from halfbyte import functional as F
from halfbyte.errors import ArgumentError, DtypeError, ShapeError

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def weights(device, rows=(64, 32, 48), k=64, nested=False, dtype=torch.float32, kind="nf4", block=64, **more):
    return [
        F.quantize_4bit(
            torch.randn(n, k, device=device).to(dtype),
            quant_type=kind,
            blocksize=block,
            compress_statistics=nested,
            **more,
        )
        for n in rows
    ]


def singly(x, some, biases=None):
    biases = [None] * len(some) if biases is None else biases
    return [halfbyte.matmul_4bit(x, *weight, bias=bias) for weight, bias in zip(some, biases, strict=True)]


def counting(monkeypatch):
    calls = []
    native = _native.matmul_4bit_group

    class Counted:
        def __getattr__(self, name):
            return getattr(_native, name)

        def matmul_4bit_group(self, x, pieces, *rest):
            calls.append(len(pieces))
            return native(x, pieces, *rest)

    from halfbyte import _grouped

    monkeypatch.setattr(_grouped, "_native", Counted())
    return calls


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 90), min_size=1, max_size=10),
    k=st.sampled_from([1, 7, 64, 77, 128, 320]),
    batch=st.sampled_from([(), (1,), (3,), (2, 3), (40,), (0,)]),
    block=st.sampled_from([32, 64, 256]),
    kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 3),
)
def test_is_each_product_for_itself(rows, k, batch, block, kind, nested, dtype, seed):
    torch.manual_seed(seed)
    some = weights("cpu", rows, k, nested, kind=kind, block=block)
    biases = [torch.randn(n).to(dtype) if i % 2 else None for i, n in enumerate(rows)]
    x = torch.randn(*batch, k).to(dtype)
    got = matmul_4bit_group(x, some, biases)
    assert all(torch.equal(a, b) for a, b in zip(got, singly(x, some, biases), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
def test_on_the_gpu(dtype, nested):
    for rows, k in (((33, 17), 320), ((4096, 1024, 1024), 4096), ((300,) * 9, 64), ((20, 3), 77)):
        some = weights("cuda", rows, k, nested)
        biases = [torch.randn(n, device="cuda").to(dtype) if i else None for i, n in enumerate(rows)]
        for m in (1, 5, 16, 33, 100):
            x = torch.randn(m, k, device="cuda").to(dtype)
            for got, (packed, state), bias in zip(matmul_4bit_group(x, some, biases), some, biases, strict=True):
                state.dtype = torch.float32
                dense = F.dequantize_4bit(packed, state).double()
                want = x.double() @ dense.t() + (0 if bias is None else bias.double())
                reach = x.double().abs() @ dense.abs().t()
                eps = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
                assert ((got - want).abs() <= eps * (reach + want.abs())).all()
            again = matmul_4bit_group(x, some, biases)
            assert all(torch.equal(a, b) for a, b in zip(matmul_4bit_group(x, some, biases), again, strict=True))


def test_one_call_of_the_core_for_eight_weights(monkeypatch):
    calls = counting(monkeypatch)
    some = weights("cpu", (16,) * 11)
    assert len(matmul_4bit_group(torch.randn(2, 64), some)) == 11
    assert calls == [8, 3]


def test_weights_that_differ_are_multiplied_one_by_one(monkeypatch):
    calls = counting(monkeypatch)
    x = torch.randn(3, 64)
    for other in ({"kind": "fp4"}, {"block": 128}, {"nested": True}):
        some = weights("cpu", (16, 8)) + weights("cpu", (24,), **other)
        assert all(torch.equal(a, b) for a, b in zip(matmul_4bit_group(x, some), singly(x, some), strict=True))
    assert not calls
    assert matmul_4bit_group(x, []) == []


def test_layouts_storage_and_other_libraries():
    some = weights("cpu", nested=True, quant_storage=torch.bfloat16)
    x = torch.randn(64, 6).t()
    want = singly(x, some)
    assert all(torch.equal(a, b) for a, b in zip(matmul_4bit_group(x, some), want, strict=True))
    arrays = matmul_4bit_group(x.contiguous().numpy(), some)
    assert all((a == b.numpy()).all() for a, b in zip(arrays, want, strict=True))
    each = matmul_4bit_group(x, some)
    assert len({y.untyped_storage().data_ptr() for y in each}) == 3


def test_autocast(device):
    some = weights(device)
    x = torch.randn(2, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = matmul_4bit_group(x, some)
    assert all(y.dtype == torch.bfloat16 for y in got)


def test_gradients(device):
    some = weights(device, nested=True)
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    biases = [torch.randn(n, device=device, requires_grad=n != 32) for n in (64, 32, 48)]
    upstream = [torch.randn(2, 3, n, device=device) for n in (64, 32, 48)]

    def gradients(products):
        total = sum((a * b).sum() for a, b in zip(products, upstream, strict=True))
        return torch.autograd.grad(total, (x, biases[0], biases[2]))

    for a, b in zip(gradients(matmul_4bit_group(x, some, biases)), gradients(singly(x, some, biases)), strict=True):
        torch.testing.assert_close(a, b)
    # One of the products alone.
    (some_grad,) = torch.autograd.grad(matmul_4bit_group(x, some)[1].sum(), x)
    (want,) = torch.autograd.grad(singly(x, some)[1].sum(), x)
    torch.testing.assert_close(some_grad, want)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device, nested, grad):
    some = weights(device, nested=nested)
    states = [state for _, state in some]
    inner = [t for s in states for t in (s.state2.absmax, s.state2.code, s.offset)] if nested else []
    x = torch.randn(2, 64, device=device, requires_grad=grad)
    biases = [torch.randn(64, device=device), torch.empty(0, device=device), torch.randn(48, device=device)]
    rows = [64, 32, 48]
    packed, absmax = [p for p, _ in some], [s.absmax for s in states]
    for bias in ([], biases):
        torch.library.opcheck(
            torch.ops.halfbyte.matmul_4bit_group.default,
            (x, packed, rows, absmax, 64, "nf4", bias, inner, 256),
        )


def test_compiles_whole(device):
    some = weights(device, nested=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def products(x):
        return matmul_4bit_group(x * 2, some)

    x = torch.randn(2, 64, device=device)
    assert all(torch.equal(a, b) for a, b in zip(products(x), singly(x * 2, some), strict=True))


def test_says_what_is_wrong():
    some = weights("cpu")
    with pytest.raises(ArgumentError, match="biases"):
        matmul_4bit_group(torch.randn(2, 64), some, [None])
    with pytest.raises(ShapeError, match="A"):
        matmul_4bit_group(torch.randn(2, 65), some)
    with pytest.raises(DtypeError, match="A"):
        matmul_4bit_group(torch.randn(2, 64, dtype=torch.float64), some)
    with pytest.raises(ShapeError, match="bias"):
        matmul_4bit_group(torch.randn(2, 64), some, [torch.randn(3), None, None])
    with pytest.raises(ShapeError, match=r"weights\[1\]"):
        matmul_4bit_group(torch.randn(2, 64), [some[0], (some[1][0][:5], some[1][1])])
