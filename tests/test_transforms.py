"""torch.func, forward-mode differentiation, torch.export and autocast, on every kind of layer."""

import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import halfbyte as hb
from halfbyte.errors import ArgumentError
from halfbyte.nn import Embedding8bit, EmbeddingNF4, Linear4bit, Linear8bitLt, StableEmbedding
from halfbyte.nn.parametrize import replace_parameter_4bit

F = hb.functional


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.stack = nn.Linear(64, 96), nn.Parameter(torch.randn(3, 96, 32))
        replace_parameter_4bit(self.linear, "weight")
        replace_parameter_4bit(self, "stack", compress_statistics=True)

    def forward(self, x):
        return self.linear(x) @ self.stack[1]


LINEAR = {
    "4 bits": lambda: Linear4bit(64, 96, quant_type="nf4", compress_statistics=False),
    "4 bits, nested": lambda: Linear4bit(64, 96, compute_dtype=torch.float32),
    "4 bits, no bias": lambda: Linear4bit(64, 96, bias=False, quant_storage=torch.bfloat16),
    "8 bits": lambda: Linear8bitLt(64, 96, has_fp16_weights=False).eval(),
    "8 bits, outliers": lambda: Linear8bitLt(64, 96, has_fp16_weights=False, threshold=2.0).eval(),
    "8 bits, training": lambda: Linear8bitLt(64, 96, has_fp16_weights=False),
    "parametrized": Parametrized,
}
TABLES = {
    "table of 4 bits": lambda: EmbeddingNF4(50, 64),
    "table of 4 bits, ragged": lambda: EmbeddingNF4(50, 30),
    "table of 8 bits": lambda: Embedding8bit(50, 64),
    "stable table": lambda: StableEmbedding(50, 64),
}
TRAINED = {"8 bits, trained": lambda: Linear8bitLt(64, 96, has_fp16_weights=True)}
EVERY = [*LINEAR, *TABLES, *TRAINED]
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def make(name, device):
    return (LINEAR | TABLES | TRAINED)[name]().to(device)


def inputs(name, device, rows=5):
    if name in TABLES:
        return torch.randint(0, 50, (rows, 3), device=device)
    return torch.randn(rows, 64, device=device)


def weight_of(module):
    """Return the matrix by which the layer multiplies a tangent."""
    x = torch.eye(64, device=next(module.parameters()).device)
    if isinstance(module, Linear8bitLt):
        weight = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    elif isinstance(module, Linear4bit):
        weight = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        return (module(x) - module(torch.zeros_like(x))).detach()
    return weight.T


# ---- torch.func


