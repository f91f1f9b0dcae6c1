"""nn.Linear4bit: dtypes, training, moving, state dicts in every state of the layer, copies and pickles."""

import copy
import io
import logging
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from halfbyte import functional as F
from halfbyte.errors import ArgumentError, CheckpointError
from halfbyte.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit, fix_4bit_weight_quant_state_from_module

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def layer(device="cpu", n=48, k=64, bias=True, dtype=torch.float32, **more):
    """A quantized layer."""
    more = {"quant_type": "nf4", "compute_dtype": dtype, **more}
    return Linear4bit(k, n, bias, **more).to(dtype).to(device)


def dense(module):
    return F.dequantize_4bit(module.weight.data, module.weight.quant_state)


def raw(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8).cpu().clone()


def same_state_dicts(a, b):
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(raw(a[key]), raw(b[key])), key


class TestConstructor:
    def test_it_is_that_of_bitsandbytes_with_a_block_size(self):
        module = Linear4bit(64, 48, False, torch.bfloat16, False, "nf4", torch.float16, "cpu", 128)
        assert (module.in_features, module.out_features, module.bias) == (64, 48, None)
        assert module.compute_dtype == torch.bfloat16
        weight = module.weight
        assert isinstance(weight, Params4bit)
        assert (weight.blocksize, weight.compress_statistics, weight.quant_type) == (128, False, "nf4")
        assert weight.quant_storage == module.quant_storage == torch.float16
        assert weight.module is module
        assert not weight.requires_grad
        assert not weight.bnb_quantized
        module.to("cpu")
        assert module.quant_state is weight.quant_state
        assert module.quant_state.blocksize == 128
        assert weight.dtype == torch.float16

    def test_the_variants_fix_the_type(self):
        assert Linear4bit(64, 48).weight.quant_type == "fp4"
        for cls, kind in ((LinearNF4, "nf4"), (LinearFP4, "fp4")):
            module = cls(64, 48, True, torch.float16, False, torch.bfloat16, "meta", 256)
            assert isinstance(module, Linear4bit)
            assert (module.weight.quant_type, module.weight.blocksize) == (kind, 256)
            assert module.weight.quant_storage == torch.bfloat16
            assert module.weight.is_meta
            assert not module.weight.compress_statistics

    def test_it_says_what_it_is(self):
        assert "in_features=64, out_features=48, bias=True, nf4, blocksize=64" in repr(LinearNF4(64, 48))


