"""torch.ops.halfbyte: contracts with torch (opcheck), gradients, what is saved for them, and who may bypass the ops."""

import gc

import pytest
import torch
from torch._subclasses import FakeTensorMode

import halfbyte
from halfbyte import functional as F
from halfbyte import ops
from halfbyte.errors import ArgumentError, DeviceError, DtypeError, ShapeError

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def weight(device, dtype=torch.float32, n=48, k=64, nested=False, **more):
    packed, state = F.quantize_4bit(
        torch.randn(n, k, device=device).to(dtype), quant_type="nf4", compress_statistics=nested, **more
    )
    return packed, state


def arguments(state):
    nested = state.state2
    if nested is None:
        return state.absmax, 64, "nf4", ()
    return state.absmax, 64, "nf4", (nested.absmax, nested.code, state.offset, 256)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_opcheck_quantize(device, dtype, storage):
    # Of one sign, so that no code is above 7: opcheck compares values, and some pairs of bytes are NaN as bf16.
    a = torch.randn(17, 33, device=device).abs().to(dtype)
    torch.library.opcheck(torch.ops.halfbyte.quantize_4bit.default, (a, 64, "fp4", storage))
    torch.library.opcheck(torch.ops.halfbyte.quantize_4bit.default, (-a.t().requires_grad_(), 64, "nf4", storage))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_opcheck_dequantize(device, dtype, nested, storage):
    packed, state = weight(device, nested=nested, quant_storage=storage)
    absmax, blocksize, quant_type, more = arguments(state)
    torch.library.opcheck(
        torch.ops.halfbyte.dequantize_4bit.default, (packed, absmax, blocksize, quant_type, (48, 64), dtype, *more)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64), (40, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_matmul(device, dtype, nested, shape, with_bias, grad):
    packed, state = weight(device, nested=nested)
    absmax, blocksize, quant_type, more = arguments(state)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_(grad)
    bias = torch.randn(48, device=device).to(dtype).requires_grad_(grad) if with_bias else None
    torch.library.opcheck(
        torch.ops.halfbyte.matmul_4bit.default, (x, packed, (48, 64), absmax, blocksize, quant_type, bias, *more)
    )


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck_matmul_grad_input(device, nested):
    packed, state = weight(device, nested=nested)
    absmax, blocksize, quant_type, more = arguments(state)
    grad = torch.randn(3, 48, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.halfbyte.matmul_4bit_grad_input.default,
        (grad, packed, (48, 64), absmax, blocksize, quant_type, *more),
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_blockwise(device, dtype):
    a = torch.randn(17, 33, device=device).to(dtype)
    code, offset = F.create_dynamic_map().to(device), torch.tensor(0.5, device=device)
    torch.library.opcheck(torch.ops.halfbyte.quantize_blockwise.default, (a, code, 256))
    torch.library.opcheck(torch.ops.halfbyte.quantize_blockwise.default, (a, code, 256, offset, True))
    codes, absmax = torch.ops.halfbyte.quantize_blockwise(a, code, 256)
    torch.library.opcheck(torch.ops.halfbyte.dequantize_blockwise.default, (codes, absmax, code, 256, dtype))
    torch.library.opcheck(torch.ops.halfbyte.dequantize_blockwise.default, (codes, absmax, code, 256, dtype, offset))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (33, 64)])
def test_gradients_are_those_of_the_dense_layer(device, dtype, nested, shape):
    packed, state = weight(device, dtype, nested=nested)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    bias = torch.randn(48, device=device).to(dtype).requires_grad_()
    out = halfbyte.matmul_4bit(x, packed, state, bias=bias)
    upstream = torch.randn_like(out)
    for_x, for_bias = torch.autograd.grad(out, (x, bias), upstream)
    assert for_x.dtype == for_bias.dtype == dtype
    state.dtype = torch.float32
    dense, up = F.dequantize_4bit(packed, state).double(), upstream.double()
    # A rounding of the weight to dtype, where the product is done in it, and one of the result.
    eps = {torch.float32: 3e-7, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}[dtype]
    assert (for_x - up @ dense).abs().max() <= eps * (up.abs() @ dense.abs()).max()
    rows = up.view(-1, 48)
    assert (for_bias - rows.sum(0)).abs().max() <= eps * rows.abs().sum(0).max()


def test_gradients_where_only_one_is_wanted(device):
    packed, state = weight(device)
    x, bias = torch.randn(2, 64, device=device), torch.randn(48, device=device)
    halfbyte.matmul_4bit(x.requires_grad_(), packed, state, bias=bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is None
    x = x.detach()
    halfbyte.matmul_4bit(x, packed, state, bias=bias.requires_grad_()).sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 2))
    with torch.no_grad():
        assert not halfbyte.matmul_4bit(x.requires_grad_(), packed, state, bias=bias).requires_grad


