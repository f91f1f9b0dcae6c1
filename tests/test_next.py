"""prefetch_linears: the next weight is fetched, and nothing else that anyone could notice."""

from __future__ import annotations

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte import _native, _next, errors, prefetch_linears


class Weight:
    """What ``Order`` asks a tensor on a GPU."""

    def __init__(self, address, nbytes, device="cuda:0"):
        self.address, self.nbytes, self.device = address, nbytes, torch.device(device)

    def data_ptr(self):
        return self.address


@pytest.fixture
def said(monkeypatch):
    calls = []
    monkeypatch.setattr(_next, "_read_next", lambda *call: calls.append(call))
    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return calls


def test_each_weight_is_told_of_the_next(said):
    order = _next.Order(most_bytes=1 << 30)
    weights = [(Weight(100 * i, 64 * i), Weight(100 * i + 50, 8 * i)) for i in range(1, 4)]
    assert [order.add(*both, rows=4) for both in weights] == [False, True, True]
    quarter = 1 << 18  # of the L2
    assert said == [
        (100, [(200, 4, 32), (250, 4, 4)], quarter),
        (200, [(300, 4, 48), (350, 4, 6)], quarter),
    ]


def test_a_hint_is_gone_with_either_weight(said):
    order = _next.Order()
    first, second, scales = Weight(100, 64), Weight(200, 64), Weight(250, 8)
    order.add(first, Weight(150, 8), 4)
    order.add(second, scales, 4)
    said.clear()
    del scales
    gc.collect()
    assert said == [(100, None, 0)]
    del first, second
    gc.collect()
    assert said == [(100, None, 0)] * 3


def test_orders_end_and_do_not_cross_devices(said):
    order = _next.Order()
    kept = [Weight(100 * i, 64, device) for i, device in enumerate(("cuda:0", "cuda:1", "cpu", "cuda:0", "cuda:0"), 1)]
    assert [order.add(weight, weight, 4) for weight in kept[:4]] == [False] * 4
    order.end()
    assert not order.add(kept[4], kept[4], 4)
    assert not said


def test_copies_begin_anew(said):
    order = _next.Order(most_bytes=7)
    kept = [Weight(100, 64), Weight(200, 64)]
    order.add(kept[0], kept[0], 4)
    for again in (pickle.loads(pickle.dumps(order)), copy.deepcopy(order)):
        assert again.most_bytes == 7
        assert not again.add(kept[1], kept[1], 4)
    assert not said


def test_weights_that_are_gone_have_no_next(said):
    order = _next.Order()
    order.add(Weight(100, 64), Weight(150, 8), 4)
    gc.collect()
    assert not order.add(Weight(200, 64), Weight(250, 8), 4)
    assert not said


def test_arguments():
    layers = nn.Sequential(*(halfbyte.nn.LinearNF4(64, 64, bias=False) for _ in range(2)))
    assert prefetch_linears(layers) == 0  # not quantized yet
    assert prefetch_linears(layers.to("cpu")) == 0
    with pytest.raises(errors.ArgumentError, match="most_bytes"):
        prefetch_linears(layers, -1)
    if hasattr(_native, "read_next_4bit"):
        with pytest.raises(errors.ArgumentError, match="rows"):
            _native.read_next_4bit(1 << 60, [(0, 1, 1 << 32), (0, 1, 1)], 1)


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_results_are_the_same(double, rows):
    torch.manual_seed(rows)
    shapes = [(512, 768), (1000, 512), (64, 960), (4096, 64)]
    layers = [
        halfbyte.nn.LinearNF4(k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double)
        for n, k in shapes
    ]
    model = nn.ModuleList(layers).cuda()
    inputs = [torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for _, k in shapes]

    def run():
        with torch.no_grad():
            return [layer(x) for layer, x in zip(model, inputs, strict=True)]

    expected = run()
    for most in (1 << 10, 1 << 16, 1 << 30):
        assert prefetch_linears(model, most) == len(shapes) - 1
        assert all(map(torch.equal, run(), expected))
    address = model[0].weight.data_ptr()
    del model[1]
    gc.collect()
    torch.cuda.empty_cache()
    # The hint went with the weight that it was of; one of memory that is nobody's does no harm.
    nowhere = (1 << 44) + 128
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model[0](inputs[0]), expected[0])
        _native.read_next_4bit(address, [(nowhere, 4096, 2048), (0, 4096, 256)], 1 << 24)
    torch.cuda.synchronize()
    assert prefetch_linears(model, 0) == 0
