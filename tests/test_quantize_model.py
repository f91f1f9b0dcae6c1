"""quantize_model: which layers it replaces, what it keeps, what it frees, and how it reports."""

import gc
import re
import sys
import types
import weakref

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte import functional as F
from halfbyte import quantize_model
from halfbyte.errors import ArgumentError, DtypeError
from halfbyte.nn import Linear4bit


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.gate = nn.Linear(64, 4, bias=False)
        self.down = nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x))) * self.gate(x).sum(-1, keepdim=True)


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 100, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.lm_head(self.norm(x))


def quantized_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


ALL = {f"layers.{i}.{name}" for i in range(3) for name in ("up", "gate", "down")}


def test_replaces_linear_layers_in_place(device):
    model = Model().to(device)
    ids = torch.randint(0, 100, (2, 7), device=device)
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in ALL}
    biases = {name: model.get_submodule(name).bias for name in ALL}
    expected = model(ids)
    assert quantize_model(model, "nf4", double_quant=True) is model
    assert quantized_names(model) == ALL
    for name in ALL:
        layer = model.get_submodule(name)
        packed, state = F.quantize_4bit(dense[name], quant_type="nf4", compress_statistics=True)
        assert torch.equal(layer.weight.data, packed)
        assert layer.quant_state == layer.weight.quant_state == state
        assert layer.bias is biases[name]
        assert layer.weight.module is layer
    out = model(ids)
    assert (out - expected).norm() / expected.norm() < 0.2
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_options_reach_the_layers(quant_type, double, storage, blocksize):
    model = quantize_model(
        Model(),
        quant_type,
        double_quant=double,
        blocksize=blocksize,
        compute_dtype=torch.bfloat16,
        quant_storage=storage,
    )
    weight = model.layers[0].up.weight
    assert (weight.quant_type, weight.compress_statistics, weight.blocksize) == (quant_type, double, blocksize)
    assert weight.dtype == weight.quant_storage == model.layers[0].up.quant_storage == storage
    assert (weight.quant_state.blocksize, weight.quant_state.nested) == (blocksize, double)
    assert model.layers[0].up.compute_dtype == torch.bfloat16


def test_state_dict_round_trips_with_the_keys_of_bitsandbytes():
    model = quantize_model(Model())
    stored = model.state_dict()
    assert "layers.0.up.weight.quant_state.bitsandbytes__nf4" in stored
    assert "layers.0.up.weight.nested_absmax" in stored
    with torch.device("meta"):
        twin = quantize_model(Model())
    assert twin.layers[0].up.weight.is_meta
    twin.load_state_dict(stored, assign=True)
    ids = torch.randint(0, 100, (1, 5))
    assert torch.equal(twin(ids), model(ids))


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), set()),
        (("up",), {f"layers.{i}.up" for i in range(3)}),
        (("layers.1",), {f"layers.1.{n}" for n in ("up", "gate", "down")}),
        (("1.up",), {"layers.1.up"}),
        (("layers",), ALL),
        ((r"layers\.[02]\.(up|down)",), {f"layers.{i}.{n}" for i in (0, 2) for n in ("up", "down")}),
        (("ayers", "p", "layers.1.u"), set()),
        ("gate", {f"layers.{i}.gate" for i in range(3)}),
    ],
)
def test_skip_patterns(skip, left):
    model = quantize_model(Model(), skip=skip)
    head = set() if skip in ((), ("ayers", "p", "layers.1.u")) or "lm_head" not in skip else {"lm_head"}
    assert quantized_names(model) == (ALL | {"lm_head"}) - left - head


def test_output_embeddings_stay_whatever_they_are_called():
    model = Model()
    model.readout = model.lm_head
    del model.lm_head
    model.get_output_embeddings = types.MethodType(lambda self: self.readout, model)
    assert quantized_names(quantize_model(model)) == ALL


def test_tied_weights_stay():
    model = quantize_model(Model(tied=True), skip=())
    assert quantized_names(model) == ALL
    assert model.lm_head.weight is model.embed.weight


