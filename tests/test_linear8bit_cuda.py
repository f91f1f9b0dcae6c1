"""8-bit layers on CUDA: near the CPU on every size class, captured in graphs, on other streams, without waiting."""

import pytest
import torch

import halfbyte as hb
from halfbyte import functional as F
from halfbyte.nn import Linear8bitLt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
OPS = torch.ops.halfbyte
# Around the borders of tiles, and K that no vector divides.
SHAPES = [(1, 64, 64), (3, 48, 499), (16, 128, 512), (17, 130, 502), (64, 256, 1024), (129, 96, 130), (300, 512, 2048)]


def spread(m, k, dtype, columns):
    x = torch.randn(m, k)
    x[:, columns] *= 30
    return x.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_integer_products_equal_the_cpus(shape):
    m, n, k = shape
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    assert torch.equal(F.int8_linear_matmul(a.cuda(), b.cuda()).cpu(), F.int8_linear_matmul(a, b))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("outliers", ["none", "few", "many", "all"])
def test_layers_are_near_the_cpus(shape, dtype, outliers):
    m, n, k = shape
    columns = {"none": [], "few": [k // 3], "many": list(range(0, k, 5)), "all": list(range(k))}[outliers]
    x = spread(m, k, dtype, columns)
    codes, stats, _ = F.int8_vectorwise_quant(torch.randn(n, k))
    bias = torch.randn(n).to(dtype)
    magnitudes = x.double().abs().cuda() @ (codes.double() * stats.double()[:, None] / 127).abs().t().cuda()
    for threshold in (0.0, 6.0):
        got = OPS.int8_linear(x.cuda(), codes.cuda(), stats.cuda(), bias.cuda(), threshold)
        # What its codes come to: the columns of outliers in floating point, their residuals in that of the input.
        q, row_stats, mixed = F.int8_vectorwise_quant(x.cuda(), threshold)
        left = q.double() * row_stats.double()[:, None] / 127
        if mixed is not None:
            left[:, mixed] = x.cuda()[:, mixed].double()
            # Where many columns have outliers, x itself is multiplied: for 16 bits, on Hopper.
            hopper = torch.cuda.get_device_capability() == (9, 0)
            if hopper and len(mixed) > 32 and m > 4 and k % 16 == 0 and dtype != torch.float32:
                left = x.cuda().double()
        want = left @ (codes.double() * stats.double()[:, None] / 127).t().cuda() + bias.double().cuda()
        eps = torch.finfo(dtype).eps
        assert ((got.double() - want).abs() <= 0.51 * eps * want.abs() + (eps / 4 + 2**-20) * magnitudes).all()
        # A value between two codes may get either: of 16-bit numbers, which are few, that can be a part of a row.
        there = OPS.int8_linear(x, codes, stats, bias, threshold).double()
        assert (got.cpu().double() - there).norm() / there.norm() <= 1e-2


@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graphs_replay_with_other_outliers(rows, dtype):
    layer = Linear8bitLt(256, 192, has_fp16_weights=False, threshold=6.0).cuda().eval()
    static = torch.randn(rows, 256, device="cuda").to(dtype)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                layer(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(static)
        sets = [[], [3], [0, 31, 32, 255], list(range(0, 256, 2)), list(range(256)), [], [200]]
        for columns in sets:
            static.copy_(spread(rows, 256, dtype, columns))
            graph.replay()
            got = out.clone()
            assert torch.equal(got, layer(static)), columns


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_nothing_waits_for_the_device(threshold):
    layer = Linear8bitLt(256, 192, has_fp16_weights=False, threshold=threshold).cuda()
    x = spread(8, 256, torch.bfloat16, [5]).cuda()
    layer(x)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)  # the bias wants a gradient
        layer(x.requires_grad_()).sum().backward()
        layer.eval()
        with torch.no_grad():
            layer(x.detach())
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_results_follow_the_current_stream():
    layer = Linear8bitLt(512, 512, has_fp16_weights=False, threshold=6.0).cuda().eval()
    x = spread(64, 512, torch.bfloat16, [9]).cuda()
    with torch.no_grad():
        want = layer(x)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = x * 2
            got = layer(late)
        stream.synchronize()
        assert torch.equal(got, layer(x * 2)) and not torch.equal(got, want)


def test_rows_and_statistics_equal_the_cpus_up_to_edges():
    for dtype in FLOATS:
        x = spread(130, 1000, dtype, [7, 500])
        for threshold in (0.0, 6.0):
            here, there = F.int8_vectorwise_quant(x, threshold), F.int8_vectorwise_quant(x.cuda(), threshold)
            assert torch.equal(there[1].cpu(), here[1])
            # The quotient is approximate on CUDA: values between two codes may get either.
            exact = x.double() * 127 / here[1].double()[:, None]
            between = (exact - exact.floor() - 0.5).abs() <= 1e-4
            difference = (here[0].int() - there[0].cpu().int()).abs()
            assert difference.max() <= 1 and not difference[~between].any()
            assert (here[2] is None) == (there[2] is None)
            assert here[2] is None or torch.equal(there[2].cpu(), here[2])


def test_half_trained_layers_record_their_outliers():
    layer = Linear8bitLt(64, 48, has_fp16_weights=False, threshold=3.0).cuda()
    x = spread(5, 64, torch.float16, [2, 40]).clamp(-60, 60).cuda()
    layer(x)
    assert {2, 40} <= set(layer.state.idx.tolist())


def test_a_quantized_model_keeps_its_results_on_the_gpu():
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64)).eval()
    x = spread(32, 256, torch.float32, [11])
    with torch.no_grad():
        want = model(x)
        hb.quantize_model(model, "int8", device="cuda")
        got = model(x.cuda()).cpu()
    assert (got - want).norm() / want.norm() < 0.02
