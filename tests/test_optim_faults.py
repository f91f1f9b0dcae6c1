"""What bitsandbytes 0.50.2 does wrong, a test for each: it fails on that behaviour and passes on the right one."""

import copy
import gc
import warnings

import pytest
import torch
from optim_reference import decode, dynamic_map

import halfbyte as hb
from halfbyte import optim
from halfbyte.errors import ArgumentError, UnsupportedError

BF16, F32 = torch.bfloat16, torch.float32


def parameter(n, dtype=F32, device="cpu", scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter((torch.randn(n, generator=generator) * scale).to(device, dtype))


def gradient(p, step=0, scale=0.01):
    generator = torch.Generator().manual_seed(1 + step)
    p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)


# ---- rules


def test_weight_decay_is_not_lost_in_bf16(device):
    """There: the decay is a rounding of its own, and 100 steps of 1e-5 leave 1.0 at 1.0."""
    p = torch.nn.Parameter(torch.full((4096,), 1.0, dtype=BF16, device=device))
    for cls, options in (
        (optim.AdamW8bit, {"kahan_sum": True}),
        (optim.AdamW8bit, {"master_weights": True}),
        (optim.AdamW8bit, {"stochastic_rounding": True}),
        (optim.AdamW, {"kahan_sum": True}),
        (optim.Lion8bit, {"kahan_sum": True}),
    ):
        p.data.fill_(1.0)
        optimizer = cls([p], lr=1e-3, weight_decay=1e-1, **options)
        for _ in range(100):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert p.float().mean().item() == pytest.approx((1 - 1e-4) ** 100, abs=2.1e-3), options


def test_update_and_decay_are_rounded_once(device):
    """There: two roundings. Of 1.0 in bf16, both a decay and an update of 0.3 units in the last place vanish alone."""
    unit = 2**-8  # below 1.0
    p = torch.nn.Parameter(torch.full((4096,), 1.0, dtype=BF16, device=device))
    optimizer = optim.AdamW8bit([p], lr=0.4 * unit, weight_decay=1.0)
    p.grad = torch.full_like(p, 1.0)
    optimizer.step()  # moves by lr, and decays by lr
    assert torch.equal(p.detach(), torch.full_like(p, 1.0 - unit))


@pytest.mark.parametrize("cls", [optim.RMSprop8bit, optim.Adagrad8bit], ids=str)
def test_weight_decay_reaches_the_update_of_8_bit_rmsprop_and_adagrad(cls, device):
    """There: the state gets the decayed gradient, the update the raw one."""
    p = torch.nn.Parameter(torch.full((4096,), 2.0, device=device))
    optimizer = cls([p], lr=0.01, weight_decay=0.1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (p < 1.995).all()


def test_a_gradient_scale_reaches_the_update_of_8_bit_rmsprop_and_adagrad(device):
    qmap = hb.functional.create_dynamic_map().to(device)
    for name in ("rmsprop", "adagrad"):
        results = []
        for factor, scale in ((1.0, 1.0), (128.0, 1 / 128)):
            p = parameter(4096, device=device)
            gradient(p)
            codes, absmax = torch.zeros(4096, dtype=torch.uint8, device=device), torch.zeros(16, device=device)
            hb.functional.optimizer_update_8bit_blockwise(
                name, p.grad * factor, p, codes, None, 0.9, 0.0, 0.0, 0.0, 1e-8, 1, 0.01, qmap, None, absmax, None,
                gnorm_scale=scale,
            )  # fmt: skip
            results.append((p.detach().clone(), codes))
        torch.testing.assert_close(*[p for p, _ in results])
        assert torch.equal(*[codes for _, codes in results])


@pytest.mark.parametrize("cls", [optim.LAMB8bit, optim.LARS8bit], ids=str)
def test_lamb_and_lars_have_8_bit_states_for_large_tensors(cls, device):
    """There: no such kernel on a GPU, ValueError from 4096 elements on."""
    kwargs = {"lr": 0.1, "momentum": 0.9} if cls is optim.LARS8bit else {}
    p, q = parameter(10_000, device=device), parameter(10_000, device=device)
    eight, full = cls([p], **kwargs), type(cls([p], **kwargs)).__mro__[2]([q], **kwargs)
    assert eight.args.optim_bits == 8 and full.args.optim_bits == 32
    for step in range(5):
        gradient(p, step)
        q.grad = p.grad.clone()
        eight.step()
        full.step()
    assert eight.state[p]["state1"].dtype == torch.uint8
    assert (p - q).abs().mean() < 0.02 * (parameter(10_000, device=device) - q).abs().mean()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["SGD", "LARS", "RMSprop", "Adagrad"])