class TestForward:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("compute", [None, *FLOATS])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_result_and_dtypes(self, device, dtype, compute, bias, quant_type):
        module = layer(device, bias=bias, quant_type=quant_type, compute_dtype=compute)
        x = torch.randn(2, 3, 64, device=device).to(dtype)
        out = module(x)
        assert out.shape == (2, 3, 48)
        assert out.dtype == dtype
        working = compute or dtype
        y = x.to(working)
        expected = torch.nn.functional.linear(
            y, dense(module).to(working), None if module.bias is None else module.bias.to(working)
        )
        tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
        wide = max(tolerance[working], tolerance[dtype])
        torch.testing.assert_close(out.float(), expected.float(), rtol=wide, atol=wide)
        if bias:
            assert module.bias.dtype == torch.float32  # a forward changes no parameter

    @pytest.mark.parametrize("storage", STORAGES)
    def test_storage_makes_no_difference(self, device, storage):
        torch.manual_seed(1)
        plain = layer(device)
        torch.manual_seed(1)
        stored = layer(device, quant_storage=storage)
        x = torch.randn(3, 64, device=device)
        assert stored.weight.dtype == storage
        assert torch.equal(plain(x), stored(x))

    @pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
    def test_block_sizes(self, device, blocksize):
        module = layer(device, n=33, k=75, blocksize=blocksize)
        x = torch.randn(3, 75, device=device)
        torch.testing.assert_close(module(x), torch.nn.functional.linear(x, dense(module), module.bias))

    def test_a_layer_that_was_not_moved_says_so(self):
        with pytest.raises(ArgumentError, match=r'not quantized yet.*layer\.to\("cpu"\)'):
            Linear4bit(64, 48)(torch.randn(2, 64))
        with pytest.raises(ArgumentError, match="not quantized yet"):
            Linear4bit(64, 48, device="meta")(torch.randn(2, 64))

    def test_the_first_input_settles_the_compute_dtype(self):
        module = layer(compute_dtype=None)
        x = torch.randn(2, 64)
        assert module(x.bfloat16()).dtype == torch.bfloat16
        assert module.compute_dtype == torch.bfloat16
        assert module.compute_type_is_set
        assert torch.equal(module(x), module(x.bfloat16()).float())

    @pytest.mark.parametrize(("shape", "text"), [((1, 64), "inference."), ((10, 64), "inference or training")])
    def test_fp16_input_without_a_compute_dtype_warns_once(self, caplog, shape, text):
        module = layer(compute_dtype=None)
        with caplog.at_level(logging.WARNING, "halfbyte.nn"):
            module(torch.randn(shape).half())
            module(torch.randn(shape).half())
        assert [text in record.getMessage() for record in caplog.records] == [True]
        assert module.compute_dtype is None
        caplog.clear()
        layer(compute_dtype=torch.float16)(torch.randn(shape).half())
        assert not caplog.records

    def test_autocast_decides_where_no_one_else_did(self, device):
        x = torch.randn(2, 64, device=device)
        chosen, free = layer(device, compute_dtype=torch.float32), layer(device, compute_dtype=None)
        inferred = copy.deepcopy(free)
        inferred(x)
        many = x.repeat(20, 1)  # more rows than the fused CUDA kernel takes
        in_fp32, many_in_fp32 = chosen(x), chosen(many)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert free(x).dtype == torch.bfloat16
            assert not free.compute_type_is_set
            assert inferred(x).dtype == torch.bfloat16
            assert torch.equal(free(x), inferred(x))
            assert torch.equal(chosen(x), in_fp32)
            assert torch.equal(chosen(many), many_in_fp32)
        assert inferred.compute_dtype == torch.float32

    def test_autocast_trains(self, device):
        module = layer(device, compute_dtype=None)
        x = torch.randn(2, 64, device=device, requires_grad=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = module(x).float().square().mean()
        loss.backward()
        assert x.grad.dtype == torch.float32
        assert module.bias.grad.dtype == torch.float32

    def test_a_weight_that_fsdp_replaced(self, device):
        module = layer(device)
        x = torch.randn(2, 64, device=device)
        expected = module(x)
        module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)
        assert torch.equal(module(x), expected)
        fix_4bit_weight_quant_state_from_module(module)
        assert isinstance(module.weight, Params4bit)
        assert module.weight.quant_state is module.quant_state
        assert torch.equal(module(x), expected)
        packed = module.weight.data
        del module.weight
        module.__dict__["weight"] = packed  # FSDP1: no parameter at all, a view of the flat one
        assert torch.equal(module(x), expected)

    def test_the_repair_refuses_what_it_cannot_repair(self, caplog):
        module = Linear4bit(64, 48)
        with caplog.at_level(logging.WARNING, "halfbyte.nn"):
            fix_4bit_weight_quant_state_from_module(module)
        assert "not quantized" in caplog.text
        quantized = layer()
        quantized.weight = torch.nn.Parameter(torch.randn(48, 64))
        with pytest.raises(ArgumentError, match="weight"):
            fix_4bit_weight_quant_state_from_module(quantized)


