"""The few helpers that only bitsandbytes' name has, without a real one to compare with."""

import copy

import pytest
import torch

import halfbyte as hb
from halfbyte.bitsandbytes import cuda_specs, utils
from halfbyte.bitsandbytes import functional as F
from halfbyte.bitsandbytes.autograd._functions import GlobalOutlierPooler, MatMul4Bit
from halfbyte.bitsandbytes.diagnostics import main as diagnostics
from halfbyte.bitsandbytes.nn.modules import OutlierAwareLinear, maybe_rearrange_weight
from halfbyte.errors import ArgumentError, CheckpointError, DeviceError


def test_dicts_go_through_tensors():
    source = {"a": 1, "b": [1.5, None, "é"], "c": {"d": True}}
    packed = utils.pack_dict_to_tensor(source)
    assert (packed.dtype, packed.dim()) == (torch.uint8, 1)
    assert utils.unpack_tensor_to_dict(packed) == source
    for wrong in (b"[1]", b"{", b"\xff"):
        with pytest.raises(ArgumentError, match="tensor_data"):
            utils.unpack_tensor_to_dict(torch.tensor(list(wrong), dtype=torch.uint8))


def test_linear_layers_are_replaced_except_those_to_skip():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)))
    model.lm_head = torch.nn.Linear(2, 2)
    kept = model[0].weight
    assert utils.replace_linear(model, hb.nn.LinearNF4, copy_weights=True) is model
    assert [type(m) for m in (model[0], model[1][0], model.lm_head)] == [
        hb.nn.LinearNF4,
        hb.nn.LinearNF4,
        torch.nn.Linear,
    ]
    assert model[0].weight is kept
    assert model[1][0].bias is None


def test_outliers_are_found_by_their_spread():
    weight = torch.randn(200, 50)
    weight[:, 7] *= 50
    assert utils.find_outlier_dims(weight).tolist() == [7]
    assert utils.find_outlier_dims(weight, topk=1).tolist() == [7]
    assert utils.find_outlier_dims(weight, topk=5, rdm=True).shape == (5,)
    assert utils.find_outlier_dims(weight.t().contiguous(), reduction_dim=1).tolist() == [7]


def test_a_tracer_follows_one_pass_through_a_model():
    class Aware(OutlierAwareLinear):
        def quantize_weight(self, w, outlier_idx):
            return w.round()

        def forward_with_outliers(self, x, outlier_idx):
            return x @ self.weight.t(), outlier_idx

    tracer = utils.OutlierTracer.get_instance()
    model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Linear(30, 4))
    with torch.no_grad():
        model[1].weight[:, 3] *= 1000
    x = torch.randn(5, 30)
    x[0, 11] = 60
    tracer.initialize(model)
    assert tracer.is_initialized()
    model(x)
    assert 11 in tracer.get_outliers(model[0].weight)
    assert tracer.get_outliers(model[1].weight).tolist() == [3]
    model(x)
    assert not any(layer._forward_pre_hooks for layer in model)
    layer = Aware(30, 4)
    layer.weight = model[1].weight
    y, found = layer(x)
    assert found.tolist() == [3]
    assert torch.equal(layer.weight, layer.weight.round())
    assert torch.equal(y, x @ layer.weight.t())
    with pytest.raises(NotImplementedError):
        OutlierAwareLinear(4, 4).quantize_weight(x, found)


def test_the_pool_is_of_the_first_width():
    pool = GlobalOutlierPooler.get_instance()
    assert pool is GlobalOutlierPooler.get_instance()
    pool.initialize()
    pool.add_outliers(torch.tensor([3, 1]), 16)
    pool.add_outliers(torch.tensor([2]), 8)
    assert pool.get_current_outlier_idx().tolist() == [1, 3]


@pytest.mark.parametrize("double", [False, True])
def test_the_autograd_function_gives_the_gradients_of_matmul_4bit(device, double):
    packed, state = hb.functional.quantize_4bit(
        torch.randn(24, 64, device=device), quant_type="nf4", compress_statistics=double
    )
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)
    twin, twin_bias = copy.deepcopy(x), copy.deepcopy(bias)
    MatMul4Bit.apply(x, packed, None, bias, state).square().sum().backward()
    hb.matmul_4bit(twin, packed, state, bias=twin_bias).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(bias.grad, twin_bias.grad)
    with pytest.raises(ArgumentError, match="quant_state"):
        MatMul4Bit.apply(x, packed, None, bias, None)