@pytest.mark.parametrize("name", LINEAR)
def test_gradients(device, name):
    module, x = make(name, device), inputs(name, device)
    wanted = x.clone().requires_grad_()
    module(wanted).sin().sum().backward()

    def loss(t):
        return module(t).sin().sum()

    torch.testing.assert_close(grad(loss)(x), wanted.grad, **EXACT)
    out, pull = vjp(module, x)
    torch.testing.assert_close(pull(out.cos())[0], wanted.grad, **EXACT)
    rows = vmap(grad(loss))(x)
    torch.testing.assert_close(rows, wanted.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", LINEAR)
def test_tangents(device, name):
    module, x = make(name, device), inputs(name, device)
    weight, tangent = weight_of(module), torch.randn(5, 64, device=device)
    out, along = jvp(module, (x,), (tangent,))
    torch.testing.assert_close(out, module(x), **EXACT)
    torch.testing.assert_close(along, tangent @ weight, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(dual.tangent, along, **EXACT)
        assert forward_ad.unpack_dual(module(x)).tangent is None
    if isinstance(module, Linear4bit) and module.bias is not None:
        state = module.weight.quant_state

        def of_bias(bias):
            return hb.matmul_4bit(x, module.weight, state, bias=bias)

        ones = torch.ones_like(module.bias)
        assert torch.equal(jvp(of_bias, (module.bias.detach(),), (ones,))[1], torch.ones(5, 96, device=device))


@pytest.mark.parametrize("name", LINEAR)
def test_jacobians_and_second_derivatives(device, name):
    module, x = make(name, device), inputs(name, device, rows=1)[0]
    weight = weight_of(module)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(module)(x), weight.T, rtol=1e-4, atol=1e-4)

    def loss(t):
        return module(t).square().sum() / 2

    for one, other in ((jacfwd, jacrev), (jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        torch.testing.assert_close(one(other(loss))(x), weight @ weight.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(hessian(loss)(x), weight @ weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*LINEAR, *TABLES])
def test_mapped_over_inputs(device, name, recwarn):
    module, x = make(name, device), inputs(name, device)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(vmap(module)(x), module(x), **tolerance)
    both = torch.stack([x, x.flip(0)], 1)
    expected = torch.stack([module(x), module(x.flip(0))])
    torch.testing.assert_close(vmap(module, in_dims=1)(both), expected, **tolerance)
    torch.testing.assert_close(vmap(vmap(module))(both), expected.transpose(0, 1), **tolerance)


def test_mapped_over_biases(device):
    module, x = make("4 bits", device), inputs("4 bits", device)
    biases = torch.randn(4, 96, device=device)

    def run(bias, x):
        return hb.matmul_4bit(x, module.weight, module.weight.quant_state, bias=bias)

    expected = torch.stack([run(bias, x) for bias in biases])
    torch.testing.assert_close(vmap(run, in_dims=(0, None))(biases, x), expected, **EXACT)
    expected = torch.stack([run(bias, row) for bias, row in zip(biases, x, strict=False)])
    torch.testing.assert_close(vmap(run)(biases, x[:4]), expected, **EXACT)
    gradients = vmap(grad(lambda bias: run(bias, x).square().sum()))(biases)
    expected = torch.stack([2 * run(bias, x).sum(0) for bias in biases])
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_functional_call_takes_parameters_of_another(device, name):
    module, other, x = make(name, device), make(name, device), inputs(name, device)
    wanted = module(x), other(x)
    if name != "parametrized":  # whose scales are no parameters
        for _ in range(2):  # after the first call too
            assert torch.equal(functional_call(module, dict(other.named_parameters()), (x,)), wanted[1])
            assert torch.equal(module(x), wanted[0])
    plain = {key: value.detach().as_subclass(torch.Tensor) for key, value in module.named_parameters()}
    torch.testing.assert_close(functional_call(module, plain, (x,)), wanted[0], **EXACT)


def test_codes_of_another_without_their_statistics(device):
    module, other, x = make("8 bits", device), make("8 bits", device), inputs("8 bits", device)
    module(x)
    other.weight.SCB.copy_(module.weight.SCB)
    plain = {"weight": other.weight.detach().as_subclass(torch.Tensor), "bias": other.bias.detach()}
    assert torch.equal(functional_call(module, plain, (x,)), other(x))


def test_what_there_is_no_rule_for_says_so(device):
    x = inputs("4 bits", device)
    modules = [make("4 bits", device) for _ in range(3)]
    parameters, _ = stack_module_state(modules)
    with pytest.raises(ArgumentError, match="batch of them by vmap"):
        vmap(lambda p: functional_call(modules[0], p, (x,)))(parameters)
    trained = make("8 bits, trained", device)
    for transform in (grad, jacfwd, vmap):
        with pytest.raises(ArgumentError, match="has_fp16_weights=False"):
            transform(lambda t: trained(t).sum())(x)
    with torch.no_grad():
        torch.testing.assert_close(vmap(trained)(x), trained(x), rtol=1e-4, atol=1e-4)


# ---- torch.export


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_exported_saved_and_loaded(device, name, dynamic):
    module, x = make(name, device).eval(), inputs(name, device)
    shapes = ({0: torch.export.Dim("rows", min=2, max=64)},) if dynamic else None
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    more = [x, inputs(name, device), *([inputs(name, device, rows=17)] if dynamic else [])]
    for one in (program, loaded, program.run_decompositions()):
        again = one.module()
        for given in more:
            assert torch.equal(again(given), module(given))
    # What is packed is in the program as it is, once.
    size = sum(value.numel() * value.itemsize for value in program.state_dict.values())
    size += sum(
        value.numel() * value.itemsize for value in program.constants.values() if isinstance(value, torch.Tensor)
    )
    if name in ("4 bits", "8 bits", "table of 4 bits", "table of 8 bits"):
        dense = 64 * (96 if name in LINEAR else 50) * 4
        assert size < dense * (0.2 if "4" in name else 0.32) + 96 * 4 + 64


@pytest.mark.parametrize("name", EVERY)
def test_strict_export(device, name):
    module, x = make(name, device).eval(), inputs(name, device)
    program = torch.export.export(nn.Sequential(module), (x,), strict=True)
    torch.testing.assert_close(program.module()(x), module(x), **EXACT)


# ---- autocast and compilation


@pytest.mark.parametrize("name", EVERY)
def test_autocast_and_one_graph(device, name):
    module, x = make(name, device).eval(), inputs(name, device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), **EXACT)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=torch.bfloat16):
        eager = module(x)
        fixed = name in TABLES or name == "4 bits, nested"  # says itself what it computes in
        assert eager.dtype == (torch.float32 if fixed else torch.bfloat16)
        torch.testing.assert_close(compiled(x), eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", [*LINEAR, *TRAINED])
def test_gradients_in_one_graph(device, name):
    module, x = make(name, device), inputs(name, device)
    if name == "8 bits, trained":
        module.eval()  # on the CPU, that quantizes activations too
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (module, compiled):
        given = x.clone().requires_grad_()
        module.zero_grad()
        run(given).sin().sum().backward()
        gradients.append([given.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) == {"4 bits, no bias": 1, "8 bits, trained": 3}.get(name, 2)
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)