class TestTraining:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("double", [False, True])
    def test_gradients_are_those_of_the_dequantized_layer(self, device, dtype, double):
        module = layer(device, dtype=dtype, compress_statistics=double)
        reference = torch.nn.Linear(64, 48, device=device, dtype=dtype)
        reference.weight.data = dense(module).clone()
        reference.bias.data = module.bias.data.clone()
        x = torch.randn(5, 64, device=device).to(dtype)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        module(mine).square().sum().backward()
        reference(theirs).square().sum().backward()
        tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
        for got, want in ((mine.grad, theirs.grad), (module.bias.grad, reference.bias.grad)):
            assert got.dtype == dtype
            scale = want.float().abs().max()
            torch.testing.assert_close(got.float() / scale, want.float() / scale, rtol=tolerance, atol=tolerance)
        assert module.weight.grad is None

    def test_an_adapter_learns_through_frozen_layers(self, device):
        torch.manual_seed(3)
        base = torch.nn.Sequential(layer(device, 64, 64), torch.nn.Tanh(), layer(device, 64, 64))
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        adapter = torch.nn.Linear(64, 64, device=device)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        x, target = torch.randn(32, 64, device=device), torch.randn(32, 64, device=device) * 0.1
        before = [raw(p) for p in base.parameters()]
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (base(adapter(x)) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(torch.equal(raw(p), b) for p, b in zip(base.parameters(), before, strict=True))


class TestMoving:
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize(
        "convert",
        [
            lambda m: m.half(),
            lambda m: m.bfloat16(),
            lambda m: m.double(),
            lambda m: m.to(torch.float16),
            lambda m: m.to("cpu", torch.bfloat16),
            lambda m: m.to(torch.float16).to(torch.float32),
            lambda m: m.type(torch.bfloat16),
        ],
    )
    def test_dtypes_change_the_bias_and_nothing_else(self, storage, convert):
        module = layer(quant_storage=storage)
        before, identity, state = raw(module.weight), module.weight, module.quant_state
        convert(module)
        assert module.weight is identity
        assert module.weight.dtype == storage
        assert torch.equal(raw(module.weight), before)
        assert module.quant_state is module.weight.quant_state
        assert module.quant_state == state

    def test_to_meta_and_what_it_leaves(self):
        module = layer()
        keep, state = module.weight, module.quant_state
        module.to("meta")
        assert module.weight.is_meta
        assert isinstance(module.weight, Params4bit)
        assert module.bias.is_meta
        assert module.quant_state is module.weight.quant_state
        assert module.quant_state.absmax.is_meta
        assert not state.absmax.is_meta
        assert not keep.is_meta

    def test_an_unquantized_layer_on_meta_and_back_to_empty(self):
        module = Linear4bit(64, 48, quant_type="nf4").to("meta")
        assert isinstance(module.weight, Params4bit)
        module.to_empty(device="cpu")
        assert isinstance(module.weight, Params4bit)
        assert not module.weight.bnb_quantized
        assert module.weight.shape == (48, 64)

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_quantized_layer_on_meta_gets_memory_for_all_that_it_has(self, device, nested):
        module = layer(compress_statistics=nested).to(device)
        x = torch.randn(2, 64, device=device)
        want, state, saved = module(x), module.quant_state, module.state_dict()
        module.to("meta").to_empty(device=device)
        made = module.weight.quant_state
        assert module.quant_state is made
        assert made is not state
        assert made.absmax.shape == state.absmax.shape
        assert made.absmax.device == state.absmax.device
        assert torch.equal(made.code, state.code)
        if nested:
            assert torch.equal(made.state2.code, state.state2.code)
            assert made.offset.device == made.state2.absmax.device == state.offset.device
        module(x)
        module.to("cpu").to(device)
        module.load_state_dict(saved)
        assert torch.equal(module(x), want)

    def test_with_parameters_swapped(self):
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            module = Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32)
            module.half().to("cpu")
            assert isinstance(module.weight, Params4bit)
            assert module.quant_state is module.weight.quant_state
            before = raw(module.weight)
            module.float()
            assert torch.equal(raw(module.weight), before)
            assert module(torch.randn(2, 64)).isfinite().all()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    @pytest.mark.gpu
    def test_there_and_back(self):
        module = layer()
        x = torch.randn(2, 64)
        expected, before = module(x), raw(module.weight)
        module.cuda()
        assert module.quant_state.state2.absmax.is_cuda
        assert module.quant_state is module.weight.quant_state
        torch.testing.assert_close(module(x.cuda()).cpu(), expected)
        module.cpu()
        assert torch.equal(raw(module.weight), before)
        assert torch.equal(module(x), expected)

    @pytest.mark.gpu
    def test_moving_one_of_two_that_share_a_state_leaves_the_other(self):
        module = layer()
        twin = copy.copy(module.weight)
        module.cuda()
        assert twin.quant_state.absmax.device.type == "cpu"


