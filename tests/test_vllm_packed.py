"""What the vLLM plugin does without vLLM: weights that loaders cut, and checkpoints put together."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import functional as F
from halfbyte.errors import CheckpointError, ShapeError
from halfbyte.integrations.vllm.checkpoint import join
from halfbyte.integrations.vllm.packed import Format, PackedWeight, from_state, quantize

FORMATS = [Format("nf4"), Format("fp4", 128), Format("nf4", 32), Format("int8")]


def weight(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def place(form, shape, dtype=torch.bfloat16):
    return PackedWeight(*form.empty(shape), form, dtype, form.unit(shape))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_cuts_are_those_of_the_numbers(form, data):
    rows, blocks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    step = 1 if form.is_int8 else form.blocksize
    packed = quantize(weight(rows, 128 * blocks, seed=rows), form)
    dense = packed.dense()
    first, last = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    assert torch.equal(packed[first:last].dense(), dense[first:last])
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, 128 * blocks // step)] * 2)))
    cut = packed.narrow(1, left * step, (right - left) * step)
    assert isinstance(cut, PackedWeight) and cut.shape == (rows, (right - left) * step)
    assert torch.equal(cut.dense(), dense[:, left * step : right * step])
    # Both ways one after the other, as a fused layer's loader cuts what it reads and where it goes.
    target = place(form, (rows + 3, 128 * blocks))
    target.data.narrow(0, 2, rows).narrow(1, left * step, (right - left) * step).copy_(cut)
    assert torch.equal(target.dense()[2 : 2 + rows, left * step : right * step], cut.dense())
    assert not target.dense()[:2].any() and not target.dense()[2 + rows :].any()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_stacks(form):
    packed = quantize(weight(4, 6, 128), form)
    dense = packed.dense()
    assert torch.equal(packed[2].dense(), dense[2])
    for mine, its in zip(packed.chunk(2, dim=1), dense.chunk(2, dim=1), strict=True):
        assert torch.equal(mine.dense(), its)
    for mine, its in zip(packed.unbind(), dense.unbind(), strict=True):
        assert torch.equal(mine.unsqueeze(0).squeeze(0).dense(), its)
    target = place(form, (4, 12, 128))
    target.data[1].narrow(0, 6, 6).copy_(packed[3])
    assert torch.equal(target.dense()[1, 6:], dense[3])


def test_floats_are_quantized_where_they_go():
    stored = []
    target = place(Format("nf4"), (8, 128))
    target.stored = stored.append
    target.data[2:6].copy_(weight(4, 128))
    assert torch.equal(target.dense()[2:6], quantize(weight(4, 128), Format("nf4")).dense())
    assert stored == [4 * 128]
    target.uniform_(-1, 1)  # what a dummy model's loader does
    assert target.dense().abs().max() > 0.5


def test_anything_else_sees_the_numbers():
    packed = quantize(weight(6, 128), Format("nf4"))
    dense = packed.dense()
    assert torch.equal(packed.t(), dense.t())
    assert torch.equal(packed + 1, dense + 1)
    assert torch.equal(packed.float(), dense.float())
    parameter = torch.nn.Parameter(torch.zeros(3, 128), requires_grad=False)
    parameter.data.copy_(packed[3:])
    assert torch.equal(parameter, dense[3:].float())
    other = place(Format("fp4"), (6, 128))
    other.copy_(packed)
    assert torch.equal(other.dense(), quantize(dense, Format("fp4")).dense())


def test_blocks_that_run_across_rows():
    packed = quantize(weight(8, 96), Format("nf4"))
    assert packed.unit == 2
    assert torch.equal(packed[2:6].dense(), packed.dense()[2:6])
    with pytest.raises(ShapeError, match=r"rows 1 to 3 of 8 .* multiples of 2"):
        packed[1:3]
    with pytest.raises(ShapeError, match="columns 0 to 48 of 96"):
        packed[:, :48]
    with pytest.raises(ShapeError, match="does not end with a whole block"):
        Format("nf4").empty((5, 96))
    with pytest.raises(ShapeError, match="fewer tensor-parallel ranks"):
        quantize(weight(2, 192), Format("nf4"))[:, 96:]


def entries(name, scheme, value, **options):
    """What a checkpoint has of a weight, and the numbers that it stands for."""
    if scheme == "int8":
        packed = quantize(value, Format("int8"))
        found = {"weight": packed.codes, "SCB": packed.scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return {name.replace("weight", key): tensor for key, tensor in found.items()}, packed.dense()
    packed, state = F.quantize_4bit(value, quant_type=scheme, **options)
    saved = {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {name: packed, **saved}, F.dequantize_4bit(packed, state)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_entries_in_any_order(seed):
    made, expected = {}, {}
    for name, scheme, options in (
        ("a.weight", "nf4", {}),
        ("b.weight", "nf4", {"compress_statistics": True}),
        ("c.weight", "fp4", {"quant_storage": torch.bfloat16, "blocksize": 128}),
        ("d.weight", "int8", {}),
        ("experts.up", "nf4", {"compress_statistics": True}),
    ):
        value = weight(4, 6, 128) if name == "experts.up" else weight(6, 128)
        found, expected[name] = entries(name, scheme, value, **options)
        made |= found
    made |= {"norm.weight": weight(128), "column.weight": weight(5, 1), "bytes": torch.zeros(3, dtype=torch.int8)}
    order = list(made.items())
    random.Random(seed).shuffle(order)
    joined = dict(join(order))
    assert joined.keys() == {*expected, "norm.weight", "column.weight", "bytes"}
    for name, dense in expected.items():
        assert isinstance(joined[name], PackedWeight)
        assert torch.equal(joined[name].dense(), dense), name
    assert torch.equal(joined["column.weight"], made["column.weight"])


def test_each_weight_comes_as_soon_as_it_is_whole():
    first, _ = entries("a.weight", "nf4", weight(4, 128))
    second, _ = entries("b.weight", "nf4", weight(4, 128))
    read = []

    def files():
        for name, tensor in [*first.items(), *second.items()]:
            read.append(name)
            yield name, tensor

    stream = join(files())
    assert next(stream)[0] == "a.weight"
    assert not any(name.startswith("b.") for name in read)


@pytest.mark.parametrize("missing", ["w.weight", "w.weight.absmax", "w.weight.quant_map", "w.weight.nested_absmax"])
def test_what_is_missing_is_named(missing):
    found, _ = entries("w.weight", "nf4", weight(4, 128), compress_statistics=True)
    del found[missing]
    with pytest.raises(CheckpointError, match=f"`{missing}` missing"):
        list(join(found.items()))


def test_old_layouts_of_int8_are_refused():
    found, _ = entries("w.weight", "int8", weight(4, 128))
    found["w.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="weight_format"):
        list(join(found.items()))


def test_a_state_that_contradicts_its_bytes():
    packed, state = F.quantize_4bit(weight(4, 128))
    state.shape = torch.Size((8, 128))
    with pytest.raises(ShapeError, match="packed bytes"):
        from_state(packed, state)


def test_nested_statistics_are_decoded():
    packed, state = F.quantize_4bit(weight(64, 512), compress_statistics=True)
    joined = from_state(packed, state)
    assert joined.scales.dtype == torch.float32
    assert torch.equal(joined.dense(), F.dequantize_4bit(packed, state))
