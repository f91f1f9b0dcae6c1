"""The float weight of a new layer: nn.Linear's values, drawn when something first looks at them."""

import copy
import io
import pickle
import threading
import time
from collections import OrderedDict

import pytest
import torch

from halfbyte import functional as F
from halfbyte.nn import Linear4bit, Params4bit
from halfbyte.nn._initial import Undrawn


def fresh(n=48, k=64, seed=5, **more):
    torch.manual_seed(seed)
    return Linear4bit(k, n, **more)


def waits(module):
    return isinstance(module._parameters, Undrawn) and module._parameters._seed is not None


READERS = {
    "attribute": lambda m: m.weight,
    "getattr": lambda m: getattr(m, "weight", None),
    "parameters": lambda m: next(m.parameters()),
    "named_parameters": lambda m: dict(m.named_parameters())["weight"],
    "get_parameter": lambda m: m.get_parameter("weight"),
    "state_dict": lambda m: m.state_dict()["weight"],
    "state_dict with parameters": lambda m: m.state_dict(keep_vars=True)["weight"],
    "_parameters": lambda m: m._parameters["weight"],
    "get": lambda m: m._parameters.get("weight"),
    "items": lambda m: dict(m._parameters.items())["weight"],
    "values": lambda m: next(iter(m._parameters.values())),
    "dict": lambda m: dict(m._parameters)["weight"],
    "splat": lambda m: {**m._parameters}["weight"],
    "or": lambda m: (m._parameters | {})["weight"],
    "ror": lambda m: ({} | m._parameters)["weight"],
    "ordered": lambda m: OrderedDict(m._parameters)["weight"],
    "copied": lambda m: m._parameters.copy()["weight"],
    "copy.copy of it": lambda m: copy.copy(m._parameters)["weight"],
    "pop": lambda m: m._parameters.pop("weight"),
    "popitem": lambda m: [m._parameters.popitem() for _ in range(2)][1][1],
    "setdefault": lambda m: m._parameters.setdefault("weight"),
    "copy": lambda m: copy.copy(m).weight,
    "deepcopy": lambda m: copy.deepcopy(m).weight,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).weight,
    "vars": lambda m: vars(m)["_parameters"]["weight"],
    "apply": lambda m: m._apply(lambda t: t * 1).weight,
    "float": lambda m: m.float().weight,
    "wider": lambda m: m.double().float().weight,
    "compiled": torch.compile(lambda m: m.weight + 0, backend="eager"),
}


@pytest.mark.parametrize("how", READERS)
def test_whoever_looks_finds_them(how):
    want = fresh().weight.data.clone()
    module = fresh()
    assert waits(module)
    with torch.no_grad():
        got = READERS[how](module)
    assert not waits(module)
    assert type(module._parameters) is dict
    assert torch.equal(got.detach().as_subclass(torch.Tensor), want)
    if "pop" not in how:
        assert list(module._parameters) == ["weight", "bias"]


def test_the_module_as_a_whole():
    want = fresh().weight.data.clone()
    assert torch.equal(fresh().state_dict()["weight"], want)
    file = io.BytesIO()
    torch.save(fresh(), file)
    assert torch.equal(torch.load(io.BytesIO(file.getvalue()), weights_only=False).weight.data, want)
    assert torch.equal(copy.deepcopy(fresh()).weight.data, want)
    assert torch.equal(fresh().bfloat16().weight.data, want.bfloat16())
    packed, state = F.quantize_4bit(want, quant_type="fp4", compress_statistics=True)
    moved = fresh().to("cpu")
    assert torch.equal(moved.weight.data, packed)
    assert moved.weight.quant_state == state
    assert torch.equal(F.quantize_4bit(fresh().weight, quant_type="fp4")[0], packed)