def checkpoint_keys(double, bias):
    keys = ["weight", "bias"] if bias else ["weight"]
    keys += ["weight.absmax", "weight.quant_map"]
    if double:
        keys += ["weight.nested_absmax", "weight.nested_quant_map"]
    return [*keys, "weight.quant_state.bitsandbytes__nf4"]


class TestStateDict:
    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_keys_are_those_of_bitsandbytes(self, double, bias):
        module = layer(bias=bias, compress_statistics=double)
        state = module.state_dict()
        assert list(state) == checkpoint_keys(double, bias)
        assert all(type(value) is torch.Tensor for value in state.values())
        assert list(Linear4bit(64, 48, bias).state_dict()) == (["weight", "bias"] if bias else ["weight"])
        kept = module.state_dict(keep_vars=True)
        assert kept["weight"] is module.weight

    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("used", [False, True], ids=["new", "after a forward"])
    @pytest.mark.parametrize("target", ["float", "meta", "quantized", "other format", "used"])
    @pytest.mark.parametrize("assign", [False, True])
    def test_round_trip(self, device, double, storage, used, target, assign):
        source = layer(device, compress_statistics=double, quant_storage=storage)
        x = torch.randn(3, 64, device=device)
        if used:
            source(x)
        stored = source.state_dict()
        keep = {key: value.clone() for key, value in stored.items()}
        options = {"quant_type": "nf4", "compress_statistics": double, "quant_storage": storage}
        if target == "other format":
            options = {"quant_type": "fp4", "compress_statistics": not double, "blocksize": 256}
        where = "meta" if target == "meta" else device
        twin = Linear4bit(64, 48, compute_dtype=torch.float32, device=where, **options)
        if target in ("quantized", "other format", "used"):
            twin.to(device)
        if target == "used":
            twin(x)
        if target == "meta" and not assign:
            twin.bias = torch.nn.Parameter(torch.zeros(48, device=device))
        missing, unexpected = twin.load_state_dict(stored, strict=True, assign=assign)
        assert not missing
        assert not unexpected
        assert isinstance(twin.weight, Params4bit)
        assert twin.weight.bnb_quantized
        assert twin.weight.module is twin
        assert twin.quant_state is twin.weight.quant_state
        assert (twin.weight.quant_storage, twin.weight.quant_type) == (storage, "nf4")
        assert (twin.weight.blocksize, twin.weight.compress_statistics) == (64, double)
        assert torch.equal(twin(x), source(x))
        same_state_dicts(twin.state_dict(), keep)
        same_state_dicts(stored, keep)
        if not assign:
            twin.weight.data.view(torch.uint8).zero_()
            twin.quant_state.absmax.zero_()
            same_state_dicts(stored, keep)  # and shares no memory

    def test_round_trip_inside_a_model_and_through_safetensors(self):
        model = torch.nn.Sequential(layer(n=64, k=64), torch.nn.LayerNorm(64), layer(n=16, k=64, bias=False))
        x = torch.randn(2, 64)
        data = save_safetensors(model.state_dict())  # which refuses tensors that share memory
        twin = torch.nn.Sequential(
            Linear4bit(64, 64, compute_dtype=torch.float32),
            torch.nn.LayerNorm(64),
            LinearNF4(64, 16, bias=False, compute_dtype=torch.float32),
        )
        twin.load_state_dict(load_safetensors(data))
        assert torch.equal(twin(x), model(x))
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        same_state_dicts(torch.load(buffer, weights_only=True), model.state_dict())

    @pytest.mark.parametrize("assign", [False, True])
    def test_float_weights_load_into_float_and_quantized_layers(self, assign):
        weight, bias = torch.randn(48, 64), torch.randn(48)
        stored = {"weight": weight, "bias": bias}
        fresh = Linear4bit(64, 48, quant_type="nf4")
        fresh.load_state_dict(stored, assign=assign)
        assert isinstance(fresh.weight, Params4bit)
        assert not fresh.weight.bnb_quantized
        assert torch.equal(fresh.weight.data, weight)
        fresh.to("cpu")
        used = layer()
        used.load_state_dict(stored, assign=assign)
        expected = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        for module in (fresh, used):
            assert torch.equal(module.weight.data, expected[0])
            assert module.quant_state == module.weight.quant_state == expected[1]
            assert torch.equal(module.bias.data, bias)

    def test_what_is_missing_or_too_much_is_reported(self):
        module = layer()
        stored = module.state_dict()
        without_stats = {key: stored[key] for key in ("weight", "bias")}
        with pytest.raises(RuntimeError, match=r"Missing key.*quant_state"):
            layer().load_state_dict(without_stats)
        without_weight = {key: value for key, value in stored.items() if key != "weight"}
        with pytest.raises(RuntimeError, match="Missing key"):
            layer().load_state_dict(without_weight)
        with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
            layer().load_state_dict({key: value for key, value in stored.items() if key != "bias"})
        with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
            layer().load_state_dict({**stored, "extra": torch.ones(1)})
        result = layer().load_state_dict({**stored, "extra": torch.ones(1)}, strict=False)
        assert result.unexpected_keys == ["extra"]
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer(n=32).load_state_dict(stored)

    def test_lies_are_refused_and_nothing_is_written(self):
        module, other = layer(), layer()
        before = {key: value.clone() for key, value in other.state_dict().items()}
        stored = module.state_dict()
        with pytest.raises(CheckpointError, match=r"weight\.absmax"):
            other.load_state_dict({**stored, "weight.absmax": stored["weight.absmax"][:-1]})
        with pytest.raises(CheckpointError, match="`weight`"):
            other.load_state_dict({**stored, "weight": stored["weight"][:-1]})
        with pytest.raises(CheckpointError, match=r"weight\.extra"):
            other.load_state_dict({**stored, "weight.extra": torch.ones(1)})
        same_state_dicts(other.state_dict(), before)

    @pytest.mark.gpu
    @pytest.mark.parametrize("assign", [False, True])
    def test_between_devices(self, assign):
        source = layer("cuda")
        twin = layer("cpu")
        twin.load_state_dict(source.state_dict(), assign=assign)
        assert twin.weight.is_cuda == assign
        assert twin.quant_state.absmax.is_cuda == assign
        same_state_dicts(twin.state_dict(), source.state_dict())


