"""Options of optimizers: of groups, of single parameters, of the constructors, and those that bitsandbytes lacks."""

import inspect

import pytest
import torch

import halfbyte as hb
from halfbyte import optim
from halfbyte.errors import ArgumentError, DeviceError, DtypeError, HalfbyteError, UnsupportedError

BF16, F32 = torch.bfloat16, torch.float32


def parameter(n, dtype=F32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(n, generator=generator).to(device, dtype))


def give_gradients(params, step=0, scale=0.01):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)


@pytest.fixture
def manager():
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


def bits(optimizer, p):
    return {torch.uint8: 8, F32: 32}[optimizer.state[p]["state1"].dtype]


# ---- constructors


@pytest.mark.parametrize("name", [name for name in optim.__all__ if name.startswith(("Adam", "AdamW", "PagedAdam"))])
@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"eps": -1e-8},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"betas": "(0.9, much)"},
        {"betas": (0.9,)},
        {"weight_decay": -0.1},
        {"no_such_option": True},
        {"max_grad_norm": 0.0},
        {"kahan_sum": True, "master_weights": True},
    ],
    ids=str,
)
def test_arguments_outside_their_domain_are_refused_by_name(name, bad):
    with pytest.raises(ArgumentError, match=list(bad)[-1]):
        getattr(optim, name)([parameter(4)], **bad)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda p: optim.SGD(p, 0.1), "momentum"),
        (lambda p: optim.LARS8bit(p, 0.1), "momentum"),
        (lambda p: optim.RMSprop(p, alpha=0), "alpha"),
        (lambda p: optim.RMSprop8bit(p, centered=True), "centered"),
        (lambda p: optim.Adagrad(p, lr_decay=0.1), "lr_decay"),
        (lambda p: optim.Adagrad(p, initial_accumulator_value=0.1), "initial_accumulator_value"),
        (lambda p: optim.Adam8bit(p, amsgrad=True), "amsgrad"),
    ],
)
def test_what_is_not_implemented_is_refused_as_there(make, argument):
    with pytest.raises(UnsupportedError, match=argument) as caught:
        make([parameter(4)])
    assert isinstance(caught.value, NotImplementedError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda p: optim.Adam8bit(p, optim_bits=8), "optim_bits"),
        (lambda p: optim.Adagrad8bit(p, optim_bits=32), "optim_bits"),
        (lambda p: optim.LAMB8bit(p, max_unorm=0.5), "max_unorm"),
        (lambda p: optim.SGD(p, 0.1, 0.9, dampening=0.1, nesterov=True), "nesterov"),
        (lambda p: optim.AdEMAMix(p, betas=(0.9, 0.999)), "betas"),
        (lambda p: optim.AdEMAMix(p, t_alpha=-1), "t_alpha"),
        (lambda p: optim.PytorchLARS(p, nesterov=True), "nesterov"),
        (lambda p: optim.AdamW(p, args=object()), "args"),
        (lambda p: optim.AdamW([{"params": p, "kahan_sum": True, "stochastic_rounding": True}]), "kahan_sum"),
    ],
)
def test_other_arguments_that_do_not_go_together(make, argument):
    with pytest.raises(ArgumentError, match=argument):
        make([parameter(4)])


def test_betas_may_be_a_string_and_args_an_object():
    optimizer = optim.Adam([parameter(5000)], betas="(0.8, 0.95)")
    assert list(optimizer.param_groups[0]["betas"]) == [0.8, 0.95]
    args = optim.MockArgs({"optim_bits": 8, "min_8bit_size": 10, "max_unorm": 0.0, "skip_zeros": False})
    p = parameter(100)
    optimizer = optim.Adam([p], args=args)
    give_gradients([p])
    optimizer.step()
    assert bits(optimizer, p) == 8