def test_second_derivatives(device):
    packed, state = weight(device)
    dense = F.dequantize_4bit(packed, state)

    def penalty(multiply):
        x = torch.linspace(-0.1, 0.1, 128, device=device).view(2, 64).requires_grad_()
        (first,) = torch.autograd.grad(multiply(x).tanh().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    torch.testing.assert_close(
        penalty(lambda x: halfbyte.matmul_4bit(x, packed, state)),
        penalty(lambda x: x @ dense.t()),
        rtol=1e-4,
        atol=1e-3,
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [2, 64])
def test_what_is_saved_for_backward_is_the_packed_weight(device, nested, rows):
    packed, state = weight(device, n=256, k=512, nested=nested)
    saved = []
    x = torch.randn(rows, 512, device=device, requires_grad=True)

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = halfbyte.matmul_4bit(x, packed, state)
    assert any(t.data_ptr() == packed.data_ptr() for t in saved)
    assert sum(t.numel() * t.itemsize for t in saved) < 256 * 512 * 0.6 + 2048
    out.sum().backward()
    assert x.grad is not None


def test_saved_tensors_may_live_elsewhere_meanwhile(device):
    packed, state = weight(device, nested=True)
    x = torch.randn(2, 64, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(halfbyte.matmul_4bit(x, packed, state).sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        out = halfbyte.matmul_4bit(x, packed, state)
    keep = packed.clone()
    packed.zero_()  # the graph has its own copies
    (got,) = torch.autograd.grad(out.sum(), x)
    packed.copy_(keep)
    assert torch.equal(got, expected)


def test_a_weight_changed_in_place_is_noticed(device):
    packed, state = weight(device)
    x = torch.randn(2, 64, device=device, requires_grad=True)
    out = halfbyte.matmul_4bit(x, packed, state)
    packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_dense_weight_outlives_a_training_step(device):
    packed, state = weight(device, n=1024, k=1024)
    x = torch.randn(64, 1024, device=device, requires_grad=True)
    out = halfbyte.matmul_4bit(x, packed, state)
    out.sum().backward()
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (1024, 1024)]
    assert not alive


def test_checkpointing_recomputes_and_agrees(device):
    packed, state = weight(device, n=64)
    x = torch.randn(2, 64, device=device, requires_grad=True)

    def two(y):
        return halfbyte.matmul_4bit(halfbyte.matmul_4bit(y, packed, state).tanh(), packed, state)

    (plain,) = torch.autograd.grad(two(x).sum(), x)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(two, x, use_reentrant=False).sum(), x)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_fakes_know_shapes_dtypes_and_strides(device_type):
    with FakeTensorMode():
        a = torch.empty(30, 33, dtype=torch.bfloat16, device=device_type)
        packed, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True, quant_storage=torch.float32)
        assert (packed.shape, packed.dtype, packed.device.type) == ((124, 1), torch.float32, device_type)
        assert (state.absmax.shape, state.absmax.dtype) == ((16,), torch.uint8)
        dense = F.dequantize_4bit(packed, state)
        assert (dense.shape, dense.dtype) == ((30, 33), torch.bfloat16)
        x = torch.empty(2, 5, 33, dtype=torch.float16, device=device_type)
        product = halfbyte.matmul_4bit(x.transpose(0, 1), packed, state)
        assert (product.shape, product.dtype, product.is_contiguous()) == ((5, 2, 30), torch.float16, True)
        codes, state8 = F.quantize_blockwise(a, nested=True)
        assert (codes.shape, codes.dtype) == ((30, 33), torch.uint8)
        assert F.dequantize_blockwise(codes, state8).dtype == torch.bfloat16


def test_fakes_do_not_spoil_the_tables():
    from halfbyte import _tables

    _tables._cache.clear()
    with FakeTensorMode():
        F.quantize_4bit(torch.empty(4, 64), compress_statistics=True)
    packed, state = F.quantize_4bit(torch.randn(4, 64), compress_statistics=True)
    assert type(state.code) is torch.Tensor
    assert F.dequantize_4bit(packed, state).isfinite().all()


def test_meta_tensors_stay_meta():
    a = torch.empty(30, 64, device="meta")
    packed, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    assert packed.is_meta
    assert F.dequantize_4bit(packed, state).shape == (30, 64)
    assert halfbyte.matmul_4bit(torch.empty(2, 64, device="meta"), packed, state).shape == (2, 30)
    codes, state8 = F.quantize_blockwise(a)
    assert F.dequantize_blockwise(codes, state8).is_meta


