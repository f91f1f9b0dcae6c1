"""Optimizers on a GPU: CUDA graphs, many tensors, streams, paging, gradient scaling."""

import copy
import gc
import io
import time

import pytest
import torch

import halfbyte as hb
from halfbyte import optim
from halfbyte.optim import _pages

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
EVERY = {
    "AdamW8bit": {},
    "AdamW32bit": {},
    "AdEMAMix8bit": {"t_alpha": 50, "t_beta3": 50},
    "AdEMAMix32bit": {},
    "Lion8bit": {"weight_decay": 0.1},
    "Lion32bit": {},
    "SGD8bit": {"lr": 0.01, "momentum": 0.9},
    "RMSprop8bit": {},
    "Adagrad8bit": {},
    "LAMB8bit": {},
    "LARS8bit": {"lr": 0.1, "momentum": 0.9},
}


def parameters(sizes, dtype=BF16, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, device="cuda", generator=generator).to(dtype)) for n in sizes]


def give_gradients(params, step, into=False):
    generator = torch.Generator(device="cuda").manual_seed(100 + step)
    for p in params:
        grad = (torch.randn(p.shape, device="cuda", generator=generator) * 0.01).to(p.dtype)
        if into and p.grad is not None:
            p.grad.copy_(grad)
        else:
            p.grad = grad


