"""What an optimizer remembers of the step before, and what it must notice: whatever changes between two steps is seen.

An optimizer that forgets all it knows before each step is the reference: both must do the same, bit for bit.
"""

from collections import UserDict

import pytest
import torch
from test_optim_options import parameter
from test_optim_state import through_a_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from halfbyte import _native, optim
from halfbyte.errors import HalfbyteError, ShapeError

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((64, 80), (64, 64), 5000, (8, 8, 3, 3), 1, (2, 3, 4, 5, 6, 7))


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(p.device, p.dtype)


def elsewhere(params, states):
    params[0].data = params[0].data.clone()


def another_type_at_the_same_address(params, states):
    params[0].data = params[0].data.view(F16)
    params[0].grad = params[0].grad.to(F16)


def another_shape_at_the_same_address(params, states):
    params[0].data = params[0].data.view(80, 64)
    params[0].grad = params[0].grad.view(80, 64)


def a_parameter_is_left_out(params, states):
    params[1].grad = None


def all_but_one_are_left_out(params, states):
    for p in params[1:]:
        p.grad = None


def a_gradient_is_not_contiguous(params, states):
    params[1].grad = params[1].grad.t().contiguous().t()


def a_gradient_begins_anywhere(params, states):
    buffer = torch.zeros(5001, dtype=BF16, device=params[2].device)
    buffer[1:] = params[2].grad
    params[2].grad = buffer[1:]


def gradients_are_the_same_tensors(params, states):
    params[0].grad = params[0].kept = getattr(params[0], "kept", params[0].grad)


def gradients_are_changed_in_place(params, states):
    for p in params:
        p.grad.data = p.grad.clone()


def a_state_is_another_tensor(params, states):
    states[0]["state1"] = states[0]["state1"].clone()
    scales = "absmax2" if "absmax2" in states[1] else "state2"  # 32-bit states have none
    states[1][scales] = states[1][scales] * 2


def a_state_has_another_width(params, states):
    for name in ("state1", "state2"):
        states[0][name] = torch.zeros(states[0][name].shape, device=states[0][name].device)


def a_count_is_set(params, states):
    states[0]["step"] = 1000


def a_count_is_a_tensor(params, states):
    states[0]["step"] = torch.tensor(17.0)


def keys_are_other_strings_in_another_order(params, states):
    for state in states:
        items = [("".join(list(key)), value) for key, value in reversed(state.items())]
        state.clear()
        state.update(items)


def a_tensor_comes_into_a_state(params, states):
    states[0]["compensation"] = torch.zeros_like(params[0])


def something_else_comes_into_a_state(params, states):
    states[0]["note"] = "of somebody else"


def a_state_is_emptied(params, states):
    states[0].clear()


CHANGES = [
    elsewhere,
    another_type_at_the_same_address,
    another_shape_at_the_same_address,
    a_parameter_is_left_out,
    all_but_one_are_left_out,
    a_gradient_is_not_contiguous,
    a_gradient_begins_anywhere,
    gradients_are_the_same_tensors,
    gradients_are_changed_in_place,
    a_state_is_another_tensor,
    a_state_has_another_width,
    a_count_is_set,
    a_count_is_a_tensor,
    keys_are_other_strings_in_another_order,
    a_tensor_comes_into_a_state,
    something_else_comes_into_a_state,
    a_state_is_emptied,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "LAMB"])
def test_a_change_between_two_steps_is_noticed(name, change, device):
    keeps, forgets = ([parameter(shape, BF16, device, seed) for seed, shape in enumerate(SHAPES)] for _ in range(2))
    optimizers = [getattr(optim, name)(params, lr=1e-2) for params in (keeps, forgets)]
    for step in range(6):
        for params, optimizer in zip((keeps, forgets), optimizers, strict=True):
            give_gradients(params, step)
            if step in (2, 4):
                change(params, [optimizer.state[p] for p in params])
            optimizer._plans = optimizer._plans if params is keeps else None
            versions = [p._version for p in params]
            optimizer.step()
            assert all(p._version > version for p, version in zip(params, versions, strict=True))
        for p, q in zip(keeps, forgets, strict=True):
            assert torch.equal(p, q)
            ours, others = optimizers[0].state[p], optimizers[1].state[q]
            assert ours.keys() == others.keys()
            for key, value in ours.items():
                assert torch.equal(value, others[key]) if torch.is_tensor(value) else value == others[key], key