def test_fakes_refuse_what_the_kernels_refuse():
    packed, state = weight("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 63)
        with pytest.raises(ShapeError, match="A"):
            halfbyte.matmul_4bit(x, packed, state)
        with pytest.raises(ArgumentError, match="blocksize"):
            torch.ops.halfbyte.quantize_4bit(x, 48, "nf4", torch.uint8)
        with pytest.raises(ArgumentError, match="quant_type"):
            torch.ops.halfbyte.quantize_4bit(x, 64, "nf5", torch.uint8)
        with pytest.raises(DtypeError, match="A"):
            torch.ops.halfbyte.quantize_4bit(x.double(), 64, "nf4", torch.uint8)


def test_the_ops_check_what_the_functions_check(device):
    packed, state = weight(device)
    matmul = torch.ops.halfbyte.matmul_4bit.default
    x = torch.randn(2, 64, device=device)
    with pytest.raises(ShapeError, match="shape"):
        matmul(x, packed, (3072,), state.absmax, 64, "nf4")
    with pytest.raises(ShapeError, match="A"):
        matmul(x[:, :32], packed, (48, 64), state.absmax, 64, "nf4")
    with pytest.raises(ShapeError, match="packed"):
        matmul(x, packed[:-1], (48, 64), state.absmax, 64, "nf4")
    with pytest.raises(DtypeError, match="bias"):
        matmul(x, packed, (48, 64), state.absmax, 64, "nf4", torch.ones(48, device=device, dtype=torch.float16))
    with pytest.raises(ShapeError, match="bias"):
        matmul(x, packed, (48, 64), state.absmax, 64, "nf4", torch.ones(47, device=device))
    with pytest.raises(DtypeError, match="dtype"):
        torch.ops.halfbyte.dequantize_4bit(packed, state.absmax, 64, "nf4", (48, 64), torch.int32)


def test_other_devices_are_refused_by_name():
    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("xpu")

    with pytest.raises(DeviceError, match="A: expected a tensor on cpu or cuda"):
        F.quantize_4bit(torch.randn(4, 64).as_subclass(Elsewhere))


def test_modes_and_transforms_see_the_op(device):
    packed, state = weight(device)
    x = torch.randn(2, 64, device=device)

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Names() as names:
        product = halfbyte.matmul_4bit(x, packed, state)
        F.dequantize_4bit(packed, state)
        F.quantize_4bit(x)
    assert torch.ops.halfbyte.matmul_4bit.default in names.seen
    assert torch.ops.halfbyte.dequantize_4bit.default in names.seen
    assert torch.ops.halfbyte.quantize_4bit.default in names.seen

    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda a: halfbyte.matmul_4bit(a, packed, state))(x)
    torch.testing.assert_close(graph(x + 1), halfbyte.matmul_4bit(x + 1, packed, state))

    # A batched tensor has no memory of its own; torch calls the op once for each of the batch.
    batched = torch.vmap(lambda a: halfbyte.matmul_4bit(a, packed, state))(x)
    torch.testing.assert_close(batched, product)
    traced = torch.jit.trace(lambda a: halfbyte.matmul_4bit(a, packed, state), (x,), check_trace=False)
    torch.testing.assert_close(traced(x + 1), halfbyte.matmul_4bit(x + 1, packed, state))


def test_tensor_subclasses_go_through_the_dispatcher(device):
    class Logged(torch.Tensor):
        called = False

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            Logged.called |= func is torch.ops.halfbyte.matmul_4bit.default
            return super().__torch_function__(func, types, args, kwargs or {})

    packed, state = weight(device)
    halfbyte.matmul_4bit(torch.randn(2, 64, device=device).as_subclass(Logged), packed, state)
    assert Logged.called
    assert not ops.is_eager(torch.randn(2, device=device).as_subclass(Logged))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_cuda_graph_gives_what_eager_gives(rows):
    packed, state = weight("cuda", torch.bfloat16, n=256, k=512, nested=True)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        halfbyte.matmul_4bit(x, packed, state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = halfbyte.matmul_4bit(x, packed, state)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, halfbyte.matmul_4bit(x, packed, state))


@pytest.mark.gpu
def test_other_streams_and_threads():
    import threading

    packed, state = weight("cuda", n=256, k=512)
    x = torch.randn(4, 512, device="cuda")
    expected = halfbyte.matmul_4bit(x, packed, state)
    results = {}

    def work(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(50):
                results[name] = halfbyte.matmul_4bit(x, packed, state)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results.values())