def captured(graphed, eager):
    """Step both, and return the graph of another step of the first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graphed.step()
    torch.cuda.current_stream().wait_stream(side)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    return graph


def compare_replays(graphed, params, eager, twins, prepare=lambda graphed: None):
    """Replay a captured step beside eager ones, and compare parameters."""
    give_gradients(params, 0)
    give_gradients(twins, 0)
    graph = captured(graphed, eager)
    for step in range(1, 6):
        give_gradients(params, step, into=True)
        give_gradients(twins, step)
        prepare(graphed)
        graph.replay()
        eager.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)


def states(optimizer):
    return [
        {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
        for state in optimizer.state.values()
    ]


def assert_equal_states(one, other):
    for a, b in zip(states(one), states(other), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if torch.is_tensor(value):
                assert torch.equal(value.cpu(), b[key].cpu()), key


@pytest.mark.parametrize("name", EVERY)
def test_the_gpu_does_what_the_cpu_does(name):
    params = parameters([4096, 5000, 100, 70_001])
    twins = [torch.nn.Parameter(p.detach().cpu()) for p in params]
    one, other = getattr(optim, name)(params, **EVERY[name]), getattr(optim, name)(twins, **EVERY[name])
    for step in range(10):
        give_gradients(params, step)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.cpu()
        one.step()
        other.step()
        for p, q in zip(params, twins, strict=True):
            far = ~torch.isclose(p.detach().cpu().float(), q.detach().float(), rtol=1e-2, atol=1e-5)
            assert far.float().mean() <= 0.001  # codes of a tie, and what follows from them
            q.data.copy_(p)


# Some with an end beside whole tiles; one whose second scales are not aligned in AdEMAMix's states; the last for a
# gradient that is not.
LARGE = [1 << 20, 3_000_000, (1 << 22) + 24 * 256 * 5, (1 << 20) + 256, 5000, (1 << 21) + 4096]


def unaligned(tensor):
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:].copy_(tensor)


def make_uncommon(params):
    for p in params:  # blocks with what is left alone, with nothing, and with much
        p.grad[::77_777] = float("inf")
        p.grad[1::99_991] = float("nan")
        p.grad[256 * 40 : 256 * 43] = 0
        p.grad[256 * 50 : 256 * 51] = 60000


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "name", [name for name in EVERY if name.endswith("8bit") and name not in ("LAMB8bit", "LARS8bit")]
)
def test_large_parameters_are_what_their_parts_are(name, dtype):
    # Blocks of large 16-bit parameters go another way than those of parts of them, to the same bits.
    part = 256 * 1500
    params = parameters(LARGE, dtype)
    twins = [torch.nn.Parameter(piece.clone()) for p in params for piece in p.detach().split(part)]
    one, other = (getattr(optim, name)(ps, min_8bit_size=1, **EVERY[name]) for ps in (params, twins))
    for step in range(4):
        give_gradients(params, step)
        make_uncommon(params)
        params[-1].grad = unaligned(params[-1].grad)
        for q, piece in zip(twins, [piece for p in params for piece in p.grad.split(part)], strict=True):
            # What is not aligned is worked on an element at a time, and rounded at other places.
            q.grad = piece.clone() if piece.data_ptr() % 16 == 0 else unaligned(piece)
        one.step()
        other.step()
        assert torch.equal(torch.cat([p.detach() for p in params]), torch.cat([q.detach() for q in twins]))
    for key in ("state1", "state2", "absmax2"):
        if key in one.state[params[0]] and name != "AdEMAMix8bit":
            pairs = ((one, params), (other, twins))
            mine, theirs = ([optimizer.state[p][key].flatten() for p in ps] for optimizer, ps in pairs)
            assert torch.equal(torch.cat(mine), torch.cat(theirs)), key


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion8bit"])
def test_large_parameters_in_a_captured_step_and_beside_small_ones(name):
    sizes = [70_001, 1 << 21, 100, 1_500_000]
    params, twins = parameters(sizes), parameters(sizes)
    one = getattr(optim, name)(params, capturable=True, **EVERY[name])
    other = getattr(optim, name)(twins, capturable=True, **EVERY[name])
    compare_replays(one, params, other, twins)


@pytest.mark.parametrize("name", EVERY)
def test_a_captured_step_equals_eager_ones(name):
    sizes = [4096, 5000, 100]
    params, twins = parameters(sizes), parameters(sizes)
    graphed = getattr(optim, name)(params, capturable=True, **EVERY[name])
    eager = getattr(optim, name)(twins, **EVERY[name])
    give_gradients(params, 0)
    give_gradients(twins, 0)
    graph = captured(graphed, eager)
    replays = 1000 if name == "AdamW8bit" else 20
    for step in range(1, 1 + replays):
        give_gradients(params, step % 50, into=True)
        give_gradients(twins, step % 50)
        graph.replay()
        eager.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)
    assert [state["step"] for state in graphed.state_dict()["state"].values()] == [1 + replays] * len(sizes)
    assert all(isinstance(state["step"], int) for state in graphed.state_dict()["state"].values())


def test_the_learning_rate_of_a_captured_step_is_a_tensor():
    (p,) = parameters([5000], torch.float32)
    lr = torch.tensor(0.0, device="cuda")
    optimizer = optim.AdamW([p], lr=lr, weight_decay=0.0, capturable=True)
    give_gradients([p], 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    before = p.detach().clone()
    graph.replay()
    assert torch.equal(p, before)
    lr.fill_(1e-2)
    graph.replay()
    assert (p.detach() - before).abs().mean().item() == pytest.approx(1e-2, rel=0.2)


def test_448_tensors_are_a_step_of_few_launches():
    params = parameters([65_536] * 448)
    optimizer = optim.AdamW8bit(params, lr=1e-4)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 4, [event.name for event in kernels]


@pytest.mark.alone
def test_it_runs_on_the_current_stream_and_waits_for_nothing():
    (p,) = parameters([1 << 20], torch.float32)
    optimizer = optim.AdamW8bit([p], lr=1e-2, weight_decay=0.0)
    give_gradients([p], 0)
    optimizer.step()
    torch.cuda.synchronize()
    before = p.detach().clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(1_000_000_000)  # cycles: half a second
        start = time.perf_counter()
        optimizer.step()
        assert time.perf_counter() - start < 0.1
    assert not side.query()
    assert torch.equal(p.detach().clone(), before)  # of another stream: the step waits behind the sleep
    torch.cuda.synchronize()
    assert not torch.equal(p.detach(), before)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    (p,), (q,) = parameters([5000], torch.float32), parameters([5000], torch.float32)
    optimizer, plain = optim.AdamW([p], capturable=fused), optim.AdamW([q])
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    for step in range(6):
        give_gradients([q], step)
        p.grad = q.grad * scaler.get_scale()
        if step == 3:
            p.grad[7] = float("inf")
        scaler.scale(torch.zeros((), device="cuda"))
        scaler.step(optimizer)
        scaler.update()
        if step != 3:
            plain.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert scaler.get_scale() == 512.0
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [5]


def test_clipping_in_the_step():
    params, twins = parameters([5000, 300, 70_000], torch.float32), parameters([5000, 300, 70_000], torch.float32)
    clipped, plain = optim.AdamW8bit(params, max_grad_norm=0.1), optim.AdamW8bit(twins)
    for step in range(5):
        give_gradients(params, step)
        give_gradients(twins, step)
        raw = [p.grad.clone() for p in params]
        clipped.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, raw, strict=True))
        norm = torch.nn.utils.clip_grad_norm_(twins, 0.1)
        torch.testing.assert_close(clipped.grad_norm, norm.view(1), rtol=1e-5, atol=0)
        plain.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def paged(params, bits=8):
    return optim.PagedAdamW(params, lr=1e-3, optim_bits=bits)


@pytest.mark.parametrize("bits", [8, 32])
def test_paged_states_are_those_of_ordinary_memory(bits):
    sizes = [200_000, 5000, 131_072, (1 << 22) + 256]
    params, twins = parameters(sizes), parameters(sizes)
    one, other = paged(params, bits), optim.AdamW(twins, lr=1e-3, optim_bits=bits)
    for step in range(5):
        give_gradients(params, step)
        give_gradients(twins, step)
        one.step()
        other.step()
    torch.cuda.synchronize()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert getattr(one.state[p]["state1"], "is_paged", False) == (p.numel() >= 100_000)
        assert one.state[p]["state1"].is_cuda
    assert_equal_states(one, other)


def step_both(one, params, other, twins, step):
    """Step two optimizers with the same gradients, and compare parameters."""
    for group in (params, twins):
        give_gradients(group, step)
        make_uncommon([p for p in group if p.numel() >= 1 << 20])
    one.step()
    other.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p.view(torch.int16), q.view(torch.int16))


def to_host(optimizer):
    """Move all paged states to the host."""
    for state in optimizer.state.values():
        for value in state.values():
            if getattr(value, "is_paged", False):
                _pages.prefetch_tensor(value, to_cpu=True)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion8bit"])
def test_large_paged_parameters_are_those_of_ordinary_memory(name, dtype):
    # Their states are copied by loads and stores instead of in bulk; every second step finds them on the host.
    params, twins = parameters(LARGE, dtype), parameters(LARGE, dtype)
    one, other = getattr(optim, f"Paged{name}")(params, **EVERY[name]), getattr(optim, name)(twins, **EVERY[name])
    for step in range(5):
        step_both(one, params, other, twins, step)
        if step % 2:
            to_host(one)
    assert all(getattr(one.state[p]["state1"], "is_paged", False) == (p.numel() > 5000) for p in params)
    assert_equal_states(one, other)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_large_parameters_of_which_some_are_paged(name):
    # One step has both kinds of tiles in the same places, in an order that changes.
    sizes = [1 << 21, 1_500_000, (1 << 20) + 100, 5000, 3_000_000, 1 << 20, 1 << 20, (1 << 21) + 256 * 30]
    params, twins = parameters(sizes), parameters(sizes)
    one, other = getattr(optim, f"Paged{name}")(params, **EVERY[name]), getattr(optim, name)(twins, **EVERY[name])
    for step in range(4):
        step_both(one, params, other, twins, step)
        for i, p in enumerate(params):
            if (i + step) % 3 == 0:
                for key in ("state1", "state2"):
                    if key in one.state[p]:
                        one.state[p][key] = one.state[p][key].clone()  # in ordinary memory from here on
        to_host(one)
    assert_equal_states(one, other)


def test_a_captured_step_of_large_paged_parameters():
    sizes = [1 << 21, 70_001, 1_500_000]
    params, twins = parameters(sizes), parameters(sizes)
    one, other = optim.PagedAdamW8bit(params, capturable=True), optim.AdamW8bit(twins, capturable=True)
    compare_replays(one, params, other, twins, prepare=to_host)


@pytest.mark.parametrize("moved", ["grad", "parameter"])
def test_a_large_parameter_or_gradient_in_managed_memory(moved):
    # That is not copied in bulk at all, wherever the states are.
    n = (1 << 21) + 256
    (p,), (q,), (r,) = parameters([n]), parameters([n]), parameters([n])
    managed = _pages.get_paged(n, dtype=BF16, device="cuda")
    if moved == "parameter":
        managed.copy_(p.detach())
        p, r = (torch.nn.Parameter(where) for where in (managed, managed.clone()))
    one, other, paged_one = optim.AdamW8bit([p]), optim.AdamW8bit([q]), optim.PagedAdamW8bit([r])
    for step in range(4):
        for params in ([p], [q], [r]):
            give_gradients(params, step)
            make_uncommon(params)
        if moved == "grad":
            managed.copy_(p.grad)
            p.grad = managed
        _pages.prefetch_tensor(managed, to_cpu=True)
        one.step()
        other.step()
        paged_one.step()
    assert torch.equal(p.view(torch.int16), q.view(torch.int16))
    assert torch.equal(r.view(torch.int16), q.view(torch.int16))
    assert_equal_states(one, other)


@pytest.mark.parametrize("kind", ["state dict", "file", "deepcopy"])
def test_paging_is_there_again_after_a_resumption_and_it_goes_on_bit_for_bit(kind):
    params = parameters([200_000, 5000])
    optimizer = paged(params)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    if kind == "deepcopy":
        twins, resumed = copy.deepcopy((params, optimizer))
    else:
        resumed = paged(twins)
        saved = optimizer.state_dict()
        if kind == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        resumed.load_state_dict(saved)
    assert resumed.state[twins[0]]["state1"].is_paged
    assert resumed.state[twins[0]]["state1"].data_ptr() != optimizer.state[params[0]]["state1"].data_ptr()
    for step in range(3, 6):
        give_gradients(params, step)
        give_gradients(twins, step)
        optimizer.step()
        resumed.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert_equal_states(optimizer, resumed)


def test_paged_tensors_as_functions_have_them():
    paged = _pages.get_paged(3, 1000, dtype=torch.float32, device="cuda")
    assert paged.is_cuda and paged.shape == (3, 1000) and not paged.any()
    assert paged.data_ptr() == torch.frombuffer(paged.page_buffer, dtype=torch.uint8).data_ptr()  # no copy of it
    assert _pages.get_paged(0, device="cuda").shape == (0,)
    _pages.fill(paged, 2.0)
    _pages._mul(paged, paged.clone())
    _pages.prefetch_tensor(paged, to_cpu=True)
    _pages.prefetch_tensor(paged)
    assert torch.all(paged == 4.0)
    manager = _pages.GlobalPageManager.get_instance()
    manager.paged_tensors.append(paged)
    manager.prefetch_all(to_cpu=True)
    manager.initialize()
    assert paged.sum().item() == 12_000
    with pytest.raises(hb.errors.ArgumentError, match="A:"):
        _pages.prefetch_tensor(torch.zeros(3, device="cuda"))


@pytest.mark.alone
def test_paged_memory_is_given_back():
    def used():
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free

    params = parameters([1 << 26])
    give_gradients(params, 0)
    before = used()
    for _ in range(3):
        optimizer = paged(params, 32)
        optimizer.step()
        assert used() - before > 400e6
        del optimizer
        gc.collect()  # the first step of a process brings the compiler in, whose import keeps what called it
    torch.cuda.empty_cache()
    assert used() - before < 100e6


@pytest.mark.alone
@pytest.mark.parametrize("bits", [8, 32])
def test_a_step_survives_states_larger_than_the_memory_that_is_left(bits):
    """Little is left to the states: what does not fit beside the rest lies on the host."""
    size = 1 << (28 if bits == 8 else 26)  # 512 MiB of states
    params = parameters([size])
    twins = parameters([size])
    give_gradients(params, 0)
    give_gradients(twins, 0)
    ordinary = optim.AdamW(twins, lr=1e-3, optim_bits=bits)
    ordinary.step()
    ordinary.step()
    del ordinary
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(max(free - (300 << 20), 0), dtype=torch.uint8, device="cuda")
    try:
        optimizer = paged(params, bits)
        optimizer.step()
        optimizer.step()
        torch.cuda.synchronize()
    finally:
        del filler  # or the traceback of a failure would keep it
    assert torch.equal(params[0], twins[0])


def test_states_of_8_bits_take_little_memory():
    params = parameters([1 << 24])
    give_gradients(params, 0)
    optimizer = optim.AdamW8bit(params)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert (torch.cuda.memory_allocated() - before) / (1 << 24) <= 2.07


def test_the_update_of_one_tensor_as_a_function():
    (p,), (q,) = parameters([5000], torch.float32), parameters([5000], torch.float32)
    optimizer = optim.AdamW8bit([q])
    give_gradients([p], 0)
    give_gradients([q], 0)
    optimizer.step()
    qmap1, qmap2 = (hb.functional.create_dynamic_map(signed=s).cuda() for s in (True, False))
    codes = [torch.zeros(5000, dtype=torch.uint8, device="cuda") for _ in range(2)]
    scales = [torch.zeros(20, device="cuda") for _ in range(2)]
    hb.functional.optimizer_update_8bit_blockwise(
        "adam", p.grad, p, *codes, 0.9, 0.999, 0.0, 0.0, 1e-8, 1, 1e-3, qmap1, qmap2, *scales, 0.01
    )
    assert torch.equal(p, q)
    assert torch.equal(codes[1], optimizer.state[q]["state2"])
    assert torch.equal(scales[0], optimizer.state[q]["absmax1"])


def test_a_model_moved_to_the_gpu_after_its_optimizer_was_loaded():
    model = torch.nn.Linear(128, 128)
    optimizer = optim.AdamW8bit(model.parameters())
    model(torch.randn(3, 128)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    again = optim.AdamW8bit(model.parameters())
    again.load_state_dict(saved)
    model.cuda()
    model.zero_grad()
    model(torch.randn(3, 128, device="cuda")).sum().backward()
    again.step()
    assert again.state[model.weight]["state1"].is_cuda