def test_devices_are_compared_and_paged_tensors_are_anywhere():
    here, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    assert F.is_on_gpu([here, None, torch.zeros(2)])
    with pytest.raises(DeviceError, match=r"cpu, meta") as error:
        F.is_on_gpu([here, elsewhere])
    assert isinstance(error.value, RuntimeError)
    elsewhere.is_paged = True
    assert F.is_on_gpu([here, elsewhere])


def test_pointers_are_addresses():
    tensor = torch.zeros(3)
    assert F.get_ptr(tensor).value == tensor.data_ptr()
    assert F.get_ptr(None) is None
    assert F._get_tensor_stream(tensor).value is None
    assert F.CUBLAS_Context.get_instance().get_context(torch.device("cuda", 0)).value is None


def test_a_checkpoints_old_orders_are_refused():
    for stored, fine in ((torch.tensor(0), True), ("row", True), (torch.tensor(3), False), ("col_turing", False)):
        entries = {"weight": torch.zeros(1), "weight_format": stored}
        if fine:
            maybe_rearrange_weight(entries, "", {}, True, [], [], [])
            assert list(entries) == ["weight"]
        else:
            with pytest.raises(CheckpointError, match="weight_format"):
                maybe_rearrange_weight(entries, "", {}, True, [], [], [])


def test_diagnostics_fail_where_a_product_is_wrong(monkeypatch, capsys):
    diagnostics.sanity_check()
    monkeypatch.setattr(diagnostics.halfbyte, "matmul_4bit", lambda x, packed, state: x + 1)
    with pytest.raises(SystemExit) as end:
        diagnostics.main()
    assert end.value.code == 1
    assert "FAILED: RuntimeError: a product on cpu is wrong" in capsys.readouterr().out


def test_cuda_specs_are_torchs():
    version = cuda_specs.get_cuda_version_tuple()
    assert (version is None) == (torch.version.cuda is None)
    assert (cuda_specs.get_cuda_specs() is None) == (not torch.cuda.is_available())
    assert cuda_specs.CUDASpecs((7, 5), "130", (13, 0)).has_imma
    assert not cuda_specs.CUDASpecs((7, 0), "130", (13, 0)).has_imma


def test_nested_scales_have_the_signed_map_whatever_the_values_have(device):
    a = torch.rand(64, 1024, device=device)
    unsigned = F.create_dynamic_map(signed=False).to(device)
    codes, state = F.quantize_blockwise(a, unsigned, blocksize=64, nested=True)
    assert torch.equal(state.state2.code.cpu(), F.create_dynamic_map())
    error = (F.dequantize_blockwise(codes, state) - a).abs().mean()
    plain = (F.dequantize_blockwise(*F.quantize_blockwise(a, unsigned, blocksize=64)) - a).abs().mean()
    assert error < plain * 1.05


@pytest.mark.parametrize("nested", [False, True])
def test_states_of_8_bit_codes_come_back_from_their_dicts(nested, device):
    code = F.create_linear_map().to(device)
    codes, state = F.quantize_blockwise(torch.randn(1000, device=device), code, blocksize=64, nested=nested)
    entries = state.as_dict()
    again = hb.QuantState.from_dict(entries, device)
    assert again == state
    assert torch.equal(F.dequantize_blockwise(codes, again), F.dequantize_blockwise(codes, state))
    for name, wrong in (
        ("blocksize", 0),
        ("blocksize", 64.0),
        ("blocksize", True),
        ("dtype", "int8"),
        ("quant_map", torch.zeros(16)),
        ("absmax", torch.zeros(16, dtype=torch.int32)),
        ("shape", [-1]),
        *((("nested_absmax", torch.zeros(7)), ("nested_blocksize", -1), ("nested_offset", "x")) if nested else ()),
    ):
        with pytest.raises(CheckpointError, match=f"`{name}`"):
            hb.QuantState.from_dict(entries | {name: wrong}, device)
        if name != "shape":
            with pytest.raises(CheckpointError):
                hb.QuantState.from_dict({k: v for k, v in entries.items() if k != name}, device)
