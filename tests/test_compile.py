"""torch.compile: whole graphs, without a break, that give what eager gives."""

import shutil

import pytest
import torch

import halfbyte
from halfbyte import functional as F
from halfbyte.nn import Linear4bit

inductor = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
        ),
    ],
)
BACKENDS = ["eager", "aot_eager", inductor]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def net(device, dtype, double=True, storage=torch.uint8, compute="same"):
    compute = dtype if compute == "same" else compute
    options = {"quant_type": "nf4", "compress_statistics": double, "quant_storage": storage, "compute_dtype": compute}
    model = torch.nn.Sequential(
        Linear4bit(64, 96, **options), torch.nn.SiLU(), Linear4bit(96, 32, bias=False, **options)
    )
    return model.to(dtype).to(device)


def tolerance(dtype):
    return {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double", [False, True])
def test_forward_and_backward_in_one_graph(device, backend, dtype, double):
    model = net(device, dtype, double)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(5, 64, device=device).to(dtype)
    eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, out = model(eager_x), compiled(compiled_x)
    torch.testing.assert_close(out, expected, **tolerance(dtype))
    expected.float().square().sum().backward()
    bias_grad, model[0].bias.grad = model[0].bias.grad, None
    out.float().square().sum().backward()
    torch.testing.assert_close(compiled_x.grad, eager_x.grad, **tolerance(dtype))
    torch.testing.assert_close(model[0].bias.grad, bias_grad, **tolerance(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inference(device, backend, storage, grad):
    model = net(device, torch.float32, storage=storage)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 64, device=device)
        with grad():
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_rows_compile_once(device, backend):
    model = net(device, torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 3, 17, 40):
        x = torch.randn(rows, 64, device=device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_unsettled_compute_dtype_breaks_no_graph_and_stays_unsettled(device, dtype):
    model = net(device, torch.float32, compute=None)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64, device=device).to(dtype)
    out = compiled(x)
    assert not model[0].compute_type_is_set
    assert model[0].compute_dtype is None
    assert out.dtype == dtype
    torch.testing.assert_close(out, model(x), **tolerance(dtype))


def test_other_compute_dtype(device):
    model = net(device, torch.float32, compute=torch.bfloat16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64, device=device)
    assert torch.equal(compiled(x), model(x))


def test_under_autocast(device):
    model = net(device, torch.float32, compute=None)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = compiled(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, model(x))


def test_functional_api(device):
    a = torch.randn(40, 64, device=device)
    x = torch.randn(3, 64, device=device)

    def everything(a, x):
        packed, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
        codes, state8 = F.quantize_blockwise(a, blocksize=256)
        return (
            halfbyte.matmul_4bit(x, packed, state),
            F.dequantize_4bit(packed, state),
            F.dequantize_blockwise(codes, state8),
        )

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(a, x), everything(a, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_weight_reloaded_after_compiling_is_the_one_used(device):
    model = net(device, torch.float32)
    other = net(device, torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 64, device=device)
    compiled(x)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))


def test_export(device):
    model = net(device, torch.float32).eval()
    x = torch.randn(3, 64, device=device)
    program = torch.export.export(model, (x,))
    assert any(node.target is torch.ops.halfbyte.matmul_4bit.default for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40])
def test_cuda_graphs_by_the_compiler(rows):
    model = net("cuda", torch.bfloat16)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), model(x), **tolerance(torch.bfloat16))
