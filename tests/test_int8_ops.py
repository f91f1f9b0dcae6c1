"""LLM.int8() as functions and operations: against plain torch and fp64, contracts, gradients and hostile input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte import _int8, _native
from halfbyte import functional as F
from halfbyte.errors import ArgumentError, DeviceError, DtypeError, ShapeError

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.halfbyte


def activations(rows, k, dtype=torch.float32, device="cpu", columns=()):
    x = torch.randn(rows, k, device=device)
    x[:, list(columns)] = x[:, list(columns)].sign() * (10 + x[:, list(columns)].abs())
    return x.to(dtype)


def weight(n, k, device="cpu"):
    codes, stats, _ = F.int8_vectorwise_quant(torch.randn(n, k, device=device))
    return codes, stats


def exact(x, codes, stats, threshold=0.0, bias=None):
    """The layer in fp64, on what the kernels quantize to: codes and statistics by the public function."""
    q, s, columns = F.int8_vectorwise_quant(x, threshold)
    left = q.double() * s.double()[:, None] / 127
    if columns is not None:
        left[:, columns] = x[:, columns].double()
    out = left @ (codes.double() * stats.double()[:, None] / 127).t()
    return out if bias is None else out + bias.double()


# ---- rows and columns


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
def test_rows_are_quantized_as_the_formula_says(device, dtype, threshold):
    for rows, k in [(1, 1), (1, 40), (5, 33), (64, 499), (3, 4097)]:
        x = activations(rows, k, dtype, device)
        q, stats, columns = F.int8_vectorwise_quant(x, threshold)
        wide = x.float()
        outliers = wide.abs() >= threshold if threshold else torch.zeros_like(wide, dtype=torch.bool)
        kept = torch.where(outliers, 0, wide)
        want_stats = kept.abs().amax(1)
        assert torch.equal(stats, want_stats)
        if rows > 1:
            kept[:, outliers.any(0)] = 0
        if device == "cpu":
            want = torch.round(kept * (127.0 / want_stats[:, None])).nan_to_num(0).to(torch.int8)
            assert torch.equal(q, want)
        else:
            # The quotient is approximate, so a value on an edge may go either way: of 16-bit numbers whole rows may be.
            exact = kept.double() * 127 / want_stats.double().clamp(min=1e-30)[:, None]
            assert ((q.double() - exact).abs() <= 0.5 + 1e-4).all()
        if threshold:
            assert torch.equal(columns, outliers.any(0).nonzero().view(-1))
        else:
            assert columns is None


@pytest.mark.parametrize("dtype", FLOATS)
def test_double_quantization_is_of_rows_and_of_columns(device, dtype):
    x = activations(37, 65, dtype, device, columns=[7])
    row, column, row_stats, column_stats, columns = F.int8_double_quant(x, threshold=6.0)
    plain = F.int8_vectorwise_quant(x, 6.0)
    assert torch.equal(row, plain[0]) and torch.equal(row_stats, plain[1]) and torch.equal(columns, plain[2])
    kept = torch.where(x.abs() >= 6, 0, x).float()
    assert torch.equal(column_stats, kept.abs().amax(0))
    decoded = column.float() * column_stats / 127
    # On CUDA, 127 times an fp16 value is rounded to fp16, as in bitsandbytes.
    step = 0.5 + (2**-4 if device == "cuda" else 2**-9)
    assert ((decoded - kept).abs() <= column_stats / 127 * step).all()


def test_rows_of_zeros_and_special_values_have_defined_codes(device):
    x = torch.ones(7, 64, device=device)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 4] = float("inf")
    x[3] = -1e-40
    x[4] = 3e38
    for threshold in (0.0, float("inf")):
        q, stats, columns = F.int8_vectorwise_quant(x, threshold)
        assert stats[0] == 0 and stats[1].isnan() and not q[:2].any()
        assert columns is None if threshold == 0 else columns.tolist() == [4]
        kept = [i for i in range(64) if threshold == 0 or i != 4]
        assert (q[3, kept] == -127).all() and (q[4:, kept] == 127).all()
        assert not q[2].any() and stats[2].isinf() if threshold == 0 else (q[2, kept] == 127).all() and stats[2] == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantizing_is_a_product_in_fp32(device, dtype):
    codes, stats = weight(33, 70, device)
    want = (codes.float() * stats[:, None]) * (1 / 127)
    assert torch.equal(F.int8_vectorwise_dequant(codes, stats), want)
    from halfbyte import _int8_ops

    assert torch.equal(_int8_ops.dequantize_rows(codes, stats, dtype), want.to(dtype))


# ---- products


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 7, 20), (128, 96, 499), (128, 64, 502), (33, 48, 512), (2, 5, 0)])
def test_integer_products_are_exact(device, shape):
    m, n, k = shape
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    want = (a.double() @ b.double().t()).int()
    assert torch.equal(F.int8_linear_matmul(a, b), want)
    out = torch.empty(n, m, dtype=torch.int32, device=device).t()
    assert F.int8_linear_matmul(a, b, out=out) is out and torch.equal(out, want)
    assert torch.equal(F.int8_linear_matmul(a.view(1, m, k), b), want.view(1, m, n))


@settings(max_examples=60, deadline=None)
@given(m=st.integers(0, 40), n=st.integers(1, 60), k=st.integers(0, 300), seed=st.integers(0, 2**32))
def test_integer_products_of_any_size_and_layout_are_exact(m, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (k, m), dtype=torch.int8, generator=generator).t()
    b = torch.randint(-128, 128, (n, 2 * k), dtype=torch.int8, generator=generator)[:, ::2]
    assert torch.equal(F.int8_linear_matmul(a, b), a.int() @ b.int().t())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("biased", [None, torch.float32, torch.bfloat16])
def test_scaled_products(device, dtype, biased):
    a, rows = weight(19, 130, device)
    b, columns = weight(45, 130, device)
    bias = None if biased is None else torch.randn(45, device=device).to(biased)
    got = F.int8_scaled_mm(a, b, rows, columns, bias, dtype)
    want = (a.double() @ b.double().t()) * rows.double()[:, None] * columns.double() / 127**2
    want = want if bias is None else want + bias.double()
    assert got.dtype == dtype
    few = 2.5 if dtype == torch.float32 else 0.51  # roundings
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() * few + 1e-5).all()
    again = F.int8_mm_dequant(F.int8_linear_matmul(a, b), rows, columns, bias=bias)
    assert again.dtype == torch.float16
    assert ((again.double() - want).abs() <= 2**-11 * want.abs() * 1.02 + 1e-5).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.07, 1.0])
def test_layers_are_near_fp64_with_any_share_of_outlier_columns(device, dtype, share):
    """The residual of a column is kept to 16 bits on CUDA for 16-bit input, which is what the second term allows."""
    rows, n, k = 33, 61, 300
    columns = range(0, k, int(1 / share)) if share else ()
    x = activations(rows, k, dtype, device, columns)
    codes, stats = weight(n, k, device)
    bias = torch.randn(n, device=device).to(dtype)
    got = OPS.int8_linear(x, codes, stats, bias, 6.0)
    want = exact(x, codes, stats, 6.0, bias)
    size = x.double().abs() @ (codes.double() * stats.double()[:, None] / 127).abs().t()
    slack = 2**-20 if device == "cpu" else torch.finfo(dtype).eps / 4 + 2**-20
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * 0.51 * want.abs() + slack * size).all()
    recorded, bitmap = OPS.int8_linear_outliers(x, codes, stats, bias, 6.0)
    torch.testing.assert_close(recorded, got, rtol=2e-2, atol=2e-2)
    words = torch.zeros((k + 31) // 32 * 32, dtype=torch.int64)
    words[list(columns)] = 1
    found = (bitmap.cpu().to(torch.int64)[:, None] >> torch.arange(32)) & 1
    assert torch.equal(found.view(-1), words)


@pytest.mark.parametrize("dtype", FLOATS)
def test_mixed_products_take_columns_from_the_activations(device, dtype):
    x = activations(9, 100, dtype, device, [3, 50])
    codes, stats = weight(20, 100, device)
    q, s, columns = F.int8_vectorwise_quant(x, 6.0)
    out, part = F.int8_mixed_scaled_mm(x, q, codes, s, stats, columns)
    assert torch.equal(part, x[:, [3, 50]])
    want = exact(x, codes, stats, 6.0)
    assert ((out.double() - want).abs() <= torch.finfo(dtype).eps * (want.abs() + 100)).all()
    none, part = F.int8_mixed_scaled_mm(x, q, codes, s, stats, None)
    assert part.numel() == 0 and torch.equal(none, F.int8_scaled_mm(q, codes, s, stats, None, dtype))


def test_large_bf16_activations_stay_finite(device):
    x = torch.full((2, 64), 1e5, dtype=torch.bfloat16, device=device)
    codes, stats = weight(8, 64, device)
    for threshold in (0.0, 6.0):
        out = OPS.int8_linear(x, codes, stats, None, threshold)
        assert out.isfinite().all() and out.abs().max() > 65504


def test_rows_with_nan_are_nan_and_infinities_are_outliers(device):
    x = torch.ones(4, 64, device=device)
    x[1, 5] = float("nan")
    x[2, 6] = float("inf")
    codes, stats = torch.ones(3, 64, dtype=torch.int8, device=device), torch.ones(3, device=device)
    plain = OPS.int8_linear(x, codes, stats, None, 0.0)
    mixed = OPS.int8_linear(x, codes, stats, None, 6.0)
    assert plain[1:3].isnan().all() and mixed[1].isnan().all()
    assert (mixed[2] == float("inf")).all()
    for out in (plain, mixed):
        assert torch.allclose(out[[0, 3]], torch.tensor(64 / 127, device=device))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    n=st.integers(1, 60),
    k=st.integers(1, 200),
    threshold=st.sampled_from([0.0, 0.5, 3.0, 6.0]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
)
def test_layers_of_any_size_are_near_fp64(rows, n, k, threshold, dtype, seed):
    torch.manual_seed(seed)
    x = (torch.randn(rows, k) * 2).to(dtype)
    codes, stats = weight(n, k)
    got = OPS.int8_linear(x, codes, stats, None, threshold)
    want = exact(x, codes, stats, threshold)
    size = x.double().abs() @ (codes.double() * stats.double()[:, None] / 127).abs().t()
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * 0.51 * want.abs() + 2**-20 * size + 1e-9).all()


# ---- contracts with torch


def test_opcheck(device):
    x = activations(6, 40, torch.bfloat16, device, [3])
    codes, stats = weight(12, 40, device)
    bias = torch.randn(12, device=device).to(torch.bfloat16)
    check = torch.library.opcheck
    for threshold in (0.0, 6.0):
        check(OPS.int8_linear.default, (x.clone().requires_grad_(), codes, stats, bias.requires_grad_(), threshold))
        check(OPS.int8_linear_outliers.default, (x.clone().requires_grad_(), codes, stats, bias, threshold))
        check(OPS.int8_vectorwise_quant.default, (x, threshold))
        check(OPS.int8_double_quant.default, (x, threshold))
    check(OPS.int8_linear_dense.default, (x.clone().requires_grad_(), codes, stats, bias))
    check(OPS.int8_linear_grad_input.default, (OPS.int8_linear(x, codes, stats), codes, stats))
    check(OPS.int8_vectorwise_dequant.default, (codes, stats))
    check(OPS.int8_linear_matmul.default, (codes, codes))
    for exact_gradient in (False, True):
        check(OPS.int8_weight_gradient.default, (x, x, 2.0, exact_gradient))
    out = torch.empty(12, 12, dtype=torch.int32, device=device)
    check(OPS.int8_linear_matmul.out, (codes, codes, out))
    check(OPS.int8_scaled_mm.default, (codes, codes, stats, stats, bias.detach(), torch.bfloat16))
    check(OPS.int8_mm_dequant.default, (out, stats, stats))
    q, s, columns = F.int8_vectorwise_quant(x, 6.0)
    check(OPS.int8_mixed_scaled_mm.default, (x, q, codes, s, stats, columns, bias.detach()))
    check(OPS.int8_mixed_scaled_mm.default, (x, q, codes, s, stats))


# torch says so where the first that a thread of autograd does is a product; with a layer of its own too.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
def test_gradients_are_those_of_the_dequantized_weight(device):
    codes, stats = weight(24, 50, device)
    dense = F.int8_vectorwise_dequant(codes, stats)
    x = activations(5, 50, device=device, columns=[4]).view(1, 5, 50).requires_grad_()
    bias = torch.randn(24, device=device, requires_grad=True)
    for op in (OPS.int8_linear, OPS.int8_linear_outliers):
        out = op(x, codes, stats, bias, 6.0)
        out = out[0] if isinstance(out, tuple) else out
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, (x, bias), grad)
        torch.testing.assert_close(got[0], grad @ dense)
        torch.testing.assert_close(got[1], grad.sum((0, 1)))
    # Twice: the gradient's gradient is the product with the weight again.
    grad = torch.randn(3, 24, device=device, requires_grad=True)
    twice = torch.autograd.grad(OPS.int8_linear_grad_input(grad, codes, stats), grad, torch.ones(3, 50, device=device))
    torch.testing.assert_close(twice[0], torch.ones(3, 50, device=device) @ dense.t())


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_the_integer_gradient_of_a_weight_is_near_the_exact_one(device, threshold):
    x = activations(64, 40, device=device, columns=[7] if threshold else ())
    grad = torch.randn(64, 24, device=device)
    got = _int8.weight_gradient(grad, x, threshold)
    want = grad.double().t() @ x.double()
    error = (got.double() - want).norm() / want.norm()
    assert error < 0.02
    # And of outlier columns nearer still, as their large part is exact.
    if threshold:
        assert ((got - want)[:, 7].norm() / want[:, 7].norm()) < 2e-3


def test_fakes_say_what_the_ops_return(device):
    x = activations(4, 30, torch.float16, device)
    codes, stats = weight(9, 30, device)

    def every(x, codes, stats):
        return [
            OPS.int8_linear(x, codes, stats, None, 6.0),
            OPS.int8_linear_dense(x, codes, stats),
            OPS.int8_vectorwise_quant(x)[0],
            OPS.int8_scaled_mm(codes, codes, stats, stats),
            OPS.int8_linear_matmul(codes, codes),
        ]

    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, codes, stats), every(x, codes, stats), strict=True):
        assert torch.equal(got, want)


# ---- hostile input


def test_errors_name_the_argument():
    x = torch.randn(3, 20)
    codes, stats = weight(5, 20)
    cases = [
        (DtypeError, "A: ", lambda: F.int8_vectorwise_quant(x.double())),
        (DtypeError, "A: ", lambda: F.int8_linear_matmul(x, codes)),
        (DtypeError, "B: ", lambda: F.int8_linear_matmul(codes, codes.int())),
        (ShapeError, "B: ", lambda: F.int8_linear_matmul(codes, codes[:, :10])),
        (DtypeError, "dtype: ", lambda: F.int8_linear_matmul(codes, codes, dtype=torch.int64)),
        (ShapeError, "out: ", lambda: F.int8_linear_matmul(codes, codes, torch.empty(4, 5, dtype=torch.int32))),
        (DtypeError, "out: ", lambda: F.int8_linear_matmul(codes, codes, torch.empty(5, 5))),
        (DtypeError, "A: ", lambda: F.int8_vectorwise_dequant(x, stats)),
        (ShapeError, "stats: ", lambda: F.int8_vectorwise_dequant(codes, stats[:4])),
        (DtypeError, "stats: ", lambda: F.int8_vectorwise_dequant(codes, stats.half())),
        (ShapeError, "row_stats: ", lambda: F.int8_scaled_mm(codes, codes, stats[1:], stats)),
        (ShapeError, "col_stats: ", lambda: F.int8_scaled_mm(codes, codes, stats, stats[1:])),
        (ShapeError, "bias: ", lambda: F.int8_scaled_mm(codes, codes, stats, stats, torch.ones(4))),
        (DtypeError, "dtype: ", lambda: F.int8_scaled_mm(codes, codes, stats, stats, None, torch.float64)),
        (ShapeError, "A: ", lambda: F.int8_mixed_scaled_mm(x, codes, codes, stats, stats)),
        (ShapeError, "SCB: ", lambda: OPS.int8_linear(x, codes, stats[:2])),
        (ShapeError, "B: ", lambda: OPS.int8_linear(x[:, :3], codes, stats)),
        (DtypeError, "bias: ", lambda: OPS.int8_linear(x, codes, stats, torch.ones(5).half())),
        (ArgumentError, "row_stats: ", lambda: F.int8_double_quant(x, row_stats=stats)),
        (ArgumentError, "threshold: ", lambda: F.int8_vectorwise_quant(x, float("nan"))),
        (DeviceError, "stats: ", lambda: OPS.int8_vectorwise_dequant(codes.to("meta"), stats)),
    ]
    for error, name, call in cases:
        with pytest.raises(error, match=f"^{name}"):
            call()


def test_the_core_refuses_what_does_not_fit():
    q, stats = torch.empty(3, 20, dtype=torch.int8), torch.empty(3)
    x = torch.randn(3, 20)
    cases = [
        ("q", lambda: _native.int8_quantize_rows(x, q.float(), stats)),
        ("stats", lambda: _native.int8_quantize_rows(x, q, stats[:2])),
        ("outliers", lambda: _native.int8_quantize_rows(x, q, stats, 6.0)),
        ("outliers", lambda: _native.int8_quantize_rows(x, q, stats, 6.0, torch.empty(2, dtype=torch.int32))),
        ("x", lambda: _native.int8_quantize_rows(x.t(), q.t(), stats)),
        ("w", lambda: _native.int8_linear(x, q[:, :10].contiguous(), stats, torch.empty(3, 3))),
        ("out", lambda: _native.int8_linear(x, q, stats, torch.empty(3, 3).half())),
        ("columns", lambda: _native.int8_outlier_bitmap(stats.int(), torch.empty(1, dtype=torch.int32), 20)),
        ("x, outliers", lambda: _native.int8_matmul(q, stats, q, stats, torch.empty(3, 3), None, x)),
    ]
    for name, call in cases:
        with pytest.raises(ArgumentError, match=f"^{name}: "):
            call()


def test_empty_tensors(device):
    codes, stats = weight(5, 20, device)
    assert OPS.int8_linear(torch.empty(0, 20, device=device), codes, stats, None, 6.0).shape == (0, 5)
    q, s, columns = F.int8_vectorwise_quant(torch.empty(0, 20, device=device), 6.0)
    assert q.shape == (0, 20) and s.shape == (0,) and columns.shape == (0,)
    bias = torch.randn(5, device=device)
    nothing = torch.empty(5, 0, dtype=torch.int8, device=device)
    out = OPS.int8_linear(torch.empty(3, 0, device=device), nothing, stats, bias, 6.0)
    assert torch.equal(out, bias.expand(3, 5))


def test_results_do_not_depend_on_threads():
    x = activations(70, 300, columns=[4, 9])
    codes, stats = weight(400, 300)
    torch.set_num_threads(1)
    one = OPS.int8_linear(x, codes, stats, None, 6.0)
    torch.set_num_threads(4)
    assert torch.equal(OPS.int8_linear(x, codes, stats, None, 6.0), one)


def test_public_names():
    assert hb.matmul is _int8.matmul and hb.MatmulLtState is _int8.MatmulLtState
    assert all(name in F.__all__ for name in dir(F) if name.startswith("int8_"))
