"""fuse_linears: siblings in one launch, and nothing else that anyone could notice."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte import _fuse, fuse_linears, unfuse_linears
from halfbyte.errors import ArgumentError
from halfbyte.nn import Linear4bit, LinearNF4


class Attention(nn.Module):
    def __init__(self, k=64, bias=True, **options):
        super().__init__()
        self.q_proj = Linear4bit(k, 64, bias, torch.float32, quant_type="nf4", **options)
        self.k_proj = Linear4bit(k, 32, bias, torch.float32, quant_type="nf4", **options)
        self.v_proj = Linear4bit(k, 32, False, torch.float32, quant_type="nf4", **options)

    def forward(self, x, y=None):
        y = x if y is None else y
        return torch.cat([self.q_proj(x), self.k_proj(y), self.v_proj(y)], -1)


@pytest.fixture
def launches(monkeypatch):
    """Numbers of weights of each launch."""
    seen, run = [], _fuse._run

    def counted(x, pieces, *rest):
        seen.append(len(pieces))
        return run(x, pieces, *rest)

    monkeypatch.setattr(_fuse, "_run", counted)
    return seen


@pytest.fixture
def attention(device):
    model = Attention().to(device)
    model.requires_grad_(False)
    return model


def waiting(model):
    """Products that nobody has taken yet."""
    held = getattr(model.q_proj._siblings.group.threads, "waiting", None)
    return 0 if held is None else len(held.outputs)


def test_one_launch_and_the_same_result(attention, device, launches):
    for rows in (1, 3, 16):
        x = torch.randn(rows, 64, device=device)
        want = attention(x)
        assert fuse_linears(attention) == 1
        launches.clear()
        assert torch.equal(attention(x), want)
        assert launches == [3]
        assert waiting(attention) == 0
        assert unfuse_linears(attention) == 3
        assert torch.equal(attention(x), want)
        assert launches == [3]


def test_nothing_else_changes(attention, device):
    names = [type(m) for m in attention.modules()]
    parameters = dict(attention.named_parameters())
    before = {k: v.clone() for k, v in attention.state_dict().items()}
    fuse_linears(attention)
    assert [type(m) for m in attention.modules()] == names
    assert dict(attention.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[k] for k, p in attention.named_parameters())
    after = attention.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    unfuse_linears(attention)
    assert not any("_siblings" in vars(m) for m in attention.modules())


def test_loaded_weights_are_seen(attention, device, launches):
    other = Attention().to(device)
    fuse_linears(attention)
    x = torch.randn(2, 64, device=device)
    attention(x)
    attention.load_state_dict(other.state_dict())
    assert torch.equal(attention(x), other(x))
    # In the middle of a group, too: what waits is stale.
    third = Attention().to(device)
    q = attention.q_proj(x)
    attention.load_state_dict(third.state_dict())
    assert torch.equal(q, other.q_proj(x))
    assert torch.equal(attention.k_proj(x), third.k_proj(x))
    with torch.no_grad():
        attention.q_proj(x)
        attention.k_proj.bias.add_(1)
        third.k_proj.bias.add_(1)
    assert torch.equal(attention.k_proj(x), third.k_proj(x))


def test_an_input_that_changes_is_seen(attention, device, launches):
    fuse_linears(attention)
    x = torch.randn(2, 64, device=device)
    attention.q_proj(x)
    x.mul_(2)
    want = halfbyte.matmul_4bit(
        x, attention.k_proj.weight, attention.k_proj.weight.quant_state, bias=attention.k_proj.bias
    )
    assert torch.equal(attention.k_proj(x), want)
    attention.q_proj(x)
    x.data = x.data * 3
    assert torch.equal(
        attention.k_proj(x),
        halfbyte.matmul_4bit(
            x, attention.k_proj.weight, attention.k_proj.weight.quant_state, bias=attention.k_proj.bias
        ),
    )
    # An equal tensor is not the same one.
    launches.clear()
    fresh = x.clone()
    attention.q_proj(fresh)
    attention.k_proj(fresh.clone())
    assert len(launches) == 2


def test_products_are_handed_out_once(attention, device):
    fuse_linears(attention)
    x = torch.randn(2, 64, device=device)
    attention.q_proj(x)
    first, second = attention.k_proj(x), attention.k_proj(x)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_holds_no_memory_once_the_input_is_gone(attention, device):
    fuse_linears(attention)
    x = torch.randn(2, 64, device=device)
    attention.q_proj(x)
    assert waiting(attention) == 2
    del x
    gc.collect()
    assert waiting(attention) == 0


def test_layers_that_never_share_work_alone_in_the_end(attention, device, launches):
    fuse_linears(attention)
    unfused = copy.deepcopy(attention)
    unfuse_linears(unfused)
    for _ in range(8):  # cross-attention: k and v share what q does not have
        x, y = torch.randn(2, 2, 64, device=device)
        assert torch.equal(attention(x, y), unfused(x, y))
    launches.clear()
    attention(x, y)
    assert launches == [2]


def test_gradients_go_their_own_ways(device, launches):
    attention = Attention().to(device)  # biases require gradients
    x = torch.randn(2, 64, device=device)
    want = torch.autograd.grad(attention(x).sum(), attention.q_proj.bias)
    fuse_linears(attention)
    assert torch.equal(torch.autograd.grad(attention(x).sum(), attention.q_proj.bias)[0], want[0])
    assert launches == []
    x.requires_grad_()
    (grad,) = torch.autograd.grad(attention(x).sum(), x)
    assert grad.shape == x.shape
    assert launches == []
    with torch.no_grad():
        attention(x)
    assert launches == [3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(device, reentrant):
    attention = Attention().to(device).train()
    x = torch.randn(2, 64, device=device, requires_grad=True)
    want = torch.autograd.grad(attention(x).sum(), x)[0]
    fuse_linears(attention)
    out = torch.utils.checkpoint.checkpoint(attention, x, use_reentrant=reentrant)
    out.sum().backward()
    torch.testing.assert_close(x.grad, want)


def test_modes_that_are_left_alone(attention, device, launches):
    fuse_linears(attention)
    x = torch.randn(2, 64, device=device)
    want = attention(x)
    launches.clear()
    with torch.autocast(device, torch.bfloat16):
        attention(x)
    with torch.inference_mode():
        assert torch.equal(attention(torch.randn(2, 64, device=device) * 0 + x), want)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), want)
    attention(torch.randn(200, 64, device=device))  # many rows
    attention(torch.randn(64, 4, device=device).t())  # not contiguous
    attention(torch.randn(0, 64, device=device))
    assert launches == []


def test_hooks_run_and_may_change_things(attention, device, launches):
    fuse_linears(attention)
    x = torch.randn(2, 64, device=device)
    want = attention(x)
    seen = []
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = attention.get_submodule(name)
        layer.register_forward_hook(lambda m, args, out, name=name: seen.append((name, tuple(out.shape))))
    launches.clear()
    assert torch.equal(attention(x), want)
    assert seen == [("q_proj", (2, 64)), ("k_proj", (2, 32)), ("v_proj", (2, 32))]
    assert launches == [3]
    attention.k_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    changed = attention(x)
    assert not torch.equal(changed[:, 64:96], want[:, 64:96])
    assert torch.equal(changed[:, :64], want[:, :64])
    assert torch.equal(changed[:, 96:], want[:, 96:])


def test_reentrant_calls(attention, device):
    fuse_linears(attention)
    x, other = torch.randn(2, 2, 64, device=device)
    want, want_other = attention(x), attention(other)
    inner = []
    handle = attention.q_proj.register_forward_hook(lambda *_: (handle.remove(), inner.append(attention(other)))[0])
    assert torch.equal(attention(x), want)
    assert torch.equal(inner[0], want_other)


def test_adapters_around_the_layers(attention, device, launches):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return self.base_layer(x) + 1

    x = torch.randn(2, 64, device=device)
    want = attention(x)
    attention.q_proj = Adapter(attention.q_proj)
    attention.v_proj = Adapter(Adapter(attention.v_proj))
    assert fuse_linears(attention) == 1
    got = attention(x)
    assert launches == [3]
    want[:, :64] += 1
    want[:, 96:] += 1
    want[:, 96:] += 1
    assert torch.equal(got, want)


def test_copies_and_pickles_are_groups_of_their_own(attention, device, launches):
    fuse_linears(attention)
    x = torch.randn(2, 64, device=device)
    want = attention(x)
    buffer = io.BytesIO()
    torch.save(attention, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(attention),
        pickle.loads(pickle.dumps(attention)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in copies:
        launches.clear()
        assert torch.equal(twin(x), want)
        assert launches == [3]
        assert twin.q_proj._siblings.group is not attention.q_proj._siblings.group
        twin.k_proj.bias.data.add_(1)
        assert torch.equal(attention(x), want)
    # A layer alone takes no sibling along.
    alone = copy.deepcopy(attention.q_proj)
    launches.clear()
    assert torch.equal(alone(x), attention.q_proj(x))
    assert sum(reference is not None for reference in alone._siblings.group.layers) == 1
    shallow = copy.copy(attention.k_proj)
    assert torch.equal(shallow(x), attention.k_proj(x))


def test_moves(attention, device, launches):
    fuse_linears(attention)
    attention.to("cpu").float()
    x = torch.randn(2, 64)
    want = attention(x)
    assert launches == [3]
    saved = attention.state_dict()
    attention.to("meta").to_empty(device="cpu")
    attention.load_state_dict(saved)
    assert torch.equal(attention(x), want)
    torch.testing.assert_close(attention.to(device)(x.to(device)).cpu(), want, rtol=1e-5, atol=1e-5)


def test_layers_that_do_not_fit_together(device, launches):
    attention = Attention().to(device)
    attention.requires_grad_(False)
    attention.k_proj = LinearNF4(64, 32, compute_dtype=torch.float32, blocksize=128).to(device).requires_grad_(False)
    x = torch.randn(2, 64, device=device)
    want = attention(x)
    fuse_linears(attention)
    for _ in range(3):
        assert torch.equal(attention(x), want)
    assert set(launches) == {2}
    attention.v_proj.compute_dtype = torch.bfloat16
    attention(x)


def test_which_layers_are_found(device):
    model = nn.Module()
    model.attention = Attention()
    model.mlp = nn.Module()
    model.mlp.gate_proj, model.mlp.up_proj = LinearNF4(64, 8), LinearNF4(64, 8)
    model.mla = nn.Module()
    model.mla.q_proj, model.mla.kv_a_proj_with_mqa = LinearNF4(64, 8), LinearNF4(64, 8)
    model.odd = nn.Module()
    model.odd.q_proj, model.odd.k_proj, model.odd.v_proj = LinearNF4(64, 8), LinearNF4(32, 8), LinearNF4(32, 8)
    model.dense = nn.Module()
    model.dense.q_proj, model.dense.k_proj = nn.Linear(64, 8), nn.Linear(64, 8)
    model.mine = nn.Module()
    model.mine.left, model.mine.right = LinearNF4(64, 8), LinearNF4(64, 8)
    assert fuse_linears(model) == 4
    assert model.odd.q_proj._siblings is None
    assert model.odd.k_proj._siblings.group is model.odd.v_proj._siblings.group
    assert fuse_linears(model, [("left", "right")]) == 1
    assert model.attention.q_proj._siblings is None
    assert fuse_linears(nn.Linear(2, 2)) == 0
    for groups in ([("q_proj",)], ["q_proj"], [("q", "q")], [tuple("abcdefghi")]):
        with pytest.raises(ArgumentError, match="groups"):
            fuse_linears(model, groups)


def test_threads_do_not_see_each_others_products(attention, device):
    fuse_linears(attention)
    inputs = [torch.randn(2, 64, device=device) for _ in range(4)]
    want = [attention(x) for x in inputs]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(50) if not torch.equal(attention(inputs[i]), want[i]))

    shared = inputs[0]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    threads += [threading.Thread(target=lambda: attention(shared)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_graphs(launches):
    attention = Attention().to("cuda").requires_grad_(False)
    static = torch.randn(2, 64, device="cuda")
    want = attention(static)
    fuse_linears(attention)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attention(static)
    torch.cuda.synchronize()
    launches.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(static)
    assert launches == [3]
    graph.replay()
    assert torch.equal(captured, want)
    new = torch.randn(2, 64, device="cuda")
    fresh = attention(new)
    static.copy_(new)
    graph.replay()
    assert torch.equal(captured, fresh)


@pytest.mark.gpu
def test_products_do_not_cross_captures_or_streams(launches):
    attention = Attention().to("cuda").requires_grad_(False)
    static = torch.randn(2, 64, device="cuda")
    attention(static)
    fuse_linears(attention)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    graphs = []
    launches.clear()
    with torch.cuda.stream(stream):
        attention.q_proj(static)  # outside of any capture, on the stream that captures
        for layer in (attention.k_proj, attention.v_proj):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = layer(static)
            graphs.append((graph, out, layer))
    assert launches == [3, 3, 3]
    new = torch.randn(2, 64, device="cuda")
    static.copy_(new)
    torch.cuda.synchronize()
    for graph, out, layer in graphs:
        graph.replay()
        assert torch.equal(out, layer(new))
    launches.clear()
    attention.q_proj(static)
    with torch.cuda.stream(stream):
        attention.k_proj(static)
    torch.cuda.synchronize()
    assert len(launches) == 2
