"""State dicts: their form, resumption bit for bit, what older versions and other tools wrote, and what is damaged."""

import copy
import io
import pickle

import pytest
import torch
from optim_reference import decode, dynamic_map
from test_optim_options import give_gradients, parameter

from halfbyte import optim
from halfbyte.errors import CheckpointError

BF16, F32 = torch.bfloat16, torch.float32
WRAPPED = "__bnb_optimizer_quant_state__"
EVERY = {
    "AdamW8bit": {},
    "AdamW": {},
    "AdEMAMix8bit": {"t_alpha": 50, "t_beta3": 50},
    "AdEMAMix": {},
    "Lion8bit": {"weight_decay": 0.1},
    "SGD8bit": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    "RMSprop8bit": {},
    "Adagrad8bit": {},
    "LAMB8bit": {},
    "LARS": {"lr": 0.1, "momentum": 0.9},
    "AdamW8bit kahan": {"kahan_sum": True},
    "AdamW master": {"master_weights": True},
    "Lion8bit stochastic": {"stochastic_rounding": True, "seed": 3},
}


def make(name, params):
    return getattr(optim, name.split()[0])(params, **EVERY[name])


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_states(one, other):
    for a, b in zip(one.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key], key
            if torch.is_tensor(value) and not key.startswith("qmap"):
                assert value.data_ptr() != b[key].data_ptr(), key


@pytest.mark.parametrize("way", ["memory", "file", "pickle", "deepcopy", "flat"])
@pytest.mark.parametrize("name", EVERY)
def test_resumed_training_is_the_same_bit_for_bit(name, way, device):
    params = [parameter(n, BF16, device) for n in (5000, (64, 100), 7)]
    optimizer = make(name, params)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    if way in ("pickle", "deepcopy"):
        both = (params, optimizer)
        twins, resumed = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    else:
        resumed = make(name, twins)
        saved = optimizer.state_dict()
        if way == "file":
            saved = through_a_file(saved)
        if way == "flat":  # as versions before the wrapping wrote it
            saved["state"] = {
                index: {key: value for key, value in state.items() if key != WRAPPED} | state[WRAPPED]
                for index, state in saved["state"].items()
            }
        resumed.load_state_dict(saved)
    assert_equal_states(optimizer, resumed)
    for step in range(3, 6):
        give_gradients(params, step)
        give_gradients(twins, step)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert_equal_states(optimizer, resumed)