def test_a_gradient_of_another_type_is_read_as_such(device):
    """Autograd gives none; a caller of the core may."""
    p, q = (parameter((64, 80), BF16, device) for _ in range(2))
    plans, states = [], []
    for param in (p, q):
        optimizer = optim.AdamW8bit([param])
        give_gradients([param], 0)
        optimizer.step()
        states.append(optimizer.state[param])
    plans = [_native.OptimPlan("adam", [p], states[:1]), None]
    for step, dtype in enumerate([BF16, F32, F32, F16, BF16]):
        grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(step)).to(device, dtype)
        plans[1] = _native.OptimPlan("adam", [q], states[1:])
        for plan in plans:
            plan.step(1e-2, grads=[grad])
        assert torch.equal(p, q)


def test_a_parameter_that_is_turned_in_place_is_refused(device):
    p = parameter((64, 64), BF16, device)
    optimizer = optim.AdamW8bit([p], lr=1e-2)
    give_gradients([p], 0)
    optimizer.step()
    p.data = p.data.t()
    before = p.detach().clone()
    give_gradients([p], 1)
    with pytest.raises(ShapeError, match=r"params: .*a contiguous tensor"):
        optimizer.step()
    assert torch.equal(p, before)


def test_what_does_not_fit_is_refused_again_and_again_until_it_is_mended(device):
    p, q = parameter((64, 80), BF16, device), parameter(5000, BF16, device)
    optimizer = optim.AdamW8bit([p, q], lr=1e-2)
    give_gradients([p, q], 0)
    optimizer.step()
    whole = optimizer.state[q]["absmax1"]
    optimizer.state[q]["absmax1"] = whole[1:]
    optimizer.state[p]["state1"] = optimizer.state[p]["state1"].clone()
    before = p.detach().clone(), q.detach().clone()
    for step in (1, 2):
        give_gradients([p, q], step)
        with pytest.raises(HalfbyteError, match="absmax1"):
            optimizer.step()
        assert torch.equal(p, before[0])
        assert torch.equal(q, before[1])
        assert optimizer.state[p]["step"] == 1
    optimizer.state[q]["absmax1"] = whole
    optimizer.step()
    assert optimizer.state[p]["step"] == optimizer.state[q]["step"] == 2
    assert not torch.equal(p, before[0])


def test_a_gradient_of_another_length_is_refused_where_the_parameter_has_shrunk(device):
    p = parameter(5000, BF16, device)
    optimizer = optim.AdamW8bit([p], lr=1e-2)
    give_gradients([p], 0)
    optimizer.step()
    p.data = p.data[:4500]
    before = p.detach().clone()
    with pytest.raises(ShapeError):
        optimizer.step()  # with the gradient that it had
    assert torch.equal(p, before)


def test_groups_and_states_may_be_of_other_types():
    p, q = parameter((64, 80), BF16, "cpu"), parameter(5000, BF16, "cpu")
    optimizer = optim.AdamW8bit([p, q], lr=1e-2)
    for step, container in enumerate([list, tuple, tuple, list]):
        optimizer.param_groups[0]["params"] = container([p, q])
        give_gradients([p, q], step)
        optimizer.step()
    optimizer.state = UserDict(optimizer.state)
    plans = optimizer._plans
    optimizer.step()
    assert optimizer._plans is plans
    optimizer.param_groups[0]["params"] = (q,)
    optimizer.step()
    assert optimizer.state[p]["step"] == 5
    assert optimizer.state[q]["step"] == 6


def test_comparisons_of_containers():
    a, b, c = {"a": 1}, {"b": 1}, {}
    for kind in (list, tuple, iter):
        assert _native.same_items([a, b], kind([a, b]))
        assert not _native.same_items([a, b], kind([b, a]))
        assert not _native.same_items([a, b], kind([a]))
        assert not _native.same_items([a], kind([a, b]))
        assert not _native.same_items([a], kind([dict(a)]))
    for kind in (dict, UserDict):
        assert _native.same_values([a, b], kind({1: a, 2: b}))
        assert not _native.same_values([a, b], kind({1: b, 2: a}))
        assert not _native.same_values([a, b], kind({1: a}))
        assert not _native.same_values([a], kind({1: a, 2: b}))
    assert _native.all_filled([])
    assert _native.all_filled([a, b])
    assert not _native.all_filled([a, c, b])
    with pytest.raises(SystemError):
        _native.all_filled([a, 5])


