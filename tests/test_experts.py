"""Stacked experts: rows sorted by expert, each multiplied by its own weight, and the modules made of that."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import halfbyte
from halfbyte import functional as F
from halfbyte import matmul_4bit_experts
from halfbyte._grouped import EXPERTS_FUSED_ROWS
from halfbyte.errors import ArgumentError, CheckpointError, DeviceError, DtypeError, ShapeError
from halfbyte.nn import Experts4bit, Params4bit, StackedLinear4bit
from halfbyte.nn.experts4bit import _low_rank_of_all, low_rank, route

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def stack(device, e, n, k, nested=False, kind="nf4", block=64, **more):
    return F.quantize_4bit(
        torch.randn(e, n, k, device=device) * 0.1,
        quant_type=kind,
        blocksize=block,
        compress_statistics=nested,
        **more,
    )


def offsets_of(counts, before=0, device="cpu"):
    ends = [before]
    for count in counts:
        ends.append(ends[-1] + count)
    return torch.tensor(ends, dtype=torch.int32, device=device)


def reference(x, offsets, packed, state, bias=None):
    """The result in fp64, and how large its terms are."""
    state.dtype = torch.float32
    dense, ends = F.dequantize_4bit(packed, state).double(), offsets.tolist()
    out = torch.zeros(x.shape[0], dense.shape[1], dtype=torch.float64, device=x.device)
    reach = out.clone()
    for e in range(len(ends) - 1):
        rows = slice(ends[e], ends[e + 1])
        out[rows] = x[rows].double() @ dense[e].t() + (0 if bias is None else bias[e].double())
        reach[rows] = x[rows].double().abs() @ dense[e].abs().t()
    return out, reach


def bias_of_rows(bias, offsets, rows):
    """The bias of each row, fp64 ``[S, N]``; zeros for rows of nobody."""
    its, ends = torch.zeros(rows, bias.shape[1], dtype=torch.float64, device=bias.device), offsets.tolist()
    for e, row in enumerate(bias.double()):
        its[ends[e] : ends[e + 1]] = row
    return its


def close(got, want, reach, dtype, bias=None):
    """Whether `got` is near enough. `bias`, ``[S, N]``: added to a product that was rounded before."""
    # A rounding of the result, and one of the weights where they are 16-bit numbers in the tensor cores.
    own, inner = {torch.float32: (2e-7, 2e-6), torch.float16: (5e-4, 1.5e-4), torch.bfloat16: (4e-3, 1e-3)}[dtype]
    rounded = want.abs() if bias is None else want.abs() + (want - bias).abs()
    return bool(((got.double() - want).abs() <= own * rounded + inner * reach + 1e-7).all())


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=0, max_size=9),
    n=st.integers(1, 40),
    k=st.sampled_from([1, 5, 32, 64, 77, 192]),
    around=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    block=st.sampled_from([32, 64, 512]),
    kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    with_bias=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 3),
)
def test_each_row_with_its_expert(counts, n, k, around, block, kind, nested, with_bias, dtype, seed):
    torch.manual_seed(seed)
    packed, state = stack("cpu", len(counts), n, k, nested, kind, block)
    offsets = offsets_of(counts, around[0])
    x = torch.randn(int(offsets[-1]) + around[1], k).to(dtype)
    bias = torch.randn(len(counts), n).to(dtype) if with_bias else None
    out = matmul_4bit_experts(x, offsets, packed, state, bias)
    assert (out.dtype, out.shape) == (dtype, (x.shape[0], n))
    assert close(out, *reference(x, offsets, packed, state, bias), dtype)
    assert (out[: around[0]] == 0).all()
    assert (out[int(offsets[-1]) :] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
def test_on_the_gpu(dtype, nested):
    cases = [
        ([1], 33, 64),
        ([3, 0, 5], 40, 320),
        ([0, 9, 1, 0, 17, 33], 100, 192),
        ([0, 0, 0, 70, 1, 2, 3, 0], 64, 1024),
        ([2, 1] * 8, 768, 2048),
        ([1, 0] * 150, 24, 768),
        ([300, 0, 5], 50, 256),
        ([150, 31], 64, 256),
        ([4, 4], 17, 77),
        ([0, 0], 16, 64),
        ([6, 1], 16, 4160),
        ([1, 2], 16, 0),
    ]
    for counts, n, k in cases:
        for kind, block in (("nf4", 64), ("fp4", 256), ("nf4", 4096), ("nf4", 32)):
            packed, state = stack("cuda", len(counts), n, k, nested, kind, block)
            for before, after, with_bias in ((0, 0, False), (3, 2, True)):
                offsets = offsets_of(counts, before, "cuda")
                x = torch.randn(int(offsets[-1]) + after, k, device="cuda").to(dtype)
                bias = torch.randn(len(counts), n, device="cuda").to(dtype) if with_bias else None
                out = matmul_4bit_experts(x, offsets, packed, state, bias)
                dense = dtype == torch.bfloat16 and x.shape[0] > EXPERTS_FUSED_ROWS * len(counts) and n % 8 == 0
                alone = bias_of_rows(bias, offsets, x.shape[0]) if dense and with_bias else None
                wanted = reference(x, offsets, packed, state, bias)
                assert close(out, *wanted, dtype, alone), (counts, n, k, kind, block)
                assert torch.equal(out, matmul_4bit_experts(x, offsets, packed, state, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_offsets_that_lie_stay_within_bounds(dtype):
    packed, state = stack("cuda", 4, 64, 128)
    x = torch.randn(10, 128, device="cuda").to(dtype)
    for ends in ([5, 2, 9, 1, 3], [-7, 100, 4, 2**31 - 1, 8], [11, 12, 13, 14, 15], [-5, -4, -3, -2, -1]):
        offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
        matmul_4bit_experts(x, offsets, packed, state)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others():
    packed, state = stack("cuda", 8, 96, 1024)
    x = torch.randn(40, 1024, device="cuda", dtype=torch.bfloat16)
    all_rows = matmul_4bit_experts(x, offsets_of([3, 0, 9, 1, 20, 7, 0, 0], device="cuda"), packed, state)
    alone = matmul_4bit_experts(x[12:13], offsets_of([0, 0, 0, 1, 0, 0, 0, 0], device="cuda"), packed, state)
    assert torch.equal(all_rows[12:13], alone)


@pytest.mark.gpu
def test_a_graph_follows_its_offsets():
    experts = Experts4bit(16, 256, 128).to("cuda").bfloat16()
    hidden = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(0, 16, (4, 2), device="cuda")
    weights = torch.rand(4, 2, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            experts(hidden, index, weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(hidden, index, weights)
        for _ in range(3):
            index.copy_(torch.randint(0, 16, (4, 2), device="cuda"))
            hidden.copy_(torch.randn(4, 256, device="cuda"))
            graph.replay()
            assert torch.equal(out, experts(hidden, index, weights))


@pytest.mark.parametrize("experts", [1, 4, 40])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_route(device, experts, dtype):
    for size in ((0, 2), (1, 1), (7, 3), (500, 4)):
        index = torch.randint(-1, experts + 2, size, device=device).to(dtype)
        order, inverse, offsets = route(index, experts)
        flat = index.flatten()
        nobody = (flat < 0) | (flat >= experts)
        key = torch.where(nobody, experts, flat)
        assert torch.equal(order.long(), torch.sort(key, stable=True).indices)
        assert torch.equal(inverse[order.long()].long(), torch.arange(flat.numel(), device=device))
        counts = torch.bincount(key.long(), minlength=experts + 1)[:experts]
        assert offsets.dtype == torch.int32
        assert torch.equal(offsets.diff().long(), counts)
        assert offsets[0] == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(5, 8, 16), (5, 6, 9)])
def test_gradients(device, dtype, nested, shape):
    packed, state = stack(device, *shape, nested)
    offsets = offsets_of([2, 0, 3, 0, 1], 1, device)
    x = torch.randn(9, shape[2], device=device).to(dtype).requires_grad_()
    bias = torch.randn(shape[:2], device=device).to(dtype).requires_grad_()
    out = matmul_4bit_experts(x, offsets, packed, state, bias)
    upstream = torch.randn_like(out)
    for_x, for_bias = torch.autograd.grad(out, (x, bias), upstream)
    state.dtype = torch.float32
    dense, ends, up = F.dequantize_4bit(packed, state).double(), offsets.tolist(), upstream.double()
    want_x, want_bias = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(bias, dtype=torch.float64)
    for e in range(5):
        rows = slice(ends[e], ends[e + 1])
        want_x[rows] = up[rows] @ dense[e]
        want_bias[e] = up[rows].sum(0)
    eps = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert (for_x - want_x).abs().max() <= eps * max(1, want_x.abs().max())
    assert (for_bias - want_bias).abs().max() <= eps * max(1, want_bias.abs().max())
    assert (for_x[:1] == 0).all()
    assert (for_x[7:] == 0).all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(device, nested, grad, with_bias):
    packed, state = stack(device, 4, 16, 64, nested)
    offsets = offsets_of([1, 0, 2, 1], device=device)
    more = () if not nested else (state.state2.absmax, state.state2.code, state.offset, 256)
    x = torch.randn(4, 64, device=device, requires_grad=grad)
    bias = torch.randn(4, 16, device=device, requires_grad=grad) if with_bias else None
    upstream = torch.randn(4, 16, device=device, requires_grad=grad)
    torch.library.opcheck(
        torch.ops.halfbyte.matmul_4bit_experts.default,
        (x, offsets, packed, (4, 16, 64), state.absmax, 64, "nf4", bias, *more),
    )
    torch.library.opcheck(
        torch.ops.halfbyte.matmul_4bit_experts_grad_input.default,
        (upstream, offsets, packed, (4, 16, 64), state.absmax, 64, "nf4", *more),
    )


def test_says_what_is_wrong():
    packed, state = stack("cpu", 3, 8, 64)
    x, offsets = torch.randn(4, 64), offsets_of([1, 1, 2])
    with pytest.raises(ShapeError, match="A"):
        matmul_4bit_experts(torch.randn(4, 63), offsets, packed, state)
    with pytest.raises(ShapeError, match="offsets"):
        matmul_4bit_experts(x, offsets[1:], packed, state)
    with pytest.raises(DtypeError, match="offsets"):
        matmul_4bit_experts(x, offsets.long(), packed, state)
    with pytest.raises(DeviceError, match="offsets"):
        matmul_4bit_experts(x, offsets.to("meta"), packed, state)
    with pytest.raises(ShapeError, match="bias"):
        matmul_4bit_experts(x, offsets, packed, state, torch.randn(3, 9))
    with pytest.raises(ShapeError, match="B"):
        matmul_4bit_experts(x, offsets, packed[:9], state)
    with pytest.raises(ShapeError, match=r"quant_state\.shape"):
        matmul_4bit_experts(x, offsets, *F.quantize_4bit(torch.randn(8, 64)))
    for ends in ([0, 2, 1, 4], [-1, 1, 2, 4], [0, 1, 2, 5]):
        with pytest.raises(ArgumentError, match="offsets"):
            matmul_4bit_experts(x, torch.tensor(ends, dtype=torch.int32), packed, state)
    with pytest.raises(ArgumentError, match="not quantized"):
        Experts4bit(2, 64, 32)(x, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))


# ---- modules


def small(name):
    """A module of transformers' stacked experts, by the name of its class, with float weights."""
    pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts

    sizes = {"hidden_size": 64, "intermediate_size": 96}
    cls, config = {
        "mixtral": (MixtralExperts, MixtralConfig(**sizes, num_local_experts=6)),
        "gpt_oss": (GptOssExperts, GptOssConfig(**sizes, num_local_experts=6)),  # transposed, interleaved, biases
        "nemotron": (NemotronHExperts, NemotronHConfig(**sizes, n_routed_experts=6, moe_intermediate_size=96)),
    }[name]
    config._experts_implementation = "eager"
    module = cls(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.requires_grad_(False)


KINDS = ["mixtral", "gpt_oss", "nemotron"]


def call(device="cpu", dtype=torch.float32, tokens=5, k=2):
    hidden = torch.randn(tokens, 64, device=device).to(dtype)
    return hidden, torch.rand(tokens, 6, device=device).topk(k).indices, torch.rand(tokens, k, device=device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_does_what_the_dense_module_does(device, kind, dtype):
    module = small(kind).to(device)
    experts = Experts4bit.from_module(copy.deepcopy(module), blocksize=32).to(device)
    stacks = {name: p for name, p in experts._parameters.items() if isinstance(p, Params4bit)}
    assert len(stacks) == 2
    for name, weight in stacks.items():
        dense = F.dequantize_4bit(weight.data, weight.quant_state)
        module._parameters[name].data = dense.transpose(1, 2).contiguous() if kind == "gpt_oss" else dense
    for tokens, k in ((1, 1), (5, 2), (40, 6)):
        args = call(device, dtype, tokens, k)
        want = module(args[0].float(), *args[1:])
        got = experts.to(dtype)(*args)
        assert got.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        assert (got.float() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_module(device, kind):
    experts = Experts4bit.from_module(small(kind)).to(device)
    hidden, index, weights = call(device)
    hidden.requires_grad_()
    weights.requires_grad_()
    for_hidden, for_weights = torch.autograd.grad(experts(hidden, index, weights).square().sum(), (hidden, weights))
    step = 1e-2
    direction = torch.randn_like(hidden)
    with torch.no_grad():
        up = experts(hidden + step * direction, index, weights).square().sum()
        down = experts(hidden - step * direction, index, weights).square().sum()
    torch.testing.assert_close((for_hidden * direction).sum(), (up - down) / (2 * step), rtol=2e-2, atol=1e-2)
    assert for_weights.shape == weights.shape


def test_state_dicts(device):
    experts = Experts4bit(6, 64, 96, bias=True).to(device)
    state = experts.state_dict()
    assert {
        "gate_up_proj",
        "gate_up_proj.absmax",
        "gate_up_proj.quant_map",
        "gate_up_proj.nested_absmax",
        "gate_up_proj.nested_quant_map",
        "gate_up_proj.quant_state.bitsandbytes__nf4",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_bias",
    } <= set(state)
    args = call(device)
    want = experts(*args)
    options = {"bias": True, "quant_type": "fp4", "blocksize": 128}
    twins = [Experts4bit(6, 64, 96, **options), Experts4bit(6, 64, 96, **options).to(device)]
    for twin in twins:
        twin.load_state_dict(state)
        assert torch.equal(twin.to(device)(*args), want)
    on_meta = Experts4bit(6, 64, 96, bias=True, device="meta")
    on_meta.load_state_dict(state, assign=True)
    assert torch.equal(on_meta(*args), want)
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(twin(*args), want)
        assert list(twin.state_dict()) == list(state)
    # Float weights load as well, and are quantized.
    fresh = Experts4bit(6, 64, 96, bias=True)
    dense = {k: v.clone() for k, v in fresh.state_dict().items()}
    experts.load_state_dict(dense)
    assert torch.equal(experts(*args), fresh.to(device)(*args))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Experts4bit(5, 64, 96, bias=True).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        experts.load_state_dict({k: v for k, v in state.items() if not k.startswith("down_proj.")})
    with pytest.raises(CheckpointError, match="down_proj"):
        experts.load_state_dict({k: v[:7] if k == "down_proj" else v for k, v in state.items()})


def test_moves_and_casts(device):
    experts = Experts4bit(6, 64, 96)
    assert not experts.down_proj.bnb_quantized
    experts.half()
    assert experts.down_proj.dtype == torch.float16
    experts.to(device)
    before = experts.down_proj.data.clone()
    args = call(device)
    want = experts(*args)
    experts.to(torch.bfloat16).to("cpu").to(device)
    assert torch.equal(experts.down_proj.data, before)
    assert torch.equal(experts(*args), want)
    saved = experts.state_dict()
    assert experts.to("meta").down_proj.is_meta
    assert not experts.to_empty(device=device).down_proj.quant_state.absmax.is_meta
    experts.to("cpu").to(device).load_state_dict(saved)
    assert torch.equal(experts(*args), want)


def test_stacked_linear(device):
    layer = StackedLinear4bit(3, 64, 32, bias=True).to(device)
    offsets = offsets_of([2, 0, 1], device=device)
    x = torch.randn(3, 64, device=device)
    out = layer(x, offsets)
    assert close(out, *reference(x, offsets, layer.weight.data, layer.weight.quant_state, layer.bias), torch.float32)
    twin = StackedLinear4bit(3, 64, 32, bias=True)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.to(device)(x, offsets), out)
    assert "num_experts=3" in repr(layer)


def test_compiles_whole(device):
    experts = Experts4bit(6, 64, 96).to(device)
    args = call(device)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), experts(*args))