def test_tensors_are_nested_so_that_fsdp_does_not_gather_them():
    params = [parameter(5000), parameter(10)]
    optimizer = optim.LAMB(params, optim_bits=8)
    give_gradients(params)
    optimizer.step()
    saved = optimizer.state_dict()
    eight, full = saved["state"][0], saved["state"][1]
    assert set(eight) == set(full) == {"step", WRAPPED} and eight["step"] == 1
    assert set(eight[WRAPPED]) == {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec"}
    assert set(full[WRAPPED]) == {"state1", "state2", "unorm_vec"}
    assert set(saved["param_groups"][0]) == {
        "lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3", "params",
    }  # fmt: skip
    # The optimizer's own is not wrapped, and shares no dict with what was given out.
    assert "state1" in optimizer.state[params[0]] and WRAPPED not in optimizer.state[params[0]]
    before = copy.deepcopy(saved)
    other = optim.LAMB(params, optim_bits=8)
    other.load_state_dict(saved)
    other.step()
    assert saved["state"][0][WRAPPED]["state1"].equal(before["state"][0][WRAPPED]["state1"])


def test_a_state_keeps_its_type_whatever_the_parameter_and_the_arguments():
    params = [parameter(5000, BF16), parameter(10, BF16)]
    optimizer = optim.AdamW(params)
    give_gradients(params)
    optimizer.step()
    other = optim.AdamW(params, optim_bits=8)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[params[0]]["state1"].dtype == F32
    give_gradients(params)
    other.step()
    assert other.state[params[0]]["step"] == 2


def test_options_that_a_file_does_not_know_are_kept_and_others_follow_it():
    p = parameter(5000, BF16)
    plain = optim.AdamW8bit([p], lr=0.5)
    give_gradients([p])
    plain.step()
    careful = optim.AdamW8bit([p], lr=0.1, kahan_sum=True)
    careful.load_state_dict(plain.state_dict())
    assert careful.param_groups[0]["kahan_sum"] and careful.param_groups[0]["lr"] == 0.5
    assert careful.state[p]["compensation"].dtype == BF16
    careful.step()
    again = optim.AdamW8bit([p])
    again.load_state_dict(careful.state_dict())
    assert again.param_groups[0]["kahan_sum"]
    assert torch.equal(again.state[p]["compensation"], careful.state[p]["compensation"])


def test_hooks_see_a_state_dict_that_is_loaded():
    p = parameter(10)
    optimizer = optim.AdamW([p])
    give_gradients([p])
    optimizer.step()
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [1, "after"]


# ---- what older versions wrote


def trained(n, cls=optim.AdamW8bit, **kwargs):
    p = parameter(n)
    optimizer = cls([p], **kwargs)
    for step in range(3):
        give_gradients([p], step)
        optimizer.step()
    return p, optimizer, copy.deepcopy(optimizer.state_dict())


def reloaded(p, saved, cls=optim.AdamW8bit):
    optimizer = cls([p])
    optimizer.load_state_dict(saved)
    return optimizer.state[p]


@pytest.mark.parametrize("n", [4096, 5000, 10_001])
def test_blocks_of_2048_elements_keep_their_values(n):
    """Until 0.44."""
    p, _, saved = trained(n)
    inner = saved["state"][0][WRAPPED]
    for name in ("absmax1", "absmax2"):
        inner[name] = torch.rand(-(-n // 2048)) + 0.5
    state = reloaded(p, saved)
    for which, signed in (("1", True), ("2", False)):
        assert state[f"absmax{which}"].shape == (-(-n // 256),)
        scales = inner[f"absmax{which}"].double().repeat_interleave(2048)[:n]
        wanted = dynamic_map(signed).double()[inner[f"state{which}"].long()] * scales
        assert torch.equal(decode(state[f"state{which}"], state[f"absmax{which}"], signed), wanted)


def test_one_scale_for_a_whole_tensor_keeps_its_values():
    """Until 0.45, with ``block_wise=False``: ``max1`` and the like beside the codes."""
    p, _, saved = trained(5000)
    inner = saved["state"][0][WRAPPED]
    del inner["absmax1"], inner["absmax2"]
    inner |= {"max1": torch.tensor([2.0]), "max2": torch.tensor([3.0]), "new_max1": torch.tensor([1.0])}
    state = reloaded(p, saved)
    assert "max1" not in state and "new_max1" not in state
    assert torch.equal(state["absmax1"], torch.full((20,), 2.0)) and torch.equal(
        state["absmax2"], torch.full((20,), 3.0)
    )


def test_codes_of_another_map_become_the_nearest_of_ours():
    p, _, saved = trained(5000)
    inner = saved["state"][0][WRAPPED]
    before = inner["state1"].clone()
    inner["qmap1"] = torch.linspace(-1, 1, 256)
    state = reloaded(p, saved)
    scales = inner["absmax1"].repeat_interleave(256)[:5000]
    wanted = inner["qmap1"][inner["state1"].long()] * scales
    torch.testing.assert_close(
        decode(state["state1"], state["absmax1"], True).float(), wanted, rtol=0.1, atol=0.01 * float(scales.max())
    )
    assert torch.equal(inner["state1"], before)  # the caller's
    assert torch.equal(state["qmap1"], dynamic_map(True))


def test_a_step_may_be_a_tensor_and_a_state_of_another_float_type():
    p, _, saved = trained(100)
    saved["state"][0]["step"] = torch.tensor(3.0)
    saved["state"][0][WRAPPED]["state1"] = saved["state"][0][WRAPPED]["state1"].to(BF16)
    state = reloaded(p, saved)
    assert state["step"] == 3 and isinstance(state["step"], int) and state["state1"].dtype == F32


# ---- what is damaged


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda saved: saved["state"][0][WRAPPED].update(state1=torch.zeros(4999, dtype=torch.uint8)), "state1"),
        (lambda saved: saved["state"][0][WRAPPED].update(state2=torch.zeros(5000, dtype=torch.int32)), "state2"),
        (lambda saved: saved["state"][0][WRAPPED].update(absmax1=torch.zeros(7)), "absmax1"),
        (lambda saved: saved["state"][0][WRAPPED].pop("absmax2"), "absmax2"),
        (lambda saved: saved["state"][0][WRAPPED].pop("qmap1"), "qmap1"),
        (lambda saved: saved["state"][0][WRAPPED].update(qmap2=torch.zeros(16)), "qmap2"),
        (lambda saved: saved["state"][0].update(step=-1), "step"),
        (lambda saved: saved["state"][0].update(step=torch.zeros(2)), "step"),
        (lambda saved: saved["state"][0].pop("step"), "step"),
        (lambda saved: saved["param_groups"].append(saved["param_groups"][0]), "param_groups"),
        (lambda saved: saved["param_groups"][0].update(params=[0, 1]), r"param_groups\[0\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(damage, message):
    _, optimizer, saved = trained(5000)
    damage(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        optimizer.load_state_dict(saved)
    assert isinstance(caught.value, ValueError)
    after = optimizer.state_dict()
    assert after["state"][0]["step"] == before["state"][0]["step"]
    for key, value in before["state"][0][WRAPPED].items():
        assert torch.equal(value, after["state"][0][WRAPPED][key])
    optimizer.step()