def test_bf16_gradients_are_for_every_rule(name, bits, device):
    """There: no 32-bit kernels for bf16 of these four."""
    kwargs = {"lr": 0.01, "momentum": 0.9} if name in ("SGD", "LARS") else {}
    p = parameter(5000, BF16, device)
    before = p.detach().clone()
    optimizer = getattr(optim, name)([p], optim_bits=bits, **kwargs)
    gradient(p)
    optimizer.step()
    assert not torch.equal(p, before) and p.isfinite().all()


@pytest.mark.parametrize("cls", [optim.AdEMAMix32bit, optim.PagedAdEMAMix32bit], ids=str)
def test_ademamix_of_32_bits_has_room_for_both_means(cls, device):
    """There: half of it, and the kernel writes behind the end."""
    p, q = parameter(5000, device=device), parameter(5000, device=device)
    one, other = cls([p]), optim.ademamix._ReferenceAdEMAMix([q])
    for step in range(10):
        gradient(p, step)
        q.grad = p.grad.clone()
        one.step()
        other.step()
    assert one.state[p]["state1"].shape == (2, 5000)
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_ademamix_of_8_bits_keeps_scales_of_its_means_apart(device):
    """There: the slow mean's blocks start where the fast one's end, within a block if 256 does not divide the size."""
    p = torch.nn.Parameter(torch.zeros(4096 + 128, device=device))
    optimizer = optim.AdEMAMix8bit([p], lr=1e-3)
    p.grad = torch.zeros_like(p)
    p.grad[:4096] = 1e-3
    p.grad[4096:] = 10.0
    optimizer.step()
    state = optimizer.state[p]
    assert state["absmax1"].shape == (2, 17)
    for half, rate in ((0, 0.1), (1, 1e-4)):
        decoded = decode(state["state1"][half], state["absmax1"][half], True)
        torch.testing.assert_close(decoded, p.grad.double() * rate, rtol=0.02, atol=0)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["Adam", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_no_number_touches_nothing(name, bits, bad, device):
    """There: with two states it erases them, with one state it makes them, their block and the parameter NaN."""
    kwargs = {"lr": 0.01, "momentum": 0.9} if name in ("SGD", "LARS") else {}
    p = parameter(5000, device=device)
    optimizer = getattr(optim, name)([p], optim_bits=bits, **kwargs)
    gradient(p, 0)
    optimizer.step()
    before = p.detach().clone()
    gradient(p, 1)
    p.grad[300] = bad
    optimizer.step()
    state = optimizer.state[p]
    assert p[300] == before[300] and p.isfinite().all()
    assert torch.count_nonzero(p != before) > 4900
    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert key not in state or state[key].float().isfinite().all()
    if bits == 32:
        first = state["state1"][0] if name == "AdEMAMix" else state["state1"]
        assert first[300] != 0  # kept, not erased


def test_skip_zeros_leaves_states_of_such_elements_alone(device):
    """There: ignored with two 8-bit states, and what a register held before is written with one."""
    for name in ("Adam", "Lion", "RMSprop"):
        p = parameter(4096, device=device)
        optimizer = getattr(optim, name)([p], optim_bits=8)
        optimizer.args.skip_zeros = True
        gradient(p, 0)
        optimizer.step()
        before, codes = p.detach().clone(), optimizer.state[p]["state1"].clone()
        scales = optimizer.state[p]["absmax1"].clone()
        p.grad[::2] = 0
        optimizer.step()
        assert torch.equal(p.detach()[::2], before[::2])
        kept = decode(optimizer.state[p]["state1"], optimizer.state[p]["absmax1"], True)[::2]
        was = decode(codes, scales, True)[::2]
        torch.testing.assert_close(kept, was, rtol=0.05, atol=float(scales.max()) * 0.01)
        assert not torch.equal(p.detach()[1::2], before[1::2])


def test_codes_of_second_moments_near_zero_are_the_nearest(device):
    """There, on the CPU: a table of 65 536 equal bins, and values of 1e-6 of the largest become whole bins."""
    p = torch.nn.Parameter(torch.zeros(4096, device=device))
    optimizer = optim.Adam8bit([p], betas=(0.9, 0.5))
    values = torch.logspace(-3.4, 0, 256, device=device).repeat(16)  # squares down to 1.6e-7 of the largest
    p.grad = values.clone()
    optimizer.step()
    state = optimizer.state[p]
    table = dynamic_map(False).double()
    wanted = (0.5 * values.double() ** 2) / state["absmax2"].double().repeat_interleave(256)
    nearest = (wanted[:, None].cpu() - table[None, :]).abs().min(dim=1).values
    chosen = (wanted.cpu() - table[state["state2"].long().cpu()]).abs()
    assert (chosen <= nearest * (1 + 1e-4) + 1e-12).all()


# ---- arguments


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda p: optim.Adam(p, amsgrad=True), UnsupportedError),
        (lambda p: optim.AdamW32bit(p, amsgrad=True), UnsupportedError),
        (lambda p: optim.LAMB(p, amsgrad=True), UnsupportedError),
        (lambda p: optim.RMSprop(p, momentum=0.9), UnsupportedError),
        (lambda p: optim.Adam32bit(p, optim_bits=8), ArgumentError),
    ],
)
def test_arguments_that_mean_something_are_not_ignored(make, error):
    with pytest.raises(error) as caught:
        make([parameter(10)])
    assert isinstance(caught.value, ValueError)