def test_every_class_says_both_of_its_names():
    for name in optim.__all__:
        cls = getattr(optim, name)
        if inspect.isclass(cls) and issubclass(cls, optim.Optimizer8bit):
            assert f"halfbyte.optim.{cls.__module__.rpartition('.')[2]}.{name}" in str(cls)
            assert f"bitsandbytes.optim.{name}" in str(cls)

    class Mine(optim.AdamW8bit):
        pass

    assert "bitsandbytes" not in str(Mine)


# ---- options of groups and of parameters


def test_small_parameters_have_32_bits_and_groups_their_own_options(device):
    small, large, precise, other = (parameter(n, device=device) for n in (4095, 4096, 5000, 100))
    optimizer = optim.AdamW8bit(
        [
            {"params": [small, large]},
            {"params": [precise], "optim_bits": 32, "lr": 0.0},
            {"params": [other], "min_8bit_size": 1, "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    give_gradients([small, large, precise, other])
    before = precise.detach().clone()
    optimizer.step()
    assert [bits(optimizer, p) for p in (small, large, precise, other)] == [32, 8, 32, 8]
    assert torch.equal(precise, before)
    optimizer.param_groups[1]["lr"] = 1e-2
    optimizer.step()
    assert not torch.equal(precise, before)


def test_an_added_group_and_a_late_gradient(device):
    first, late, added = (parameter(5000, device=device, seed=seed) for seed in range(3))
    optimizer = optim.AdamW8bit([first, late])
    give_gradients([first])
    optimizer.step()
    assert late not in optimizer.state
    optimizer.add_param_group({"params": [added]})
    give_gradients([first, late, added])
    optimizer.step()
    late.grad = None
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in (first, late, added)] == [3, 1, 2]


def test_overrides_of_the_manager(manager, device):
    plain, precise, slow = (parameter(5000, device=device, seed=seed) for seed in range(3))
    manager.override_config([precise], "optim_bits", 32)
    manager.override_config(slow, key_value_dict={"lr": 0.0, "betas": (0.5, 0.5)})
    optimizer = optim.AdamW8bit([plain, precise, slow], lr=1e-2)
    give_gradients([plain, precise, slow])
    before = slow.detach().clone()
    optimizer.step()
    assert [bits(optimizer, p) for p in (plain, precise, slow)] == [8, 32, 8]
    assert torch.equal(slow, before)
    # betas of its own: half of the gradient, not a tenth
    assert optimizer.state[slow]["absmax1"].max() > 3 * optimizer.state[plain]["absmax1"].max()
    # One that is equal to the group's today is its own tomorrow.
    manager.override_config(slow, "lr", 1e-2)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    settled, moved = plain.detach().clone(), slow.detach().clone()
    optimizer.step()
    assert torch.equal(plain, settled) and not torch.equal(slow, moved)
    with pytest.raises(ArgumentError, match="key_value_dict"):
        manager.override_config(plain, "lr", 1.0, {"lr": 2.0})
    with pytest.raises(RuntimeError, match="get_instance"):
        optim.GlobalOptimManager()


@pytest.mark.parametrize("register_first", [False, True])
def test_overrides_follow_a_position_when_parameters_are_replaced(manager, register_first):
    old = [parameter(5000, seed=seed) for seed in range(2)]
    if register_first:
        manager.register_parameters(old)
    manager.override_config(old[1], "optim_bits", 32)
    if not register_first:
        manager.register_parameters([{"params": old}])
        new = [torch.nn.Parameter(p.detach().clone()) for p in old]
    else:
        new = old
    optimizer = optim.AdamW8bit(new)
    give_gradients(new)
    optimizer.step()
    assert [bits(optimizer, p) for p in new] == [8, 32]


def test_a_layer_asks_for_32_bits_of_its_weight(manager):
    class StableEmbedding(torch.nn.Embedding):
        def __init__(self, *args):
            super().__init__(*args)
            optim.GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    embedding, head = StableEmbedding(128, 64), torch.nn.Linear(64, 128)
    embedding.to(BF16), head.to(BF16)
    optimizer = optim.AdamW8bit([*embedding.parameters(), *head.parameters()])
    head(embedding(torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    assert [bits(optimizer, p) for p in (embedding.weight, head.weight)] == [32, 8]
    manager.register_module_override(head, "no_weight", {"optim_bits": 32})
    with pytest.raises(AttributeError):
        optim.AdamW8bit(head.parameters()).step()


def test_a_subclass_with_an_update_of_its_own_is_asked_for_every_parameter():
    calls = []

    class Mine(optim.Optimizer2State):
        def update_step(self, group, p, gindex, pindex):
            calls.append((gindex, pindex))
            p.grad = p.grad * 2
            super().update_step(group, p, gindex, pindex)

    params = [parameter(5000), parameter(10)]
    optimizer = Mine("adam", params, 1e-3, optim_bits=8)
    give_gradients(params)
    params.append(parameter(3))
    optimizer.add_param_group({"params": params[2:]})
    optimizer.step()
    assert calls == [(0, 0), (0, 1)]
    twin = parameter(5000)
    other = optim.Adam8bit([twin], 1e-3)
    twin.grad = params[0].grad
    other.step()
    assert torch.equal(twin, params[0])


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    p = parameter(50)

    def closure():
        assert torch.is_grad_enabled()
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer = optim.AdamW([p])
    assert optimizer.step(closure).item() > 0
    assert optimizer.state[p]["step"] == 1


def test_learning_rate_schedulers_and_hooks():
    p = parameter(50)
    optimizer = optim.AdamW([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(len(args)))
    give_gradients([p])
    optimizer.step()
    scheduler.step()
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before) and len(calls) == 2


# ---- what bitsandbytes does not have


@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdamW8bit, optim.Lion8bit, optim.SGD8bit], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["stochastic_rounding", "kahan_sum", "master_weights"])
def test_small_steps_are_kept(cls, dtype, way, device):
    """Each step is a hundredth of a unit in the last place: the plain parameter stays, these follow fp32."""
    lr = torch.finfo(dtype).eps / 200
    kwargs = {"momentum": 0.9} if "SGD" in str(cls) else {}
    results = {}
    for name, options, kind in (("plain", {}, dtype), ("full", {}, F32), ("ours", {way: True}, dtype)):
        p = torch.nn.Parameter(torch.full((20_000,), 1.5, dtype=kind, device=device))
        optimizer = cls([p], lr=lr, weight_decay=0.0, **kwargs, **options)
        for _ in range(100):
            p.grad = torch.full_like(p, 0.1 if kwargs else 1.0)
            optimizer.step()
        results[name] = p.detach()
        extra = set(optimizer.state[p]) & {"master", "compensation"}
        assert extra == (
            {"master_weights": {"master"}, "kahan_sum": {"compensation"}}.get(way, set()) if options else set()
        )
    moved = 1.5 - results["full"].double().mean().item()
    assert torch.all(results["plain"] == 1.5)
    kept = results["ours"].double()
    if way == "master_weights":
        kept = optimizer.state[p]["master"].double()
        assert torch.equal(p.detach(), kept.to(dtype))
    if way == "kahan_sum":
        kept = kept + optimizer.state[p]["compensation"].double()
        assert torch.equal(p.detach(), kept.to(dtype))
    # What Kahan keeps of a step is itself rounded to 16 bits.
    assert 1.5 - kept.mean().item() == pytest.approx(moved, rel=0.1 if way == "kahan_sum" else 0.05)


def test_stochastic_rounding_depends_on_its_seed_alone(device):
    def run(**options):
        p = parameter(5000, BF16, device)
        optimizer = optim.AdamW8bit([p], lr=1e-4, stochastic_rounding=True, **options)
        torch.manual_seed(torch.randint(10**6, ()).item())
        for step in range(5):
            give_gradients([p], step)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(), run())
    assert not torch.equal(run(seed=1), run(seed=2))


def test_full_precision_parameters_need_none_of_this():
    p = parameter(5000)
    optimizer = optim.AdamW8bit([p], kahan_sum=True)
    give_gradients([p])
    optimizer.step()
    assert "compensation" not in optimizer.state[p]


def test_clipping_in_the_step_is_clipping_before_it(device):
    shapes = [(64, 100), 5000, 3]
    params = [parameter(n, device=device, seed=i) for i, n in enumerate(shapes)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    one = optim.AdamW8bit([{"params": params[:1]}, {"params": params[1:], "lr": 1e-2}], max_grad_norm=0.1)
    other = optim.AdamW8bit([{"params": twins[:1]}, {"params": twins[1:], "lr": 1e-2}])
    for step in range(3):
        give_gradients(params, step, scale=1.0 if step != 1 else 1e-6)
        give_gradients(twins, step, scale=1.0 if step != 1 else 1e-6)
        one.step()
        norm = torch.nn.utils.clip_grad_norm_(twins, 0.1)
        other.step()
        torch.testing.assert_close(one.grad_norm, norm.view(1), rtol=1e-5, atol=0)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_capturing_is_for_gpus():
    p = parameter(5000)
    give_gradients([p])
    with pytest.raises(DeviceError, match="capturable"):
        optim.AdamW8bit([p], capturable=True).step()


@pytest.mark.parametrize(
    ("p", "grad"),
    [
        (torch.nn.Parameter(torch.zeros(10, dtype=torch.float64)), None),
        (torch.nn.Parameter(torch.zeros(10, dtype=torch.complex64)), None),
        (torch.nn.Parameter(torch.zeros(10, 10)), torch.eye(10).to_sparse()),
    ],
)
def test_what_cannot_be_updated_is_refused_and_nothing_changes(p, grad):
    good = parameter(100)
    before = good.detach().clone()
    optimizer = optim.AdamW([good, p])
    give_gradients([good])
    p.grad = torch.ones_like(p) if grad is None else grad
    with pytest.raises((HalfbyteError, DtypeError)):
        optimizer.step()
    assert torch.equal(good, before)


def test_an_empty_parameter_and_no_gradient_at_all():
    empty, p = torch.nn.Parameter(torch.zeros(0, 4)), parameter(10)
    optimizer = optim.AdamW8bit([empty, p])
    optimizer.step()
    assert not optimizer.state
    empty.grad = torch.zeros(0, 4)
    give_gradients([p])
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_the_function_checks_what_it_is_given():
    update = hb.functional.optimizer_update_32bit
    p, g, m, v = (torch.zeros(8) for _ in range(4))
    rest = (0.9, 1e-8, 1, 1e-3, v, 0.999)
    with pytest.raises(ArgumentError, match="optimizer_name"):
        update("adamw", g, p, m, *rest)
    with pytest.raises(ArgumentError, match="step"):
        update("adam", g, p, m, 0.9, 1e-8, 0, 1e-3, v)
    with pytest.raises(HalfbyteError, match="g:"):
        update("adam", g[:4], p, m, *rest)
    with pytest.raises(DtypeError, match="state1"):
        update("adam", g, p, m.to(torch.uint8), *rest)
    eight = hb.functional.optimizer_update_8bit_blockwise
    codes, scale, code = torch.zeros(8, dtype=torch.uint8), torch.zeros(1), hb.functional.create_dynamic_map()
    with pytest.raises(ArgumentError, match="qmap1"):
        eight("lion", g, p, codes, None, 0.9, 0.99, 0, 0, 0, 1, 1e-3, code.flip(0), None, scale, None)


def test_ops_are_as_torch_wants_them():
    p, g, m, v = torch.randn(8), torch.randn(8), torch.zeros(8), torch.zeros(8)
    torch.library.opcheck(
        torch.ops.halfbyte.optimizer_update_32bit.default,
        ("adam", g, p, m, v, None, 0.0, 0.0, 0.9, 0.999, 0.0, 0.0, 1e-8, 0.0, 1, 1e-3, 1.0),
    )
    q, n = p.clone(), m.clone()

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(p, g, m):
        hb.functional.optimizer_update_32bit("lion", g, p, m, 0.9, 0.0, 1, 1e-3, None, 0.99)
        return p * 2

    compiled(p, g, m)
    hb.functional.optimizer_update_32bit("lion", g, q, n, 0.9, 0.0, 1, 1e-3, None, 0.99)
    assert torch.equal(p, q) and torch.equal(m, n)


def test_a_compiled_training_step():
    model = torch.nn.Linear(128, 128)
    optimizer = optim.AdamW8bit(model.parameters())

    @torch.compile(backend="eager")
    def train(x):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(3):
        before = model.weight.detach().clone()
        train(torch.randn(4, 128))
        assert optimizer.state[model.weight]["step"] == step + 1
        assert not torch.equal(model.weight, before)


def test_threads_of_the_cpu_are_torchs(monkeypatch):
    seen = []
    monkeypatch.setattr(hb._native, "set_num_threads", seen.append)
    torch.set_num_threads(2)
    p = parameter(5000)
    give_gradients([p])
    optim.AdamW8bit([p]).step()
    hb.functional.optimizer_update_32bit("lion", p.grad, p.detach(), torch.zeros(5000), 0.9, 0.0, 1, 1e-3, None, 0.99)
    assert seen == [2, 2]


def _shorter(state, p):
    state["state1"] = state["state1"][:100]


def _of_another_type(state, p):
    state["state2"] = state["state2"].double()


def _fewer_scales(state, p):
    state["absmax1"] = state["absmax1"][:3]


def _not_contiguous(state, p):
    state["state1"] = torch.zeros(5000, 2, dtype=torch.uint8)[:, 0]


def _without_scales(state, p):
    del state["absmax2"]


def _without_a_second_moment(state, p):
    del state["state2"]


def _no_number(state, p):
    state["step"] = -3


def _a_gradient_of_another_shape(state, p):
    del state
    p.grad = None
    p.data = torch.zeros(7)
    p.grad = torch.zeros(7)


@pytest.mark.parametrize(
    "damage",
    [
        _shorter,
        _of_another_type,
        _fewer_scales,
        _not_contiguous,
        _without_scales,
        _without_a_second_moment,
        _no_number,
        _a_gradient_of_another_shape,
    ],
)
def test_states_that_someone_has_damaged_are_refused_and_nothing_changes(damage):
    good, p = parameter(5000, seed=1), parameter(5000)
    optimizer = optim.AdamW8bit([good, p])
    give_gradients([good, p])
    optimizer.step()
    damage(optimizer.state[p], p)
    before = good.detach().clone(), p.detach().clone(), optimizer.state[good]["state1"].clone()
    with pytest.raises((HalfbyteError, KeyError, TypeError)):
        optimizer.step()
    assert torch.equal(good, before[0]) and torch.equal(p, before[1])
    assert torch.equal(optimizer.state[good]["state1"], before[2])


def test_a_replaced_state_and_a_replaced_memory_are_used(device):
    p, q = parameter(5000, device=device), parameter(5000, device=device)
    one, other = optim.AdamW8bit([p]), optim.AdamW8bit([q])
    for step in range(4):
        give_gradients([p], step)
        give_gradients([q], step)
        one.step()
        other.step()
        state = one.state[p]
        for name in ("state1", "state2", "absmax1", "absmax2"):
            state[name] = state[name].clone()
        p.data = p.data.clone()
        if step == 1:
            one.state[p] = dict(state)
    assert torch.equal(p, q)
    assert torch.equal(one.state[p]["state1"], other.state[q]["state1"])
    one.state[p].clear()  # as good as new
    one.step()
    assert one.state[p]["step"] == 1