def test_quantize_model_takes_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        head_dim=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 128, (1, 7))
    old = model.model.layers[0].mlp.experts
    with torch.no_grad():
        want = model(ids).logits
        skipped = copy.deepcopy(model)
        halfbyte.quantize_model(skipped, skip=("lm_head", "experts"))
        assert not any(isinstance(m, Experts4bit) for m in skipped.modules())
        halfbyte.quantize_model(model, blocksize=32)
        experts = model.model.layers[0].mlp.experts
        assert type(experts) is Experts4bit
        assert old.gate_up_proj is None
        got = model(ids).logits
        assert (got - want).norm() < 0.3 * want.norm()
        again = transformers.AutoModelForCausalLM.from_config(config).eval()
        halfbyte.quantize_model(again)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(ids).logits, got)
    assert experts.gate_up_proj.quant_state.blocksize == 32
    assert tuple(experts.gate_up_proj.quant_state.shape) == (8, 64, 64)


def test_what_is_not_recognized():
    assert not Experts4bit.recognizes(nn.Linear(4, 4))
    with pytest.raises(ArgumentError, match="module"):
        Experts4bit.from_module(nn.Linear(4, 4))
    module = small("mixtral")
    module.gate_up_proj = None
    assert not Experts4bit.recognizes(module)