def trained(cls, **kwargs):
    p = parameter(100)
    optimizer = cls([p], **kwargs)
    for step in range(3):
        gradient(p, step)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize(
    ("cls", "plain", "other"),
    [
        (optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"dampening": 0.5}),
        (optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"nesterov": True}),
        (optim.LARS, {"lr": 0.1, "momentum": 0.9, "max_unorm": 10.0}, {"dampening": 0.5}),
        (optim.LARS, {"lr": 0.1, "momentum": 0.9, "max_unorm": 10.0}, {"nesterov": True}),
        (optim.LAMB, {"max_unorm": 0.0}, {"bias_correction": False}),
        (optim.LAMB, {"max_unorm": 0.0, "weight_decay": 0.1}, {"adam_w_mode": False}),
    ],
)
def test_arguments_that_are_honoured_here(cls, plain, other):
    assert not torch.allclose(trained(cls, **plain), trained(cls, **plain, **other), rtol=1e-5)


# ---- the step


def test_a_step_leaves_parameters_and_gradients_where_they_are(device):
    """There: ``.data`` and ``.grad`` become contiguous copies, and views and ties are torn."""
    base = torch.randn(64, 128, device=device)
    p = torch.nn.Parameter(base.t())
    grad = torch.randn(64, 128, device=device).t()
    p.grad = grad
    before = p.detach().clone()
    optimizer = optim.AdamW8bit([p], min_8bit_size=1)
    optimizer.step()
    assert p.data_ptr() == base.data_ptr() and p.grad is grad
    assert p.stride() == (1, 128) and not torch.equal(p, before)
    q = torch.nn.Parameter(before.contiguous())
    q.grad = grad.contiguous()
    same = optim.AdamW8bit([q], min_8bit_size=1)
    same.step()
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["state1"], same.state[q]["state1"])


def test_autograd_is_told_that_a_parameter_has_changed(device):
    p = parameter(5000, device=device)
    version = p._version
    gradient(p)
    optim.AdamW8bit([p]).step()
    assert p._version > version
    loss = (p * p).sum()
    gradient(p)
    optimizer = optim.AdamW8bit([p])
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_paging_on_the_cpu_is_plain_memory_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = parameter(200_000)
        gradient(p)
        optimizer = optim.PagedAdamW8bit([p])
        optimizer.step()
    assert not hasattr(optimizer.state[p]["state1"], "is_paged")


def test_a_copied_optimizer_works():
    """There: it lacks half of its attributes."""
    model = torch.nn.Linear(100, 100)
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2)
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    twin, copied = copy.deepcopy((model, optimizer))
    for one, step in ((model, optimizer), (twin, copied)):
        one.zero_grad()
        one(torch.ones(1, 100)).sum().backward()
        step.step()
    assert torch.equal(model.weight, twin.weight)
    assert copied.state[twin.weight]["step"] == 2


# ---- the manager


def test_options_of_a_parameter_do_not_outlive_it():
    """There: they are kept by address, and go to whatever parameter is made at it."""
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    seen = set()
    for _ in range(50):
        p = parameter(5000)
        assert id(p) not in manager.pid2config
        optimizer = optim.AdamW8bit([p])
        gradient(p)
        optimizer.step()
        assert optimizer.state[p]["state1"].dtype == torch.uint8
        seen.add(id(p))
        manager.override_config(p, "optim_bits", 32)
        del p, optimizer
        gc.collect()
    assert manager.pid2config == {}


def test_a_module_that_has_registered_options_can_be_freed():
    """There: the list of modules holds it, weights and all, for good."""
    import weakref

    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    module = torch.nn.Embedding(10, 4)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    assert len(manager.module_weight_config_triple) == 1
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None and manager.module_weight_config_triple == []
