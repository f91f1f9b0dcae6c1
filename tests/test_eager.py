"""The eager product in one call of the core: what it takes, what it leaves to the general way, and that both agree."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import halfbyte
from halfbyte import _matmul, _native, ops
from halfbyte import functional as F
from halfbyte._matmul import matmul_as_is
from halfbyte.nn import Linear4bit, LinearNF4, linear4bit

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def weight(device, n=48, k=128, nested=False, kind="nf4", blocksize=64, storage=torch.uint8):
    w = torch.randn(n, k, device=device)
    return F.quantize_4bit(w, blocksize=blocksize, compress_statistics=nested, quant_type=kind, quant_storage=storage)


def general(x, packed, state, bias=None):
    """The way through the checks in Python."""
    return matmul_as_is(x, packed, state, None, bias)


def layer(device, n=48, k=128, dtype=torch.bfloat16, bias=False, **more):
    return (
        Linear4bit(k, n, bias, compute_dtype=dtype, quant_type="nf4", **more).to(dtype).to(device).requires_grad_(False)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
def test_it_agrees_with_the_general_way(device, dtype, nested):
    for kind, blocksize, storage in (
        ("nf4", 64, torch.uint8),
        ("fp4", 128, torch.bfloat16),
        ("nf4", 32, torch.float32),
    ):
        packed, state = weight(device, nested=nested, kind=kind, blocksize=blocksize, storage=storage)
        bias = torch.randn(48, device=device, dtype=dtype)
        for rows in ((), (1,), (3,), (2, 3), (1, 1, 5), (1,) * 7, (0,), (2, 0)):
            x = torch.randn(*rows, 128, device=device, dtype=dtype)
            for b in (None, bias):
                got = _native.eager_matmul_4bit(x, packed, state, b)
                assert got is not None, (rows, kind)
                assert got.shape == (*rows, 48)
                assert (got.dtype, got.device, got.requires_grad) == (dtype, x.device, False)
                assert got.is_contiguous()
                assert torch.equal(got, general(x, packed, state, b))
                assert torch.equal(got, halfbyte.matmul_4bit(x, packed, state, bias=b))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows_on_cuda(dtype):
    packed, state = weight("cuda", 256, 512, nested=True)
    bias = torch.randn(256, device="cuda", dtype=dtype)
    x = torch.randn(1 << 15, 512, device="cuda", dtype=dtype)
    assert torch.equal(halfbyte.matmul_4bit(x, packed, state, bias=bias), general(x, packed, state, bias))


def test_a_layer_is_one_call(device):
    for bias in (False, True):
        module = layer(device, bias=bias)
        x = torch.randn(2, 128, device=device, dtype=torch.bfloat16)
        got = _native.eager_linear_4bit(module, x)
        assert got is not None
        assert torch.equal(got, general(x, module.weight, module.weight.quant_state, module.bias))
        assert torch.equal(got, module(x))


class TestCall:
    """A layer's call goes past nn.Module's, unless somebody would miss it."""

    def seen(self, module, x):
        """Whether forward ran, and whether it made no difference to the result."""
        ran = []
        want = Linear4bit.forward(module, x)
        eager = _native.eager_linear_4bit

        def spy(layer, x, *forward):
            ran.append(bool(forward))
            return eager(layer, x, *forward)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear4bit, "_eager", spy)
            assert torch.equal(module(x), want)
        assert ran[0] is True
        return len(ran) > 1

    def test_hooks(self, device):
        module, other = layer(device), layer(device)
        x = torch.randn(2, 128, device=device, dtype=torch.bfloat16)
        assert not self.seen(module, x)
        calls = []

        def hook(*arguments):
            calls.append(len(arguments))

        for register, expected in (
            (module.register_forward_hook, 3),
            (module.register_forward_pre_hook, 2),
            (torch.nn.modules.module.register_module_forward_hook, 3),
            (torch.nn.modules.module.register_module_forward_pre_hook, 2),
            (torch.nn.modules.module.register_module_full_backward_hook, None),
            (torch.nn.modules.module.register_module_full_backward_pre_hook, None),
            (module.register_full_backward_hook, None),
        ):
            handle = register(hook)
            assert self.seen(module, x)
            assert calls == ([] if expected is None else [expected])
            calls.clear()
            handle.remove()
            assert not self.seen(module, x)
        module.register_forward_hook(hook, always_call=True)
        assert self.seen(module, x)
        assert not self.seen(other, x)

    def test_other_forwards(self, device, monkeypatch):
        module = layer(device)
        x = torch.randn(2, 128, device=device, dtype=torch.bfloat16)
        module.forward = lambda x: "theirs"
        assert module(x) == "theirs"
        del module.forward
        assert not self.seen(module, x)

        class Other(Linear4bit):
            def forward(self, x):
                return "other"

        class Same(LinearNF4):
            pass

        other, same = (made(128, 48, False).to(device) for made in (Other, Same))
        assert other(x) == "other"
        same(x)
        assert not self.seen(same, x)
        module.compile(backend="eager")
        assert torch.equal(module(x), _native.eager_linear_4bit(module, x))
        assert _native.eager_linear_4bit(module, x, Linear4bit.forward) is None
        monkeypatch.setattr(Linear4bit, "forward", lambda self, x: "patched")
        assert same(x) == "patched"

    def test_a_patched_module_call(self, device, monkeypatch):
        module = layer(device)
        x = torch.randn(2, 128, device=device, dtype=torch.bfloat16)
        calls = []
        original = torch.nn.Module.__call__

        def counted(self, *args, **kwargs):
            calls.append(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, "__call__", counted)
        module(x)
        assert calls == [module]

    def test_arguments(self, device):
        module = layer(device)
        x = torch.randn(2, 128, device=device, dtype=torch.bfloat16)
        assert torch.equal(module(x=x), module(x))
        for wrong in (lambda: module(), lambda: module(x, x), lambda: module(x, y=x)):
            with pytest.raises(TypeError, match="forward"):
                wrong()

    def test_traces(self, device):
        module = layer(device, dtype=torch.float32)
        x = torch.randn(2, 128, device=device)
        assert "halfbyte::matmul_4bit" in str(torch.jit.trace(module, x, check_trace=False).graph)
        program = torch.export.export(module, (x,))
        assert "halfbyte.matmul_4bit" in str(program.graph)
        for strict in (False, True):
            program = torch.export.export(torch.nn.Sequential(module), (x,), strict=strict)
            assert "halfbyte.matmul_4bit" in str(program.graph)
        compiled = torch.compile(torch.nn.Sequential(module, torch.nn.ReLU()), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), module(x).relu())


def test_what_it_leaves_to_the_general_way(device):
    packed, state = weight(device)
    module = layer(device)
    x = torch.randn(4, 128, device=device, dtype=torch.bfloat16)

    def refused(x, bias=None):
        return _native.eager_matmul_4bit(x, packed, state, bias) is None

    assert not refused(x)
    assert _native.eager_linear_4bit(module, x) is not None
    wide = torch.randn(4, 256, device=device, dtype=torch.bfloat16)
    for other in (
        wide,
        wide[:, ::2],
        x.double(),
        x.int(),
        x[:, :64],
        torch.empty(4, 0, device=device),
        x.sum(),
        3,
        None,
    ):
        assert refused(other)
        assert _native.eager_linear_4bit(module, other) is None
    assert refused(torch.nn.Parameter(x))
    assert refused(x.to("meta"))
    assert refused(x, torch.randn(48, device=device))
    assert refused(x, torch.randn(47, device=device, dtype=torch.bfloat16))
    assert refused(x, "bias")
    assert _native.eager_matmul_4bit(x, packed[:10], state) is None
    assert _native.eager_matmul_4bit(x, packed, None) is None
    assert _native.eager_matmul_4bit(x, packed, 3) is None
    assert _native.eager_linear_4bit(torch.nn.Linear(128, 48), x) is None
    assert _native.eager_linear_4bit(None, x) is None

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Watch():
        assert refused(x)
    assert not refused(x.detach().requires_grad_().detach())
    leaf = x.clone().requires_grad_()
    assert refused(leaf)
    bias = torch.zeros(48, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert refused(x, bias)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert not refused(leaf, bias)
            assert not _native.eager_matmul_4bit(leaf, packed, state, bias).requires_grad
    with torch.inference_mode():
        assert _native.eager_matmul_4bit(x, packed, state).is_inference()
    seen = []
    torch.func.vmap(lambda row: seen.append(_native.eager_matmul_4bit(row, packed, state)) or row)(x)
    assert seen == [None]
    module.compute_dtype = torch.float32
    assert _native.eager_linear_4bit(module, x) is None
    module.compute_dtype, module.compute_type_is_set = None, False
    assert _native.eager_linear_4bit(module, x) is None
    assert module.compute_type_is_set is False


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("compute", [None, "inferred", *FLOATS])
def test_autocast(device, inner, compute):
    """Taken where nothing has to be cast, with the result that the general way has."""
    fixed = None if compute == "inferred" else compute
    module = Linear4bit(128, 48, False, compute_dtype=fixed, quant_type="nf4").to(device)
    packed, state = module.weight, module.weight.quant_state
    for dtype in FLOATS:
        x = torch.randn(4, 128, device=device, dtype=dtype)
        if compute == "inferred":
            module.compute_dtype, module.compute_type_is_set = None, False
            module(torch.zeros(1, 128, device=device))
            assert module.compute_dtype is torch.float32
        with torch.autocast(device, inner, enabled=inner is not None):
            taken = _native.eager_linear_4bit(module, x)
            wanted = module.compute_dtype if compute not in (None, "inferred") or inner is None else inner
            assert (taken is not None) == (dtype == wanted), dtype
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(linear4bit, "_eager", lambda *_: None)
                patch.setattr(_matmul, "_eager", lambda *_: None)
                want = module(x)
                product = halfbyte.matmul_4bit(x, packed, state)
            if taken is not None:
                assert taken.dtype == want.dtype
                assert torch.equal(taken, want)
            taken = _native.eager_matmul_4bit(x, packed, state)
            assert (taken is not None) == (inner in (None, dtype))
            if taken is not None:
                assert taken.dtype == product.dtype
                assert torch.equal(taken, product)
        if compute is None and inner is None:
            module.compute_dtype, module.compute_type_is_set = None, False
    with torch.autocast("cpu" if device == "cuda" else "cuda", torch.float16):  # of the other device
        x = torch.randn(4, 128, device=device)
        assert _native.eager_matmul_4bit(x, packed, state) is not None


@pytest.mark.parametrize("field", ["absmax", "shape", "blocksize", "quant_type", "state2", "offset", "nested"])
def test_fields_of_the_state_that_make_no_sense(device, field):
    packed, state = weight(device, nested=True)
    x = torch.randn(4, 128, device=device)
    sane = {"absmax": torch.zeros(3, device=device, dtype=torch.uint8), "shape": (48, 64), "blocksize": 65}
    for value in (
        sane.get(field, "nonsense"),
        object(),
        -1,
        [48, 128],
        (1,),
        (-1, 128),
        2**80,
        (2**70, 128),
        x,
        x.cpu(),
    ):
        setattr(state, field, value)
        got = _native.eager_matmul_4bit(x, packed, state)
        if field == "nested":
            assert got is None or value  # any true value will do
        else:
            assert got is None
    delattr(state, field)
    assert _native.eager_matmul_4bit(x, packed, state) is None


def test_tensors_of_other_types_are_not_read(device):
    """Their address may be that of anything."""

    class Wrapped(torch.Tensor):
        pass

    packed, state = weight(device)
    x = torch.randn(4, 128, device=device)
    want = halfbyte.matmul_4bit(x, packed, state)
    state.absmax = state.absmax.as_subclass(Wrapped)
    assert _native.eager_matmul_4bit(x, packed, state) is None
    assert torch.equal(halfbyte.matmul_4bit(x, packed, state).as_subclass(torch.Tensor), want)


def test_what_was_edited_moved_or_swapped_is_what_is_used(device):
    module = layer(device, nested := 48, compress_statistics=True)
    assert nested == module.out_features
    x = torch.randn(2, 128, device=device, dtype=torch.bfloat16)
    module(x)

    def check():
        got = _native.eager_linear_4bit(module, x)
        dense = F.dequantize_4bit(module.weight.data, module.weight.quant_state).to(x.dtype)
        exact = x.double() @ dense.double().t()
        assert (got.double() - exact).abs().max() <= 0.02 * exact.abs().max() + 1e-6
        return got

    check()
    state = module.weight.quant_state
    with torch.no_grad():
        module.weight.data.bitwise_xor_(0x11)
        check()
        module.weight.data = module.weight.data.flip(0).clone()
        check()
        state.offset.mul_(2)
        check()
        state.offset = state.offset / 4
        check()
        state.state2.absmax = state.state2.absmax.clone().mul_(3)
        check()
        state.absmax.set_(state.absmax.clone())
        check()
    state.absmax.resize_(1)
    assert _native.eager_linear_4bit(module, x) is None  # too few of them, and nothing is read beyond
    other = layer(device, quant_storage=torch.float16)
    module.weight = other.weight
    assert torch.equal(check(), other(x))
    module.weight = None
    assert _native.eager_linear_4bit(module, x) is None


def test_plain_tensors_are_a_closed_set():
    assert {torch.Tensor, torch.nn.Parameter} <= ops.PLAIN_TENSORS


@pytest.mark.gpu
def test_a_state_on_another_device_is_refused():
    packed, state = weight("cuda")
    x = torch.randn(1, 128, device="cuda", dtype=torch.bfloat16)
    state.absmax = state.absmax.cpu()
    assert _native.eager_matmul_4bit(x, packed, state) is None
    assert _native.eager_matmul_4bit(x.cpu(), packed, state) is None


@pytest.mark.gpu
def test_captured_after_one_call_elsewhere():
    """One call on any stream is all the warm-up that a capture needs."""
    module = layer("cuda", 768, 256, bias=True, compress_statistics=True)
    for rows in (1, 8, 32, 512):
        x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
        with torch.cuda.stream(torch.cuda.Stream()):
            module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            out = module(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(out, module(x)), rows


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_layer_on_another_device_than_the_current_one():
    modules = [layer(f"cuda:{i}", 768, 256, compress_statistics=True) for i in (0, 1)]
    with torch.no_grad():
        for rows in (1, 16, 512):
            for current in (0, 1):
                with torch.cuda.device(current):
                    for i, module in enumerate(modules):
                        x = torch.randn(rows, 256, device=f"cuda:{i}", dtype=torch.bfloat16)
                        got = _native.eager_linear_4bit(module, x)
                        assert got.device == x.device
                        assert torch.equal(got, general(x, module.weight, module.weight.quant_state))
                        assert torch.cuda.current_device() == current
            with pytest.raises(halfbyte.errors.DeviceError):
                modules[0](torch.randn(rows, 256, device="cuda:1", dtype=torch.bfloat16))


@pytest.mark.gpu
def test_threads_streams_and_graphs_at_once():
    """Every thread multiplies by layers that all share, on streams of its own, directly and by replays of its graph."""
    devices = [f"cuda:{i}" for i in range(min(2, torch.cuda.device_count()))]
    layers = {
        d: [layer(d, n, k, compress_statistics=c) for n, k, c in ((768, 256, True), (256, 768, False))] for d in devices
    }
    torch.cuda.synchronize()
    wrong = []
    capturing = threading.Lock()  # torch captures one graph at a time

    def work(number):
        try:
            device = devices[number % len(devices)]
            first, second = layers[device]
            torch.cuda.set_device(device)
            random = torch.Generator(device).manual_seed(number)
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                rows = (1, 4, 16, 24, 200)[number % 5]
                x = torch.empty(rows, 256, device=device, dtype=torch.bfloat16)
                x.normal_(generator=random)
                second(first(x))
                graph = torch.cuda.CUDAGraph()
                with capturing:
                    torch.cuda.synchronize()
                    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                        replayed = second(first(x))
                for turn in range(30):
                    with torch.cuda.stream(torch.cuda.Stream() if turn % 3 == 0 else torch.cuda.current_stream()):
                        x.normal_(generator=random)
                        graph.replay()
                        middle = first(x)
                        direct = second(middle)
                        slow = general(
                            general(x, first.weight, first.weight.quant_state), second.weight, second.weight.quant_state
                        )
                        torch.cuda.current_stream().synchronize()
                        if not torch.equal(direct, replayed) or not torch.equal(direct, slow):
                            wrong.append((number, turn))
        except Exception as error:
            wrong.append((number, repr(error)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
