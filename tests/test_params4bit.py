"""nn.Params4bit: when it quantizes, what it never converts, how it moves, copies, pickles, and reads checkpoints."""

import copy
import io
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import QuantState
from halfbyte import functional as F
from halfbyte.errors import CheckpointError, DeviceError
from halfbyte.nn import Params4bit

STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
PROPERTIES = ("absmax", "code", "quant_map", "offset", "state2")
NESTED_PROPERTIES = ("nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset")
FIELDS = {
    "blocksize",
    "bnb_quantized",
    "compress_statistics",
    "module",
    "quant_state",
    "quant_storage",
    "quant_type",
    "scale_search",
}


def quantized(device="cpu", shape=(32, 64), nested=True, storage=torch.uint8, **more):
    weight = torch.randn(shape)
    more = {"quant_type": "nf4", "compress_statistics": nested, "quant_storage": storage, **more}
    return weight, Params4bit(weight, **more).to(device)


def raw(tensor):
    """Bytes, as numbers that can be compared: some are NaN as floats."""
    return tensor.detach().reshape(-1).view(torch.uint8).cpu().clone()


def dense(parameter):
    return F.dequantize_4bit(parameter.data, parameter.quant_state)


class TestQuantizing:
    @pytest.mark.parametrize("move", [lambda p: p.to("cpu"), lambda p: p.cpu(), lambda p: p.to(torch.empty(1))])
    def test_the_first_move_quantizes_in_place(self, move):
        weight = torch.randn(32, 64)
        parameter = Params4bit(weight, quant_type="nf4", blocksize=128)
        assert not parameter.bnb_quantized
        assert parameter.quant_state is None
        moved = move(parameter)
        packed, state = F.quantize_4bit(weight, blocksize=128, quant_type="nf4", compress_statistics=True)
        assert moved is parameter
        assert parameter.bnb_quantized
        assert torch.equal(parameter.data, packed)
        assert parameter.quant_state == state
        assert not parameter.requires_grad

    def test_it_happens_once(self):
        _, parameter = quantized()
        before = raw(parameter)
        state = parameter.quant_state
        assert parameter.to("cpu") is parameter
        assert parameter.cpu() is parameter
        assert parameter.quant_state is state
        assert torch.equal(raw(parameter), before)

    def test_the_meta_device_and_dtypes_do_not_quantize(self):
        parameter = Params4bit(torch.randn(4, 64), quant_type="nf4", blocksize=32)
        half = parameter.to(torch.float16)
        assert isinstance(half, Params4bit)
        assert half.dtype == torch.float16
        assert (half.blocksize, half.bnb_quantized) == (32, False)
        assert parameter.bfloat16().float().double().half().dtype == torch.float16
        assert parameter.type(torch.bfloat16).dtype == torch.bfloat16
        assert parameter.type() == "torch.FloatTensor"
        meta = parameter.to("meta")
        assert isinstance(meta, Params4bit)
        assert meta.is_meta
        assert not meta.bnb_quantized
        with pytest.raises(NotImplementedError, match="meta"):
            meta.to("cpu")

    def test_the_original_dtype_counts_when_device_and_dtype_come_together(self):
        weight = torch.randn(4, 64)
        parameter = Params4bit(weight, quant_type="nf4").to("cpu", torch.float16)
        assert parameter.quant_state.dtype == torch.float32
        assert torch.equal(parameter.data, F.quantize_4bit(weight, quant_type="nf4")[0])

    def test_the_module_is_told(self):
        module = torch.nn.Module()
        parameter = Params4bit(torch.randn(4, 64), module=module).to("cpu")
        assert module.quant_state is parameter.quant_state

    def test_a_trainable_float_weight_becomes_untrainable_bytes(self):
        assert not Params4bit(torch.randn(4, 64), requires_grad=True).to("cpu").requires_grad

    def test_devices_without_kernels_are_refused(self):
        with pytest.raises((DeviceError, RuntimeError, AssertionError)):
            Params4bit(torch.randn(4, 64)).xpu()

    @pytest.mark.gpu
    def test_cuda_quantizes_as_the_cpu_does(self):
        weight = torch.randn(32, 64)
        on_gpu = Params4bit(weight, quant_type="nf4").cuda()
        on_cpu = Params4bit(weight, quant_type="nf4").cpu()
        assert on_gpu.is_cuda
        assert on_gpu.quant_state.absmax.is_cuda
        torch.testing.assert_close(dense(on_gpu).cpu(), dense(on_cpu), rtol=0.02, atol=0.02)