@pytest.mark.parametrize("dtype", FLOATS)
def test_low_rank_terms_and_their_gradients(device, dtype):
    """Rows of nobody before and after, an expert without rows, a rank that is no multiple of 8."""
    torch.manual_seed(0)
    offsets = offsets_of([3, 0, 5, 1], before=2, device=device)
    x = torch.randn(14, 24, device=device).to(dtype).requires_grad_()
    lhs, rhs = (
        torch.randn(4, 40, 3, device=device).requires_grad_(),
        torch.randn(4, 3, 24, device=device).requires_grad_(),
    )
    out = low_rank(x, offsets, lhs, rhs)
    assert out.dtype == dtype
    wanted = torch.zeros(14, 40, dtype=torch.float64, device=device)
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, lhs.to(dtype), rhs.to(dtype))]
    ends = offsets.tolist()
    for e in range(4):
        rows = slice(ends[e], ends[e + 1])
        wanted[rows] = inputs[0][rows] @ inputs[2][e].T @ inputs[1][e].T
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    distance = (out.double() - wanted).norm() / wanted.norm()
    assert distance < tolerance
    assert (out[:2] == 0).all()
    assert (out[11:] == 0).all()
    weights = torch.randn(14, 40, device=device)
    (out.float() * weights).sum().backward()
    (wanted * weights.double()).sum().backward()
    for got, reference in zip((x, lhs, rhs), inputs, strict=True):
        assert (got.grad.double() - reference.grad).norm() < tolerance * reference.grad.norm()
    expert = (torch.searchsorted(offsets, torch.arange(14, dtype=torch.int32, device=device), right=True) - 1)[2:11]
    all_at_once = _low_rank_of_all(x.detach().float()[2:11], expert, lhs.detach(), rhs.detach())
    assert (all_at_once.double() - wanted[2:11]).norm() < max(tolerance, 1e-2) * wanted.norm()
