"""Linear8bitLt, Int8Params, MatmulLtState, Embedding8bit, quantize_model: checkpoints, moves, copies, training."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte import functional as F
from halfbyte.errors import ArgumentError, DtypeError, ShapeError
from halfbyte.nn import Embedding8bit, Int8Params, Linear8bitLt

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def layer(n=48, k=64, threshold=6.0, device="cpu", bias=True, **options):
    options = {"has_fp16_weights": False} | options
    return Linear8bitLt(k, n, bias, threshold=threshold, **options).to(device)


def outlying(rows, k, dtype=torch.float32, device="cpu"):
    x = torch.randn(rows, k, device=device)
    x[:, 5] *= 40
    return x.to(dtype)


def dense(module, x):
    weight = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return x.double() @ weight.double().t() + (0 if module.bias is None else module.bias.double())


# ---- forward


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_inference_is_near_the_dense_layer(device, dtype, threshold):
    module = layer(threshold=threshold, device=device).eval()
    x = outlying(7, 64, dtype, device)
    with torch.no_grad():
        first = module(x)
        again = module(x)  # by the core alone
    want = dense(module, x)
    assert first.dtype == dtype and torch.equal(first, again)
    error = (first.double() - want).norm() / want.norm()
    assert error < (0.006 if threshold else 0.03)
    assert module.state.CB is not None and module.weight.dtype == torch.int8
    assert module(x.view(1, 7, 64)).shape == (1, 7, 48)


def test_every_way_into_the_layer_gives_the_same(device):
    module = layer(device=device).eval()
    x = outlying(6, 64, device=device)
    with torch.no_grad():
        want = module(x)
        assert torch.equal(module.forward(x), want)
        assert torch.equal(module(x.t().contiguous().t()), want)
        calls = []
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(module(x), want) and calls == [1]
        handle.remove()
        assert torch.equal(hb.matmul(x, module.weight, state=module.state, bias=module.bias), want)
        out = torch.empty_like(want)
        assert hb.matmul(x, module.weight, out=out, state=module.state, bias=module.bias) is out
        assert torch.equal(out, want)
    torch.testing.assert_close(module(x), want, rtol=1e-3, atol=1e-3)


def test_training_mode_on_the_cpu_does_not_quantize_the_input():
    module = layer()
    x = outlying(5, 64)
    want = dense(module, x)
    torch.testing.assert_close(module(x).double(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(x).double(), want, rtol=1e-5, atol=1e-5)


def test_autocast_casts_as_it_does_for_linear(device):
    module = layer(device=device).eval()
    with torch.autocast(device, dtype=torch.bfloat16), torch.no_grad():
        assert module(outlying(3, 64, device=device)).dtype == torch.bfloat16


def test_bias_takes_the_dtype_of_the_input(device):
    module = layer(device=device)
    assert module.bias.dtype == torch.float32
    module(outlying(3, 64, torch.float16, device))
    assert module.bias.dtype == torch.float16


def test_outlier_columns_of_the_last_product_are_told(device):
    module = layer(device=device).eval()
    assert module.state.idx is None
    module(outlying(3, 64, device=device))  # the bias wants a gradient
    assert module.state.idx.tolist() == [5]
    assert module.state.idx.tolist() == [5]


def test_unquantized_layers_say_what_to_do():
    module = Linear8bitLt(8, 4, has_fp16_weights=False)
    with pytest.raises(ArgumentError, match=r"not quantized yet"):
        module(torch.randn(2, 8))
    with pytest.raises(DtypeError, match=r"^A: "):
        layer()(torch.ones(2, 64, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"^B: "):
        layer()(torch.ones(2, 63))


def test_a_plain_parameter_tied_in_is_quantized_at_first_use():
    module = Linear8bitLt(64, 48, bias=False, has_fp16_weights=False).eval()
    weight = torch.randn(48, 64)
    module.weight = nn.Parameter(weight)
    with torch.no_grad():
        got = module(torch.eye(64))
    assert (got.t() - weight).abs().max() < 0.03
    assert "SCB" not in module.state_dict()


def test_a_new_weight_takes_the_place_of_the_old_ones_codes(device):
    module = layer(bias=False, device=device).eval()
    x = torch.eye(64, device=device)
    with torch.no_grad():
        module(x)
        weight = torch.randn(48, 64)
        module.weight = Int8Params(weight, requires_grad=False).to(device)
        assert (module(x).t().cpu() - weight).abs().max() < 0.03


# ---- quantization of weights


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_are_quantized_as_in_fp16_when_they_first_move(device, dtype):
    weight = torch.randn(9, 33).to(dtype)
    parameter = Int8Params(weight.clone(), requires_grad=False).to(device)
    codes, stats, _ = F.int8_vectorwise_quant(weight.half().to(device))
    assert torch.equal(parameter.data, codes) and torch.equal(parameter.SCB, stats)
    assert parameter.CB.data_ptr() == parameter.data_ptr()
    assert parameter.to(torch.float16) is parameter
    assert parameter.to(device).SCB is not None


def test_weights_beyond_fp16_keep_their_size():
    weight = torch.full((2, 8), 1e6)
    parameter = Int8Params(weight, requires_grad=False).cpu()
    assert torch.allclose(F.int8_vectorwise_dequant(parameter.data, parameter.SCB), weight)


def test_attributes_go_round_as_libraries_send_them():
    old = layer().weight
    assert set(old.__dict__) == {"CB", "SCB", "has_fp16_weights"}
    twin = Int8Params(old.data, requires_grad=False, **old.__dict__)
    assert twin.SCB is old.SCB and type(twin).__name__ == "Int8Params"
    loaded = Int8Params(old.data, requires_grad=False, SCB=old.SCB, _is_hf_initialized=True).to("cpu")
    assert torch.equal(loaded.SCB, old.SCB)
    on_meta = Int8Params(old.data.to("meta"), requires_grad=False, **old.__dict__)
    assert on_meta.CB is None and on_meta.SCB is None


# ---- state dicts


@pytest.mark.parametrize("save_after_forward", [False, True])
@pytest.mark.parametrize("load_after_forward", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_before_and_after_a_forward(device, save_after_forward, load_after_forward, assign):
    x = outlying(4, 64, device=device)
    source, target = layer(device=device).eval(), layer(device=device).eval()
    with torch.no_grad():
        want = source(x) if save_after_forward else None
        saved = source.state_dict()
        want = source(x) if want is None else want
        if load_after_forward:
            target(x)
        target.load_state_dict(saved, assign=assign)
        assert torch.equal(target(x), want)
    assert list(saved) == ["weight", "bias", "SCB", "weight_format"]
    assert saved["weight"].dtype == torch.int8 and saved["SCB"].dtype == torch.float32
    assert saved["weight_format"].dtype == torch.uint8 and saved["weight_format"].item() == 0


def test_state_dicts_load_into_layers_on_meta():
    source = layer(bias=False).eval()
    for assign in (False, True):
        with torch.device("meta"):
            target = Linear8bitLt(64, 48, False, has_fp16_weights=False, threshold=6.0).eval()
        target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(target(torch.eye(64)), source(torch.eye(64)))


def test_float_weights_load_into_float_and_into_quantized_layers():
    original = nn.Linear(64, 48)
    early = Linear8bitLt(64, 48, has_fp16_weights=False)
    early.load_state_dict(original.state_dict())
    late = layer().eval()
    late(torch.eye(64))
    late.load_state_dict(original.state_dict())
    early = early.to("cpu").eval()
    assert torch.equal(early(torch.eye(64)), late(torch.eye(64)))
    assert torch.equal(early.weight.data, late.weight.data)


def test_checkpoints_that_do_not_fit_are_refused_with_nothing_written():
    good = layer().state_dict()
    target = layer()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    cases = [
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "a layout of bitsandbytes before"),
        ({"weight_format": "col32"}, "a layout of bitsandbytes before"),
        ({"SCB": None}, "cannot be loaded without"),
        ({"SCB": torch.ones(47)}, "size mismatch for SCB"),
        ({"SCB": torch.ones(48, dtype=torch.int64)}, "size mismatch for SCB"),
        ({"weight": torch.ones(48, 64)}, "expected int8"),
        ({"weight": torch.ones(48, 63, dtype=torch.int8)}, "size mismatch for weight"),
        ({"weight": None}, "missing beside"),
    ]
    for change, message in cases:
        entries = {k: v for k, v in {**good, **change}.items() if v is not None}
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(entries)
        assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items() if k != "bias")
    with pytest.raises(RuntimeError, match="Loading a quantized checkpoint into non-quantized Linear8bitLt"):
        Linear8bitLt(64, 48, has_fp16_weights=False).load_state_dict(good, strict=False)
    with pytest.raises(RuntimeError, match="cannot be loaded without"):
        Linear8bitLt(64, 48, has_fp16_weights=False).load_state_dict({"weight": good["weight"]}, strict=False)


def test_strict_loading_reports_keys():
    target = layer()
    assert target.load_state_dict({}, strict=False).missing_keys == ["weight", "bias"]
    result = target.load_state_dict({**layer().state_dict(), "other": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["other"] and not result.missing_keys


# ---- copies and moves


@pytest.mark.parametrize("after_forward", [False, True])
def test_copies_and_pickles_carry_codes_and_statistics(device, after_forward):
    module = layer(device=device).eval()
    x = outlying(4, 64, device=device)
    with torch.no_grad():
        if after_forward:
            module(x)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twins = (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(buffer, weights_only=False),
        )
        assert all(twin.state == module.state for twin in twins)
        assert len(pickle.dumps(module)) < 48 * 64 * 1.5 + 6000
        for twin in twins:
            assert twin.weight.data_ptr() != module.weight.data_ptr()
            assert twin.weight.CB.data_ptr() == twin.weight.data_ptr()
            assert torch.equal(twin.weight.SCB, module.weight.SCB)
            assert torch.equal(twin(x), module(x))
            if after_forward:
                assert twin.state.CB.data_ptr() == twin.weight.data_ptr()
        shallow = copy.copy(module)
        assert shallow.weight is module.weight


def test_casts_of_the_module_leave_codes_alone(device):
    module = layer(device=device).eval()
    before = module.weight.data.clone()
    for cast in (lambda: module.half(), lambda: module.to(torch.bfloat16), lambda: module.float()):
        cast()
        assert module.weight.dtype == torch.int8 and torch.equal(module.weight.data, before)
    assert module.bias.dtype == torch.float32


def test_moves_to_meta_and_back_to_memory():
    module = layer().eval()
    module(torch.eye(64))
    saved = {k: v.clone() for k, v in module.state_dict().items()}
    want = module(torch.eye(64))
    module.to("meta")
    assert module.weight.is_meta and isinstance(module.weight, Int8Params) and module.state.CB is None
    module.load_state_dict(saved, assign=True)
    assert torch.equal(module(torch.eye(64)), want)


@pytest.mark.gpu
def test_moves_between_devices_keep_the_weight():
    module = layer(device="cuda").eval()
    x = outlying(4, 64, torch.float16)
    with torch.no_grad():
        on_gpu = module(x.cuda())
        on_cpu = module.cpu()(x)
        assert module.state.CB.device.type == "cpu" and module.weight.SCB.device.type == "cpu"
        assert torch.equal(module.cuda()(x.cuda()), on_gpu)
        assert torch.equal(module.cpu()(x), on_cpu)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=5e-3, atol=5e-3)


# ---- training


def test_frozen_weights_pass_gradients_to_what_comes_before(device):
    module = layer(device=device)
    x = outlying(5, 64, device=device).requires_grad_()
    grad = torch.randn(5, 48, device=device)
    module(x).backward(grad)
    weight = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(module.bias.grad, grad.sum(0))
    assert module.weight.grad is None


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_float_weights_are_trained(device, threshold):
    torch.manual_seed(1)
    module = layer(threshold=threshold, device=device, has_fp16_weights=True)
    assert module.weight.dtype == torch.float32 and module.weight.requires_grad
    target = nn.Linear(64, 48).to(device)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        x = torch.randn(2, 16, 64, device=device)
        loss = (module(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 50
    # The weight after the last step is what counts now.
    module.eval()
    with torch.no_grad():
        x = torch.eye(64, device=device)
        torch.testing.assert_close(module(x) - module.bias, module.weight.t(), rtol=0, atol=0.01)
    assert list(module.state_dict()) == ["weight", "bias"]


def test_gradients_of_a_float_weight_are_near_those_of_a_dense_layer(device):
    x = outlying(32, 64, device=device).requires_grad_()
    module = layer(device=device, has_fp16_weights=True)
    reference = nn.Linear(64, 48).to(device)
    reference.load_state_dict(module.state_dict())
    grad = torch.randn(32, 48, device=device)
    module(x).backward(grad)
    got = x.grad.clone()
    x.grad = None
    reference(x).backward(grad)
    for ours, theirs in ((got, x.grad), (module.weight.grad, reference.weight.grad)):
        assert (ours - theirs).norm() / theirs.norm() < 0.02
    torch.testing.assert_close(module.bias.grad, reference.bias.grad)


def test_accumulated_gradients_keep_the_codes():
    module = layer(has_fp16_weights=True)
    module(torch.randn(2, 64)).sum().backward()
    codes = module.state.CB
    module(torch.randn(2, 64)).sum().backward()
    assert module.state.CB is codes
    module.weight.grad = None
    module(torch.randn(2, 64))
    assert module.state.CB is not codes


# ---- the state


def test_state_has_the_fields_and_the_removed_ones_warn():
    state = hb.MatmulLtState()
    assert (state.threshold, state.has_fp16_weights, state.is_training, state.use_pool) == (0.0, True, True, False)
    assert state.CB is None and state.idx is None and state == hb.MatmulLtState()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert state.CxB is None and state.formatB is None
    assert [w.category for w in caught] == [FutureWarning, FutureWarning]
    state.CxB = None  # accelerate does
    with pytest.raises(AttributeError, match="nothing"):
        _ = state.nothing
    state.CB, state.SCB = torch.ones(2, 2, dtype=torch.int8), torch.ones(2)
    other = copy.deepcopy(state)
    assert state == other
    other.SCB[0] = 2
    assert state != other
    state.reset_grads()
    assert state.CB is None and state.SCB is None


def test_matmul_without_a_state_quantizes_the_weight(device):
    x, weight = torch.randn(5, 64, device=device), torch.randn(48, 64, device=device)
    for w in (weight, weight.t().contiguous().t()):
        got = hb.matmul(x, w)
        assert (got - x @ weight.t()).norm() / got.norm() < 0.02
    state = hb.MatmulLtState()
    state.has_fp16_weights, state.is_training = False, False
    hb.matmul(x, weight, state=state, threshold=6.0)
    assert state.threshold == 6.0 and state.CB.shape == (48, 64)
    # From now on the codes are what counts.
    assert torch.equal(hb.matmul(x, state.CB.t(), state=state), hb.matmul(x, weight * 0, state=state))


def test_matmul_sees_a_changed_weight_in_evaluation():
    state = hb.MatmulLtState()
    state.is_training = False
    x, weight = torch.randn(5, 64), torch.randn(48, 64)
    first = hb.matmul(x, weight, state=state)
    codes = state.CB
    assert torch.equal(hb.matmul(x, weight, state=state), first) and state.CB is codes
    weight.mul_(2)
    torch.testing.assert_close(hb.matmul(x, weight, state=state), first * 2)


# ---- embeddings


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7,), (2, 3), ()])
def test_embeddings_gather_rows(device, dtype, shape):
    source = nn.Embedding(50, 33).to(dtype)
    table = Embedding8bit(50, 33, dtype=dtype)
    table.load_state_dict(source.state_dict())
    table.to(device)
    ids = torch.randint(0, 50, shape, device=device)
    got, want = table(ids), source.to(device)(ids)
    assert got.dtype == dtype and got.shape == want.shape
    assert (got - want).abs().max() <= table.weight.SCB.max() / 127 * 0.51 + torch.finfo(dtype).eps * 4
    twin = copy.deepcopy(table)
    assert torch.equal(twin(ids), got)
    with pytest.raises(NotImplementedError):
        table.state_dict()


def test_unquantized_embeddings_say_what_to_do():
    with pytest.raises(ArgumentError, match=r"not quantized yet"):
        Embedding8bit(4, 4)(torch.tensor([1]))


# ---- whole models


def network():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96, bias=False), nn.ReLU(), nn.Linear(96, 10))


def test_quantize_model_replaces_linear_layers(device):
    model = network().to(device)
    x = torch.randn(8, 64, device=device)
    want = model(x)
    assert hb.quantize_model(model, "int8", threshold=4.0, skip=["4"]) is model
    assert [type(m) for m in model] == [Linear8bitLt, nn.ReLU, Linear8bitLt, nn.ReLU, nn.Linear]
    assert model[0].state.threshold == 4.0 and model[0].weight.dtype == torch.int8 and model[2].bias is None
    got = model.eval()(x)
    assert (got - want).norm() / want.norm() < 0.02
    assert hb.quantize_model(network(), "int8")[0].state.threshold == 6.0


def test_quantize_model_checks_its_arguments():
    for options in ({"threshold": -1.0}, {"threshold": float("nan")}):
        with pytest.raises(ArgumentError, match=r"^threshold"):
            hb.quantize_model(network(), "int8", **options)
    with pytest.raises(ArgumentError, match="quant_type"):
        hb.quantize_model(network(), "int4")


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("training", [False, True])
def test_models_compile_as_one_graph(device, threshold, training):
    model = hb.quantize_model(network().to(device), "int8", threshold=threshold).train(training)
    x = outlying(4, 64, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).sum().backward()
    model(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3)


def test_inductor_compiles_a_layer():
    module = layer().eval()
    x = outlying(4, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))