class TestBytesAreNotNumbers:
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize(
        "convert",
        [
            lambda p: p.half(),
            lambda p: p.bfloat16(),
            lambda p: p.float(),
            lambda p: p.double(),
            lambda p: p.to(torch.float16),
            lambda p: p.to(torch.bfloat16),
            lambda p: p.to(dtype=torch.float64),
            lambda p: p.to(torch.int32),
            lambda p: p.to("cpu", torch.float16),
            lambda p: p.to(torch.empty(1, dtype=torch.float16)),
            lambda p: p.type(torch.float16),
            lambda p: p.type("torch.HalfTensor"),
        ],
    )
    def test_no_conversion_touches_them(self, storage, convert):
        _, parameter = quantized(storage=storage)
        before, state = raw(parameter), parameter.quant_state
        after = convert(parameter)
        assert isinstance(after, Params4bit)
        assert after.dtype == storage
        assert torch.equal(raw(after), before)
        assert after.quant_state == state

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize(
        "convert",
        [
            lambda m: m.half(),
            lambda m: m.bfloat16(),
            lambda m: m.double(),
            lambda m: m.to(torch.float16),
            lambda m: m.to("cpu", torch.bfloat16),
            lambda m: m.type(torch.float16),
        ],
    )
    def test_nor_does_one_of_a_module_that_knows_nothing_of_them(self, storage, convert):
        weight, parameter = quantized(storage=storage)
        holder = torch.nn.Sequential(torch.nn.Module(), torch.nn.Linear(2, 2))
        holder[0].weight = parameter
        before = raw(parameter)
        convert(holder)
        assert isinstance(holder[0].weight, Params4bit)
        assert torch.equal(raw(holder[0].weight), before)
        assert (dense(holder[0].weight) - weight).abs().mean() < 0.1
        assert holder[1].weight.dtype != torch.float32


class TestMoving:
    def test_to_meta_leaves_the_original_and_its_state_alone(self):
        _, parameter = quantized()
        before = raw(parameter)
        moved = parameter.to("meta")
        assert moved.is_meta
        assert moved.quant_state.absmax.is_meta
        assert moved.quant_state.state2.absmax.is_meta
        assert parameter.quant_state.absmax.device.type == "cpu"
        assert parameter.quant_state.state2.code.device.type == "cpu"
        assert torch.equal(raw(parameter), before)

    @pytest.mark.gpu
    @pytest.mark.parametrize("nested", [False, True])
    def test_there_and_back(self, nested):
        _, parameter = quantized("cuda", nested=nested)
        back = parameter.to("cpu")
        assert parameter.is_cuda
        assert parameter.quant_state.absmax.is_cuda
        assert back.quant_state.code.device.type == "cpu"
        assert torch.equal(raw(back), raw(parameter))
        assert torch.equal(dense(back), dense(parameter).cpu())
        assert torch.equal(dense(back.to("cuda")), dense(parameter))

    @pytest.mark.gpu
    def test_a_plain_module_moves_the_state_as_well(self):
        holder = torch.nn.Module()
        _, holder.weight = quantized()
        identity, before = holder.weight, dense(holder.weight)
        holder.to("cuda")
        assert holder.weight is identity
        assert holder.weight.quant_state.state2.absmax.is_cuda
        assert torch.equal(dense(holder.weight).cpu(), before)

    def test_assigning_data_takes_the_state_along(self):
        _, parameter = quantized()
        _, other = quantized(shape=(16, 64), storage=torch.bfloat16)
        parameter.data = other
        assert torch.equal(dense(parameter), dense(other))
        assert parameter.quant_storage == torch.bfloat16
        parameter.data = parameter.data.clone()  # a plain tensor has nothing to take
        assert torch.equal(dense(parameter), dense(other))


