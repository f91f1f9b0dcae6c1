"""Parameters of other people's modules in 4 bits."""

import copy

import pytest
import torch
import torch.nn.utils.parametrize as P
from torch import nn
from torch.utils.checkpoint import checkpoint

import halfbyte as hb
from halfbyte.errors import CheckpointError
from halfbyte.nn.parametrize import (
    Bnb4bitParametrization,
    _disable_parametrization_cache,
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)

F = hb.functional


class Mixture(nn.Module):
    """Experts as a 3-D parameter, which it reads twice a forward."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 32, 64, dtype=dtype, device=device))
        self.scale = nn.Parameter(torch.ones(64, dtype=dtype, device=device))
        self.not_param = torch.zeros(3)

    def forward(self, x, expert=0):
        return (x @ self.experts[expert] + x @ self.experts[expert + 1]) * self.scale


@pytest.fixture(autouse=True)
def _no_cache_left():
    P._cache_enabled, P._cache = 0, {}
    yield
    assert P._cache_enabled == 0
    assert P._cache == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [None, 32, 128])
def test_reading_it_decodes_it(device, dtype, quant_type, double, blocksize):
    module = Mixture(dtype, device)
    packed, state = F.quantize_4bit(
        module.experts.data, blocksize=blocksize, quant_type=quant_type, compress_statistics=double
    )
    expected = F.dequantize_4bit(packed, state)
    replace_parameter_4bit(module, "experts", double, quant_type, blocksize)
    assert torch.equal(module.experts, expected)
    assert module.experts.dtype is dtype
    assert not module.experts.requires_grad
    x = torch.randn(3, 32, dtype=dtype, device=device)
    assert torch.equal(module(x), (x @ expected[0] + x @ expected[1]) * module.scale)
    assert module.parametrizations.experts.original.dtype is torch.uint8


def test_gradients_reach_what_is_not_quantized():
    module = Mixture()
    replace_parameter_4bit(module, "experts")
    x = torch.randn(3, 32, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert module.scale.grad is not None


def test_a_forward_decodes_once(monkeypatch):
    module, reads = Mixture(), []
    replace_parameter_4bit(module, "experts")
    decode = Bnb4bitParametrization.forward
    monkeypatch.setattr(Bnb4bitParametrization, "forward", lambda self, p: reads.append(1) or decode(self, p))
    module(torch.randn(2, 32))
    assert len(reads) == 1
    _ = module.experts, module.experts
    assert len(reads) == 3


def test_what_cannot_be_replaced_says_so():
    module = Mixture()
    for replace in (replace_parameter_4bit, lambda m, n: replace_parameter_4bit_prequantized(m, n, {}, "cpu")):
        with pytest.raises(AttributeError, match="Module does not have parameter 'nothing'"):
            replace(module, "nothing")
        with pytest.raises(TypeError, match=r"Parameter 'not_param' is not an instance of nn\.Parameter"):
            replace(module, "not_param")


def test_packed_bytes_are_taken_as_they_are():
    module = Mixture()
    packed, state = F.quantize_4bit(module.experts.data, quant_type="nf4", compress_statistics=True)
    module.experts = nn.Parameter(packed, requires_grad=False)
    entries = state.as_dict(packed=True)
    replace_parameter_4bit_prequantized(module, "experts", entries, torch.device("cpu"))
    assert torch.equal(module.experts, F.dequantize_4bit(packed, state))
    assert "quant_state.bitsandbytes__nf4" in entries  # left as they are
    other = Mixture()
    other.experts = nn.Parameter(packed[:-1], requires_grad=False)
    with pytest.raises(CheckpointError, match="experts"):
        replace_parameter_4bit_prequantized(other, "experts", entries, torch.device("cpu"))


@pytest.mark.parametrize("double", [False, True])
def test_state_dicts_have_the_keys_of_a_layer_and_load(double):
    outer = nn.Sequential(Mixture(), Mixture())
    for module in outer:
        replace_parameter_4bit(module, "experts", double)
    stored = outer.state_dict()
    inner = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if double else [])]
    expected = {"0.scale", "0.experts", *(f"0.experts.{name}" for name in inner)}
    expected.add("0.experts.quant_state.bitsandbytes__nf4")
    assert {key for key in stored if key.startswith("0.")} == expected
    twin = nn.Sequential(Mixture(), Mixture())
    for module in twin:
        replace_parameter_4bit(module, "experts", quant_type="fp4")
    kept = dict(stored)
    twin.load_state_dict(stored)
    assert stored.keys() == kept.keys()
    for ours, theirs in zip(twin, outer, strict=True):
        assert torch.equal(ours.experts, theirs.experts)
    bad = {key: value for key, value in stored.items() if not key.startswith("0.experts.")}
    _, state = F.quantize_4bit(torch.randn(4, 32, 32), quant_type="nf4")
    for name, value in state.as_dict(packed=True).items():
        bad[f"0.experts.{name}"] = value
    with pytest.raises(CheckpointError, match=r"0\.experts"):
        twin.load_state_dict(bad)


def test_it_moves_and_copies_as_a_whole(device):
    module = Mixture()
    replace_parameter_4bit(module, "experts", compress_statistics=True)
    expected = module.experts
    twin = copy.deepcopy(module)
    module.to(device)
    assert module.experts.device.type == device
    assert module.parametrizations.experts[0].quant_state.absmax.device.type == device
    assert torch.equal(module.experts.cpu(), expected)
    module.half()  # bytes and statistics are no numbers of the model
    assert torch.equal(module.experts.cpu(), expected)
    assert torch.equal(twin.experts, expected)


def test_checkpointing_leaves_the_cache_as_it_was():
    module = nn.Sequential(nn.Linear(8, 32), Mixture())
    replace_parameter_4bit(module[1], "experts")
    for _ in range(3):
        x = torch.randn(2, 8, requires_grad=True)
        checkpoint(module, x, use_reentrant=False).sum().backward()
        assert P._cache_enabled == 0
    _disable_parametrization_cache(module, (), None)


@pytest.mark.parametrize("double", [False, True])
def test_it_compiles_whole(device, double):
    torch.compiler.reset()
    module = Mixture(device=device)
    replace_parameter_4bit(module, "experts", double)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32, device=device, requires_grad=True)
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).sum().backward()
    assert x.grad is not None
