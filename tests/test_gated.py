"""matmul_4bit_gated: a product and its gate, in one launch or in two."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte
from halfbyte import _native, matmul_4bit_gated
from halfbyte import functional as F
from halfbyte.errors import ArgumentError, DtypeError, ShapeError

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
GATES = ["silu", "gelu_tanh"]


def weight(device, n, k, nested=False, kind="nf4", block=64):
    dense = torch.randn(2 * n, k, device=device) * k**-0.5
    return F.quantize_4bit(dense, quant_type=kind, blocksize=block, compress_statistics=nested)


def gated(a, gate):
    return torch.nn.functional.silu(a) if gate == "silu" else torch.nn.functional.gelu(a, approximate="tanh")


def apart(x, packed, state, gate, bias=None):
    """By torch, from the product."""
    a, b = halfbyte.matmul_4bit(x, packed, state, bias=bias).chunk(2, -1)
    return gated(a, gate) * b


def exact(x, packed, state, gate, bias=None):
    """The result in fp64, and how far from it the roundings of sums and of the result may lead."""
    dense = F.dequantize_4bit(packed, state).double()
    product = x.double() @ dense.t() + (0 if bias is None else bias.double())
    reach = x.double().abs() @ dense.abs().t() + (0 if bias is None else bias.double().abs())
    a, b = product.chunk(2, -1)
    by = gated(a, gate)
    # Neither gate is steeper than 1.13.
    slack = 1.13 * reach.chunk(2, -1)[0] * b.abs() + by.abs() * reach.chunk(2, -1)[1]
    return by * b, slack


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 90),
    k=st.sampled_from([1, 7, 64, 77, 320]),
    batch=st.sampled_from([(), (1,), (3,), (2, 3), (40,), (0,)]),
    block=st.sampled_from([32, 64, 256]),
    kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    biased=st.booleans(),
    gate=st.sampled_from(GATES),
    dtype=st.sampled_from(FLOATS),
)
def test_is_the_product_and_then_the_gate(n, k, batch, block, kind, nested, biased, gate, dtype):
    packed, state = weight("cpu", n, k, nested, kind, block)
    x = torch.randn(*batch, k).to(dtype)
    bias = torch.randn(2 * n).to(dtype) if biased else None
    got = matmul_4bit_gated(x, packed, state, gate, bias)
    assert got.shape == (*batch, n)
    assert torch.equal(got, apart(x, packed, state, gate, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_on_the_gpu(dtype, nested, gate):
    torch.manual_seed(3)
    eps = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}[dtype]
    for n, k in ((14336, 4096), (40, 8192), (300, 1088), (16, 64), (17, 320), (9, 128), (33, 77), (4096, 64)):
        packed, state = weight("cuda", n, k, nested)
        bias = torch.randn(2 * n, device="cuda").to(dtype) if n % 2 else None
        for m in (1, 3, 8, 9, 33, 200):
            x = torch.randn(m, k, device="cuda").to(dtype)
            got = matmul_4bit_gated(x, packed, state, gate, bias)
            want, slack = exact(x, packed, state, gate, bias)
            assert ((got - want).abs() <= eps * (slack + want.abs())).all(), (n, k, m)
            # Fewer roundings than with a product in memory; of many numbers, so that it shows.
            error, other = ((y - want).norm() for y in (got, apart(x, packed, state, gate, bias)))
            assert error <= 1.01 * other or m * n < 10_000, (n, k, m)
            assert torch.equal(matmul_4bit_gated(x, packed, state, gate, bias), got)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [8, 9, 4096, 4100])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gate_alone(dtype, n):
    a = torch.randn(37, 2 * n + 3, device="cuda").to(dtype)[:, : 2 * n].contiguous()
    # What saturates, either way, and what is nothing.
    a[0, : min(n, 6)] = torch.tensor([-torch.inf, torch.inf, -1e4, 1e4, 0.0, torch.nan])[: min(n, 6)]
    left, right = a.double().chunk(2, -1)
    for gate in GATES:
        out = torch.empty(37, n, dtype=dtype, device="cuda")
        _native.gate(a, out, gate)
        want = gated(left, gate) * right
        eps = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}[dtype]
        finite = left.isfinite() & want.to(dtype).isfinite()
        assert ((out - want).abs() <= eps * want.abs() + 1e-7)[finite].all()
        assert out[0, 1].isinf() and out[0, 5].isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
def test_settled_weights_give_the_same(nested):
    """One product after another, each reading what the one before has written, in a graph and outside."""
    torch.manual_seed(5)
    n, k = 2048, 1024
    ups = [weight("cuda", n, k, nested) for _ in range(4)]
    downs = [
        F.quantize_4bit(torch.randn(k, n, device="cuda") * n**-0.5, quant_type="nf4", compress_statistics=nested)
        for _ in ups
    ]
    for m in (1, 8, 16):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)

        def chain(h=x):
            for up, down in zip(ups, downs, strict=True):
                h = halfbyte.matmul_4bit(matmul_4bit_gated(h, *up), *down)
            return h

        expected = chain()
        for packed, _ in ups + downs:
            _native.settle_4bit(packed.data_ptr(), True)
        try:
            assert torch.equal(chain(), expected)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = chain()
            for _ in range(50):
                again.zero_()
                graph.replay()
                assert torch.equal(again, expected)
        finally:
            for packed, _ in ups + downs:
                _native.settle_4bit(packed.data_ptr(), False)


@pytest.mark.parametrize("gate", GATES)
def test_gradients(gate, device):
    packed, state = weight(device, 24, 64)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    bias = torch.randn(48, device=device, requires_grad=True)
    upstream = torch.randn(5, 24, device=device)
    got = torch.autograd.grad(matmul_4bit_gated(x, packed, state, gate, bias), (x, bias), upstream)
    want = torch.autograd.grad(apart(x, packed, state, gate, bias), (x, bias), upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiles(device):
    packed, state = weight(device, 24, 64)
    x = torch.randn(5, 64, device=device, dtype=torch.bfloat16)

    @torch.compile(fullgraph=True)
    def run(x):
        return matmul_4bit_gated(x * 2, packed, state)

    torch.testing.assert_close(run(x), matmul_4bit_gated(x * 2, packed, state))


def test_the_op(device):
    packed, state = weight(device, 24, 64, nested=True)
    absmax, nested = halfbyte._matmul.statistics(
        state, torch.device(device, 0) if device == "cuda" else torch.device(device)
    )
    x = torch.randn(5, 64, device=device)
    for bias in (None, torch.randn(48, device=device)):
        arguments = (x, packed, (48, 64), absmax, 64, "nf4", "silu", bias, *nested)
        torch.library.opcheck(torch.ops.halfbyte.matmul_4bit_gated.default, arguments)


def test_arguments():
    packed, state = weight("cpu", 24, 64)
    x = torch.randn(5, 64)
    with pytest.raises(ArgumentError, match=r"gate: expected one of 'silu', 'gelu_tanh', got 'relu'"):
        matmul_4bit_gated(x, packed, state, "relu")
    odd = F.quantize_4bit(torch.randn(33, 64), quant_type="nf4")
    with pytest.raises(ShapeError, match=r"\[2N, K\]"):
        matmul_4bit_gated(x, *odd)
    with pytest.raises(ShapeError, match=r"\[33, 64\]"):
        torch.ops.halfbyte.matmul_4bit_gated.default(x, odd[0], (33, 64), odd[1].absmax, 64, "nf4", "silu")
    with pytest.raises(ArgumentError, match="gate"):
        torch.ops.halfbyte.matmul_4bit_gated.default(x, packed, (48, 64), state.absmax, 64, "nf4", "tanh")
    with pytest.raises(ShapeError, match="A"):
        matmul_4bit_gated(torch.randn(5, 63), packed, state)
    with pytest.raises(DtypeError, match="A"):
        matmul_4bit_gated(torch.randn(5, 64, dtype=torch.float64), packed, state)
    with pytest.raises(ShapeError, match="bias"):
        matmul_4bit_gated(x, packed, state, bias=torch.randn(24))
    assert matmul_4bit_gated(x.numpy(), packed, state).shape == (5, 24)


@pytest.mark.gpu
def test_native_arguments():
    packed, state = weight("cuda", 24, 64)
    x, out = torch.randn(5, 64, device="cuda"), torch.empty(5, 24, device="cuda")
    with pytest.raises(ArgumentError, match="gate"):
        _native.matmul_4bit_gated(x, packed, state.absmax, out, "nf4", 64, "none")
    with pytest.raises(ShapeError, match="packed"):
        _native.matmul_4bit_gated(x, packed[:-1], state.absmax, out, "nf4", 64, "silu")
    with pytest.raises(ShapeError, match="bias"):
        _native.matmul_4bit_gated(x, packed, state.absmax, out, "nf4", 64, "silu", out[0])
    with pytest.raises(ShapeError, match="out"):
        _native.gate(torch.empty(5, 47, device="cuda"), out, "silu")
    with pytest.raises(DtypeError, match="out"):
        _native.gate(torch.empty(5, 48, device="cuda"), out.half(), "silu")