class TestCopies:
    def test_attributes_are_the_constructors_keywords(self):
        for _, parameter in (quantized(), quantized(nested=False)):
            assert set(vars(parameter)) == FIELDS
            twin = Params4bit(parameter.data, requires_grad=False, unknown=1, **vars(parameter))
            assert vars(twin) == vars(parameter)
            assert torch.equal(dense(twin), dense(parameter))

    def test_copy_shares(self):
        _, parameter = quantized()
        twin = copy.copy(parameter)
        assert type(twin) is Params4bit
        assert twin is not parameter
        assert twin.quant_state is parameter.quant_state
        assert twin.data_ptr() == parameter.data_ptr()

    def test_deepcopy_shares_nothing(self):
        _, parameter = quantized()
        twin = copy.deepcopy(parameter)
        assert type(twin) is Params4bit
        assert twin.quant_state == parameter.quant_state
        assert twin.quant_state is not parameter.quant_state
        assert twin.data_ptr() != parameter.data_ptr()
        parameter.quant_state.absmax.zero_()
        assert twin.quant_state.absmax.any()

    def test_deepcopy_twice_in_one_structure_stays_one(self):
        _, parameter = quantized()
        first, second = copy.deepcopy([parameter, parameter])
        assert first is second

    def test_a_deepcopy_does_not_write_to_the_originals_module(self):
        module = torch.nn.Module()
        module.quant_state = None
        parameter = Params4bit(torch.randn(4, 64), module=module)
        copy.deepcopy(parameter).to("cpu")
        assert module.quant_state is None

    @pytest.mark.parametrize("before", [False, True], ids=["float", "packed"])
    @pytest.mark.parametrize("way", ["pickle", "torch.save"])
    def test_pickling(self, before, way):
        weight, parameter = quantized()
        if not before:
            parameter = Params4bit(weight, requires_grad=True, quant_type="nf4", blocksize=128)
        if way == "pickle":
            twin = pickle.loads(pickle.dumps(parameter))
        else:
            buffer = io.BytesIO()
            torch.save(parameter, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        assert type(twin) is Params4bit
        assert twin.requires_grad == parameter.requires_grad
        assert vars(twin).keys() == vars(parameter).keys()
        assert (twin.blocksize, twin.quant_type) == (parameter.blocksize, parameter.quant_type)
        assert torch.equal(raw(twin), raw(parameter))
        assert twin.quant_state == parameter.quant_state


class TestStateProperties:
    @pytest.mark.parametrize("nested", [False, True])
    def test_they_read_the_state(self, nested):
        _, parameter = quantized(nested=nested)
        state = parameter.quant_state
        assert parameter.absmax is state.absmax
        assert parameter.code is parameter.quant_map is state.code
        assert parameter.offset is state.offset
        assert parameter.state2 is state.state2
        if nested:
            assert parameter.nested_absmax is state.state2.absmax
            assert parameter.nested_blocksize == 256
            assert parameter.nested_quant_map is state.state2.code
            assert parameter.nested_dtype == torch.float32
            assert parameter.nested_offset is state.offset
        else:
            assert not any(hasattr(parameter, name) for name in NESTED_PROPERTIES)

    def test_there_are_none_before_quantizing(self):
        parameter = Params4bit(torch.randn(4, 64))
        assert not any(hasattr(parameter, name) for name in PROPERTIES + NESTED_PROPERTIES)
        with pytest.raises(AttributeError, match="nonexistent_attribute"):
            _ = parameter.nonexistent_attribute

    def test_fsdp_finds_the_packed_entry_by_name(self):
        _, parameter = quantized()
        entry = parameter.quant_state.bitsandbytes__nf4
        assert json.loads(bytes(entry.tolist()))["shape"] == [32, 64]
        with pytest.raises(AttributeError, match="bitsandbytes__fp4"):
            _ = parameter.quant_state.bitsandbytes__fp4


@pytest.mark.parametrize(
    "cut", [lambda p: torch.chunk(p, 4), lambda p: p.chunk(4), lambda p: torch.split(p, 256), lambda p: p.split(256)]
)
def test_pieces_keep_type_and_state(cut):
    _, parameter = quantized()
    pieces = cut(parameter)
    assert len(pieces) == 4
    for piece in pieces:
        assert type(piece) is Params4bit
        assert vars(piece) == vars(parameter)
    assert torch.equal(torch.cat([piece.data for piece in pieces]), parameter.data)
    assert type(parameter.t()) is torch.Tensor
    assert type(parameter + 0) is torch.Tensor


def entries(nested=True, storage=torch.uint8, shape=(32, 64), **more):
    _, parameter = quantized(nested=nested, storage=storage, shape=shape, **more)
    return parameter, parameter.quant_state.as_dict(packed=True)


class TestFromPrequantized:
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.quant_state_head.weight."])
    def test_round_trip(self, device, nested, storage, prefix):
        parameter, stored = entries(nested, storage, shape=(33, 61))
        stored = {prefix + key: value for key, value in stored.items()}
        keys = list(stored)
        module = torch.nn.Module()
        twin = Params4bit.from_prequantized(parameter.data, stored, device=device, module=module)
        assert list(stored) == keys
        assert twin.device.type == device
        assert twin.bnb_quantized
        assert module.quant_state is twin.quant_state
        assert (twin.compress_statistics, twin.quant_storage) == (nested, storage)
        assert torch.equal(dense(twin).cpu(), dense(parameter))
        again = twin.quant_state.as_dict(packed=True)
        for key, value in parameter.quant_state.as_dict(packed=True).items():
            assert torch.equal(again[key].cpu(), value), key

    def test_unpacked_entries(self):
        parameter, _ = entries()
        unpacked = parameter.quant_state.as_dict(packed=False)
        assert QuantState.from_dict(unpacked, "cpu") == parameter.quant_state

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_tables_rounded_by_another_default_dtype_are_read_as_the_real_ones(self, dtype):
        parameter, stored = entries()
        stored["quant_map"] = stored["quant_map"].to(dtype)
        stored["nested_quant_map"] = stored["nested_quant_map"].to(dtype)
        assert torch.equal(dense(Params4bit.from_prequantized(parameter.data, stored, device="cpu")), dense(parameter))

    @pytest.mark.parametrize(
        "data", [lambda d: d[:-1], lambda d: torch.cat([d, d[:1]]), lambda d: d.double(), lambda d: d[:0]]
    )
    def test_packed_bytes_must_be_those_of_the_shape(self, data):
        parameter, stored = entries()
        with pytest.raises(CheckpointError, match="weight"):
            Params4bit.from_prequantized(data(parameter.data), stored, device="cpu")


def blob(**values):
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


GOOD = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "float32",
    "shape": [32, 64],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 2.5,
}
BLOB = "quant_state.bitsandbytes__nf4"