class TestCopies:
    def test_deepcopy(self):
        module = layer()
        x = torch.randn(2, 64)
        expected = module(x)
        twin = copy.deepcopy(module)
        assert twin.weight.module is twin
        assert twin.quant_state is twin.weight.quant_state
        assert twin.quant_state is not module.quant_state
        module.weight.data.zero_()
        assert torch.equal(twin(x), expected)

    def test_deepcopy_of_an_unquantized_layer_quantizes_on_its_own(self):
        module = LinearNF4(64, 48)
        twin = copy.deepcopy(module)
        twin.to("cpu")
        assert module.quant_state is None
        assert twin.quant_state is not None
        assert not module.weight.bnb_quantized

    @pytest.mark.parametrize("way", ["pickle", "torch.save"])
    def test_pickle(self, way):
        module = layer(quant_storage=torch.bfloat16)
        x = torch.randn(2, 64)
        if way == "pickle":
            twin = pickle.loads(pickle.dumps(module))
        else:
            buffer = io.BytesIO()
            torch.save(module, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        assert isinstance(twin.weight, Params4bit)
        assert twin.weight.module is twin
        assert twin.quant_state is twin.weight.quant_state
        assert torch.equal(twin(x), module(x))
        same_state_dicts(twin.state_dict(), module.state_dict())

    def test_the_float_weight_is_freed(self):
        module = Linear4bit(64, 48)
        dense = weakref.ref(module.weight.data.untyped_storage())
        module.to("cpu")
        assert dense() is None
        assert module.weight.untyped_storage().nbytes() == 48 * 64 // 2
