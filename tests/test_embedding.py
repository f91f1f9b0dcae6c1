"""Embeddings: rows of a 4-bit table are the rows of the decoded table, saved and loaded; Stable and plain ones."""

import copy
import io
import logging

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import ArgumentError
from halfbyte.nn import Embedding, Embedding4bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding

STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "halfbyte.nn")


def table(width=64, height=101, kind="nf4", storage=torch.uint8, dtype=None, double=False, blocksize=64, device="cpu"):
    made = Embedding4bit(height, width, dtype, kind, storage, blocksize=blocksize)
    made.weight.compress_statistics = double
    return made.to(device)


def raw(state_dict):
    return {key: value.reshape(-1).view(torch.uint8).tolist() for key, value in state_dict.items()}


def dense(module):
    return hb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("width", "blocksize"), [(64, 64), (192, 64), (65, 64), (100, 32), (63, 64), (1, 32), (96, 32)]
)
def test_rows_are_those_of_the_decoded_table(device, kind, storage, double, width, blocksize):
    module = table(width, 257, kind, storage, double=double, blocksize=blocksize, device=device)
    for shape in ((), (7,), (3, 5), (2, 3, 4), (0,)):
        index = torch.randint(0, 257, shape, device=device)
        rows = module(index)
        assert rows.shape == (*shape, width)
        assert torch.equal(rows, dense(module)[index])
        assert torch.equal(module(index.int()), rows)
    assert torch.equal(module(torch.tensor([0, 256], device=device)), dense(module)[[0, 256]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_table(device, dtype):
    module = table(64, dtype=dtype, device=device)
    assert module(torch.tensor([1], device=device)).dtype is dtype
    # A change of dtype leaves the bytes alone.
    before = dense(module)
    assert torch.equal(dense(module.half()), before)


@pytest.mark.parametrize("width", [64, 65])
@pytest.mark.parametrize("row", [-1, 101, 2**40])
def test_rows_that_do_not_exist_are_refused(width, row):
    with pytest.raises((IndexError, RuntimeError)):
        table(width)(torch.tensor([0, row]))


def test_one_that_is_not_quantized_says_so():
    module = EmbeddingNF4(10, 64)
    with pytest.raises(ArgumentError, match=r"EmbeddingNF4\.weight: not quantized yet"):
        module(torch.tensor([1]))
    with pytest.raises(NotImplementedError, match=r"EmbeddingNF4.*not quantized yet"):
        module.state_dict()


def test_rows_that_share_scales_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "halfbyte.nn"):
        EmbeddingFP4(10, 65)
        assert "slow inference" in caplog.text
        caplog.clear()
        EmbeddingFP4(10, 128)
        EmbeddingFP4(10, 96, blocksize=32)
        assert not caplog.text


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("target", ["float", "quantized", "meta"])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_go_round(storage, double, target, assign):
    module = table(65, storage=storage, double=double)
    stored = module.state_dict()
    assert set(stored) >= {"weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"}
    twin = Embedding4bit(101, 65, quant_type="fp4", device="meta" if target == "meta" else None)
    if target == "quantized":
        twin.to("cpu")
    twin.load_state_dict(stored, assign=assign or target == "meta")
    index = torch.arange(101)
    assert torch.equal(twin(index), module(index))
    assert raw(twin.state_dict()) == raw(stored)
    with pytest.raises(RuntimeError, match=r"size mismatch.*\[101, 65\]"):
        Embedding4bit(102, 65).load_state_dict(stored)


def test_a_float_table_loads_and_is_quantized():
    plain = torch.nn.Embedding(50, 64)
    for module in (EmbeddingNF4(50, 64), EmbeddingNF4(50, 64).to("cpu")):
        module.load_state_dict(plain.state_dict())
        module.to("cpu")
        packed, state = hb.functional.quantize_4bit(plain.weight.data, quant_type="nf4")
        assert torch.equal(module.weight.data, packed)
        assert torch.equal(dense(module), hb.functional.dequantize_4bit(packed, state))


def test_copies_and_pickles_are_whole():
    module = table(64)
    index = torch.arange(101)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(twin(index), module(index))


@pytest.mark.parametrize("width", [64, 65])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
def test_it_compiles_whole(device, width, storage, double):
    torch.compiler.reset()
    module = table(width, storage=storage, double=double, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for shape in ((4,), (2, 9)):
        index = torch.randint(0, 101, shape, device=device)
        assert torch.equal(compiled(index), module(index))


def test_a_state_that_the_parameter_lost_is_given_back(device):
    module = table(64, device=device)
    index = torch.arange(3, device=device)
    expected = module(index)
    module.weight.quant_state = None
    assert torch.equal(module(index), expected)
    assert module.weight.quant_state is not None


def test_the_frozen_table_lets_gradients_through_what_follows(device):
    module = table(64, device=device)
    head = torch.nn.Linear(64, 3, device=device)
    head(module(torch.arange(5, device=device))).sum().backward()
    assert head.weight.grad is not None
    assert not module.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stable_one_normalizes(dtype):
    module = StableEmbedding(20, 32, padding_idx=3, dtype=dtype)
    assert bool((module.weight[3] == 0).all())
    index = torch.tensor([[1, 2], [3, 4]])
    rows = module(index)
    assert rows.dtype is dtype
    plain = torch.nn.functional.layer_norm(module.weight[index].float(), (32,), module.norm.weight, module.norm.bias)
    torch.testing.assert_close(rows, plain.to(dtype))
    rows.float().pow(2).sum().backward()
    assert module.weight.grad is not None
    bound = (6 / (20 + 32)) ** 0.5
    assert 0.5 * bound < module.weight.abs().max() <= bound


def test_the_plain_one_is_torchs_with_other_values():
    module = Embedding(20, 32, padding_idx=0, max_norm=None, scale_grad_by_freq=True)
    index = torch.tensor([1, 2, 2])
    assert torch.equal(module(index), module.weight[index])
    assert module.scale_grad_by_freq
    assert bool((module.weight[0] == 0).all())
    given = torch.randn(20, 32)
    assert torch.equal(Embedding(20, 32, _weight=given).weight, given)