LIES = {
    "quant_type": ["fp4", "nf5", None, 4, ["nf4"]],
    "blocksize": [0, -64, 63, 8192, 64.0, "64", None, True, 2**70],
    "dtype": ["float64", "int8", "", None, "Tensor", "__dict__", 1],
    "shape": [
        [32],
        [32, 65],
        [64, 64],
        [-32, -64],
        [32.0, 64.0],
        "32",
        None,
        [2**40, 2**40],
        [2**63],
        [True, 64],
        [1] * 100,
        {},
    ],
    "nested_blocksize": [0, 16, None, 256.0, "256", 2**64],
    "nested_dtype": ["int8", None, 32],
    "nested_offset": [None, "2.5", [2.5], True, 10**400],
}


class TestHostileCheckpoints:
    @pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in LIES.items() for v in vs])
    def test_lies_in_the_json(self, name, value):
        _, stored = entries()
        stored[BLOB] = blob(**{**GOOD, name: value})
        with pytest.raises(CheckpointError, match=r"absmax|quant_type|" + name):
            QuantState.from_dict(stored, "cpu")

    @pytest.mark.parametrize("name", GOOD)
    def test_missing_in_the_json(self, name):
        _, stored = entries()
        stored[BLOB] = blob(**{k: v for k, v in GOOD.items() if k != name})
        with pytest.raises(CheckpointError, match=name):
            QuantState.from_dict(stored, "cpu")

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"{}",
            b"\xff\xfe",
            b'{"quant_type": "nf4"',
            b"[" * 4000,
            b"1" * 4096,
            b" " * 5000,
            b'"nf4"',
        ],
    )
    def test_what_is_not_the_json(self, text):
        _, stored = entries()
        stored[BLOB] = torch.tensor(list(text), dtype=torch.uint8)
        with pytest.raises(CheckpointError, match=r"quant_state|quant_type"):
            QuantState.from_dict(stored, "cpu")

    @pytest.mark.parametrize(
        "change", [lambda t: t.float(), lambda t: t[None], lambda t: t.to("meta"), lambda t: t.to(torch.int8)]
    )
    def test_json_in_the_wrong_kind_of_tensor(self, change):
        _, stored = entries()
        stored[BLOB] = change(stored[BLOB])
        with pytest.raises(CheckpointError, match=BLOB.replace(".", r"\.")):
            QuantState.from_dict(stored, "cpu")

    @pytest.mark.parametrize("name", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t[:-1],
            lambda t: torch.cat([t, t]),
            lambda t: t.to(torch.int64),
            lambda t: t.to_sparse(),
            lambda t: None,
            lambda t: t.tolist(),
            lambda t: "meta",
        ],
    )
    def test_tensors_that_do_not_fit(self, name, change):
        _, stored = entries()
        stored[name] = change(stored[name])
        with pytest.raises(CheckpointError, match=name):
            QuantState.from_dict(stored, "cpu")

    @pytest.mark.parametrize("name", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", BLOB])
    def test_missing_tensors(self, name):
        _, stored = entries()
        del stored[name]
        with pytest.raises(CheckpointError, match=name.split(".")[0]):
            QuantState.from_dict(stored, "cpu")

    @pytest.mark.parametrize("name", ["quant_map", "nested_quant_map"])
    @pytest.mark.parametrize(
        "change", [lambda t: t + 0.1, lambda t: t.flip(0), lambda t: t * float("nan"), torch.zeros_like]
    )
    def test_tables_of_another_format(self, name, change):
        _, stored = entries()
        stored[name] = change(stored[name])
        with pytest.raises(CheckpointError, match=f"`{name}`"):
            QuantState.from_dict(stored, "cpu")

    def test_names(self):
        _, stored = entries()
        for key in ("extra", "weight.extra", "quant_state.bitsandbytes__nf5", "a.quant_state"):
            with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
                QuantState.from_dict({**stored, key: torch.zeros(4, dtype=torch.uint8)}, "cpu")
        with pytest.raises(CheckpointError, match="given twice"):
            QuantState.from_dict({**stored, "other.absmax": stored["absmax"]}, "cpu")
        with pytest.raises(CheckpointError, match="given twice"):
            QuantState.from_dict({**stored, "blocksize": 64}, "cpu")
        with pytest.raises(CheckpointError, match="second"):
            QuantState.from_dict({**stored, "x." + BLOB: stored[BLOB]}, "cpu")
        with pytest.raises(CheckpointError, match="string"):
            QuantState.from_dict({**stored, 5: stored[BLOB]}, "cpu")
        renamed = {("quant_state.bitsandbytes__fp4" if k == BLOB else k): v for k, v in stored.items()}
        with pytest.raises(CheckpointError, match="fp4"):
            QuantState.from_dict(renamed, "cpu")
        with pytest.raises(CheckpointError, match="neither"):
            QuantState.from_dict({}, "cpu")

    def test_nested_statistics_without_half_of_them(self):
        _, plain = entries(nested=False)
        _, stored = entries()
        with pytest.raises(CheckpointError, match="nested_"):
            QuantState.from_dict({**plain, "nested_absmax": stored["nested_absmax"]}, "cpu")

    @settings(max_examples=3000, deadline=None)
    @given(data=st.data())
    def test_mutations_are_refused_or_harmless(self, data):
        torch.manual_seed(0)
        parameter, stored = entries(nested=data.draw(st.booleans()), shape=(9, 37))
        packed = parameter.data
        for _ in range(data.draw(st.integers(1, 3))):
            key = data.draw(st.sampled_from([*stored, "weight"]))
            tensor = packed if key == "weight" else stored[key]
            if not isinstance(tensor, torch.Tensor):
                continue
            flat = tensor.reshape(-1).clone()
            how = data.draw(st.sampled_from(["byte", "cut", "grow", "dtype", "drop", "rename"]))
            if how == "byte" and flat.numel():
                octets = flat.view(torch.uint8)
                octets[data.draw(st.integers(0, octets.numel() - 1))] = data.draw(st.integers(0, 255))
            elif how == "cut":
                flat = flat[: data.draw(st.integers(0, flat.numel()))]
            elif how == "grow":
                flat = torch.cat([flat, flat])
            elif how == "dtype":
                flat = flat.to(data.draw(st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.int64])))
            if key == "weight":
                packed = flat[:, None]
            elif how == "drop":
                del stored[key]
            elif how == "rename":
                stored[data.draw(st.text(max_size=20)) + key] = stored.pop(key)
            else:
                stored[key] = flat
        try:
            twin = Params4bit.from_prequantized(packed, stored, device="cpu")
        except CheckpointError:
            return
        # What was accepted decodes without reading past anything: the core checks every size again.
        assert dense(twin).shape == twin.quant_state.shape