def test_only_exact_linear_layers_are_replaced():
    class Custom(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "custom": Custom(64, 64),
            "attention": nn.MultiheadAttention(64, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            "plain": nn.Linear(64, 64),
            "done": halfbyte.nn.LinearFP4(64, 64),
        }
    )
    done = model["done"]
    quantize_model(model)
    assert type(model["custom"]) is Custom
    assert type(model["attention"].out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert not isinstance(model["normed"], Linear4bit)
    assert isinstance(model["plain"], Linear4bit)
    assert model["done"] is done


def test_a_layer_with_two_names_is_one_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model.append(model[0])
    quantize_model(model)
    assert model[0] is model[3]
    assert isinstance(model[0], Linear4bit)
    skipped = nn.Sequential(nn.Linear(64, 64))
    skipped.add_module("again", skipped[0])
    assert not quantized_names(quantize_model(skipped, skip=("again",)))


def test_a_single_layer_is_returned_replaced():
    layer = nn.Linear(64, 32)
    weight = layer.weight.detach().clone()
    result = quantize_model(layer, device="cpu")
    assert isinstance(result, Linear4bit)
    assert torch.equal(result.weight.data, F.quantize_4bit(weight, quant_type="nf4")[0])


def test_training_flag_hooks_and_dtypes_are_kept():
    model = Model().bfloat16().eval()
    calls = []
    model.layers[0].up.register_forward_hook(lambda *args: calls.append("after"))
    model.layers[0].up.register_forward_pre_hook(lambda *args, **kwargs: calls.append("before"), with_kwargs=True)
    quantize_model(model)
    assert not model.layers[0].up.training
    assert model.layers[0].up.quant_state.dtype == torch.bfloat16
    assert model.layers[0].up.bias.dtype == torch.bfloat16
    assert model(torch.randint(0, 100, (1, 3))).dtype == torch.bfloat16
    assert calls == ["before", "after"]


def test_float_weights_are_freed_one_by_one():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    layers = list(model)  # the caller holds the old layers
    weights = [weakref.ref(layer.weight) for layer in layers]
    alive = []

    def report(done, total, name):
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))

    quantize_model(model, progress=report)
    assert alive == [4, 3, 2, 1, 0]


def test_progress_by_function():
    seen = []
    quantize_model(Model(), progress=lambda done, total, name: seen.append((done, total, name)))
    assert [done for done, _, _ in seen] == list(range(10))
    assert {total for _, total, _ in seen} == {9}
    assert {name for _, _, name in seen} == ALL | {""}


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_a_bar_only_where_it_is_wanted(capsys, monkeypatch, progress, terminal, shown):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    quantize_model(Model(), progress=progress)
    captured = capsys.readouterr()
    assert not captured.out
    assert bool(re.search("Quantizing", captured.err)) == shown


def test_nothing_to_do_is_said(caplog):
    quantize_model(nn.ReLU())
    assert "no nn.Linear" in caplog.text


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ArgumentError, {"quant_type": "nf5"}),
        (ArgumentError, {"blocksize": 100}),
        (ArgumentError, {"skip": ["("]}),
        (DtypeError, {"quant_storage": torch.int64}),
    ],
)
def test_bad_arguments_change_nothing(error, arguments):
    model = Model()
    with pytest.raises(error, match=next(iter(arguments))):
        quantize_model(model, **arguments)
    assert not quantized_names(model)


def test_a_layer_of_another_dtype_is_named_and_nothing_changed():
    model = Model()
    model.layers[2].up.double()
    with pytest.raises(DtypeError, match=r"layers\.2\.up\.weight"):
        quantize_model(model)
    assert not quantized_names(model)


@pytest.mark.gpu
def test_onto_a_device():
    model = Model()
    expected = quantize_model(Model())
    expected.load_state_dict(quantize_model(model, device="cuda").state_dict())
    assert all(p.is_cuda for p in model.parameters())
    assert model.layers[0].up.quant_state.state2.absmax.is_cuda
    ids = torch.randint(0, 100, (1, 5))
    torch.testing.assert_close(model(ids.cuda()).cpu(), expected(ids), rtol=1e-3, atol=1e-3)