def test_they_are_those_of_nn_linear_and_follow_the_seed():
    torch.manual_seed(5)
    theirs = torch.nn.Linear(256, 512)
    ours = fresh(512, 256)
    bound = 256**-0.5
    for a, b in ((ours.weight.data, theirs.weight.data), (ours.bias, theirs.bias)):
        assert a.abs().max() <= bound
        assert a.dtype == b.dtype
        assert abs(a.std() / b.std() - 1) < 0.1
        assert abs(a.mean()) < 0.1 * bound
    assert torch.equal(ours.weight.data, fresh(512, 256).weight.data)
    assert not torch.equal(ours.weight.data, fresh(512, 256, seed=6).weight.data)
    torch.manual_seed(5)
    one, two = Linear4bit(64, 48, False), Linear4bit(64, 48, False)
    assert not torch.equal(two.weight.data, one.weight.data)
    # When they are looked at makes no difference, and takes nothing from the generator.
    torch.manual_seed(5)
    first, second = Linear4bit(64, 48, False), Linear4bit(64, 48, False)
    before = torch.get_rng_state()
    assert torch.equal(first.weight.data, one.weight.data)
    assert torch.equal(second.weight.data, two.weight.data)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_look_at_them():
    module = fresh()
    assert "weight" in module._parameters
    assert list(module._parameters) == list(module._parameters.keys()) == ["weight", "bias"]
    assert len(module._parameters) == 2
    assert "weight" in dir(module)
    assert module.bias.shape == (48,)
    module.train().eval()
    assert waits(module)


def test_what_held_the_dict_sees_the_module():
    module = fresh()
    held, twin = module._parameters, copy.copy(module)
    assert waits(module)
    weight = module.weight
    assert type(module._parameters) is dict
    assert held["weight"] is weight
    assert twin.weight is weight
    module.register_parameter("more", torch.nn.Parameter(torch.ones(1)))
    assert "more" in held
    assert len(held) == 3
    assert held == module._parameters
    held["bias"] = None
    assert module.bias is None
    del held["more"]
    assert not hasattr(module, "more")


def test_replaced_ones_are_never_drawn(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda *_, **__: pytest.fail("drawn"))
    for replace in (
        lambda m, w: setattr(m, "weight", w),
        lambda m, w: m.register_parameter("weight", w),
        lambda m, w: m._parameters.__setitem__("weight", w),
    ):
        module = fresh(4096, 14336)
        weight = Params4bit(torch.ones(4, 4), quant_type="nf4")
        replace(module, weight)
        assert type(module._parameters) is dict
        assert module.weight is weight
        module.to("cpu")
        assert module.weight.bnb_quantized


def test_a_replacement_that_fails_replaces_nothing():
    module = fresh()
    with pytest.raises(TypeError):
        module.weight = 3
    with pytest.raises(TypeError):
        module.register_parameter("weight", torch.ones(3))
    grown = torch.nn.Parameter(torch.ones(3), requires_grad=False).add_(torch.ones(3, requires_grad=True))
    with pytest.raises(ValueError, match="non-leaf"):
        module.register_parameter("weight", grown)
    assert waits(module)
    assert torch.equal(module.weight.data, fresh().weight.data)
    module = fresh()
    del module.weight
    assert not hasattr(module, "weight")
    module = fresh()
    module.weight = None
    assert module.weight is None


def test_what_resets_them():
    module = fresh()
    module.weight.data.fill_(1)
    torch.manual_seed(5)
    module.reset_parameters()
    assert waits(module)
    assert torch.equal(module.weight.data, fresh().weight.data)

    class Halved(Linear4bit):
        def reset_parameters(self):
            super().reset_parameters()
            self.weight.data.mul_(0.5)

    torch.manual_seed(5)
    assert torch.equal(Halved(64, 48).weight.data, fresh().weight.data * 0.5)
    assert isinstance(Halved(64, 48).weight, Params4bit)


def test_where_they_are_drawn_at_once():
    with torch.inference_mode():
        assert not waits(fresh())
    assert not waits(Linear4bit(64, 48, device="meta"))
    with pytest.warns(UserWarning, match="zero-element"):
        assert not waits(Linear4bit(0, 48))
    torch.set_default_dtype(torch.bfloat16)
    assert fresh().weight.data.dtype == torch.bfloat16


def test_a_float_weight_that_trains():
    module = fresh().requires_grad_()
    weight = module.weight
    (weight**2).sum().backward()
    assert torch.equal(weight.grad, 2 * weight.data)


def test_threads_find_all_of_them():
    want = fresh(512, 1024).weight.data.clone()
    for _ in range(5):
        module, gate, wrong = fresh(512, 1024), threading.Barrier(4), []

        def look(module=module, gate=gate, wrong=wrong):
            gate.wait()
            if not torch.equal(module.weight.detach(), want):
                wrong.append(time.monotonic())

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@pytest.mark.gpu
def test_on_cuda_they_are_drawn_at_once():
    module = fresh(device="cuda")
    assert not waits(module)
    assert module.weight.data.std() > 0.01
    moved = fresh(quant_type="nf4").to("cuda")
    assert torch.equal(moved.weight.data.cpu(), fresh(quant_type="nf4").to("cpu").weight.data)