@pytest.mark.parametrize("way", ["made", "from a file"])
def test_states_are_read_once(way, monkeypatch):
    """Reading them asks whether they are paged. (Keys from a file are other strings than those in the code.)"""
    p = parameter(5000, BF16, "cpu")
    optimizer = optim.AdamW8bit([p], lr=1e-2)
    give_gradients([p], 0)
    optimizer.step()
    if way == "from a file":
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        optimizer.step()
    read = []
    monkeypatch.setattr(torch.Tensor, "is_paged", property(lambda _: bool(read.append(1))), raising=False)
    for step in range(2):
        give_gradients([p], step)
        optimizer.step()
    assert not read
    optimizer.state[p]["state1"] = optimizer.state[p]["state1"].clone()
    optimizer.step()
    assert read
    assert optimizer.state[p]["step"] == (5 if way == "from a file" else 4)


def test_another_grad_attribute_is_used(monkeypatch):
    p, q = (parameter(5000, BF16, "cpu") for _ in range(2))
    optimizers = [optim.AdamW8bit([param], lr=1e-2) for param in (p, q)]
    plain = torch.Tensor.grad
    for step in range(2):
        give_gradients([p, q], step)
        q.grad = p.grad * 2
        optimizers[1].step()
        if step == 0:
            p.grad = q.grad
        else:
            monkeypatch.setattr(torch.Tensor, "grad", property(lambda self: plain.__get__(self) * 2))
        optimizers[0].step()
    assert torch.equal(p, q)


def test_hooks_are_called_once_with_what_the_step_was_called_with():
    p = parameter(5000, BF16, "cpu")
    optimizer = optim.AdamW8bit([p], lr=1e-2)
    give_gradients([p], 0)
    optimizer.step()
    calls = []

    def hook(who):
        return lambda *given: calls.append((who, *given))

    def closure():
        calls.append("closure")
        assert torch.is_grad_enabled()
        return 7

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        for kept in range(len(handles), 0, -1):
            calls.clear()
            assert optimizer.step() is None
            given = (optimizer, (optimizer,), {})
            names = ["global pre", "pre", "post", "global post"][-kept:]
            assert calls == [(name, *given) for name in names]
            calls.clear()
            assert optimizer.step(closure=closure) == 7
            given = (optimizer, (optimizer,), {"closure": closure})
            expected = [(name, *given) for name in names]
            expected.insert(max(0, kept - 2), "closure")
            assert calls == expected
            handles.pop(0).remove()
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    assert optimizer.step(closure) == 7
    assert calls == ["closure"]
    assert optimizer.state[p]["step"] == 10


def test_a_profiler_sees_the_step():
    p = parameter(5000, BF16, "cpu")
    optimizer = optim.AdamW8bit([p], lr=1e-2)
    give_gradients([p], 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert [event.name for event in profile.events()].count("Optimizer.step#AdamW8bit.step") == 1
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        optimizer.step()
    assert [event.name for event in profile.function_events].count("Optimizer.step#AdamW8bit.step") == 1


def test_autograd_notices_a_step_between_forward_and_backward(device):
    p = torch.nn.Parameter(torch.randn(64, 80, device=device))
    optimizer = optim.AdamW8bit([p], lr=1e-2)
    for step in range(3):
        loss = (p * p).sum()
        give_gradients([p], step)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_override_given_between_two_steps_is_used():
    p, q = parameter((64, 80), BF16, "cpu"), parameter(5000, BF16, "cpu")
    optimizer = optim.AdamW8bit([p, q], lr=1e-2)
    give_gradients([p, q], 0)
    optimizer.step()
    manager = optim.GlobalOptimManager.get_instance()
    try:
        manager.override_config(q, "lr", 0.0)
        before = p.detach().clone(), q.detach().clone()
        optimizer.step()
        assert not torch.equal(p, before[0])
        assert torch.equal(q, before[1])
    finally:
        manager.initialize()
