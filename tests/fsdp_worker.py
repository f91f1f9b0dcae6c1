"""One of several processes of ``test_fsdp.py``: ``fsdp_worker.py CASE RANK WORLD PORT FOLDER DEVICE``."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)

import halfbyte
from halfbyte.errors import ArgumentError, CheckpointError
from halfbyte.nn import Experts4bit
from halfbyte.nn.sharded import Shard4bit

MODEL = Path(__file__).parent / "models" / "pycode-llama-7m"
CASE, RANK, WORLD, PORT, FOLDER, DEVICE = (
    sys.argv[1],
    int(sys.argv[2]),
    int(sys.argv[3]),
    sys.argv[4],
    Path(sys.argv[5]),
    sys.argv[6],
)
WHOLE = StateDictOptions(full_state_dict=True)
# Before torch 2.13 fully_shard takes parameters of floating-point types only.
STORAGES = [torch.float16, torch.bfloat16, torch.float32]
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
    STORAGES.append(torch.uint8)


def same(got, wanted):
    a, b = (tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in (got, wanted))
    return a == b or (a.startswith(b"{") and a.rstrip(b" ") == b)  # JSON has spaces behind it


def net(seed, dtype=torch.bfloat16, **options):
    options = {"quant_storage": torch.bfloat16} | options
    torch.manual_seed(seed)
    # 35 rows: neither bytes nor scales divide evenly among the processes.
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 35)).to(dtype)
    return halfbyte.quantize_model(model.to(DEVICE), "nf4", **options)


def split(model, mesh, **options):
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def pieces(mesh):
    for storage in STORAGES:
        for double in (False, True):
            options = {"quant_storage": storage, "double_quant": double}
            reference, model = net(0, **options), net(0, **options)
            entries = reference.state_dict()
            # A policy that casts 16-bit parameters to fp32: packed bytes of any storage must come through as they are.
            split(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
            local = model[2].weight._local_tensor
            assert isinstance(local, Shard4bit)
            assert local.numel() <= -(-entries["2.weight"].numel() // WORLD)
            assert local.scales.absmax.numel() == -(-entries["2.weight.absmax"].numel() // WORLD)
            assert model[2].quant_state is None  # which would keep all scales alive
            x = torch.randn(5, 64, device=DEVICE)
            wanted = reference.float()(x)
            for _ in range(3):
                assert torch.equal(model(x), wanted)
            got = get_model_state_dict(model, options=WHOLE)
            if RANK == 0:
                assert got.keys() == entries.keys()
                assert all(same(got[key], entries[key]) for key in entries)
            other = net(1, **options)
            set_model_state_dict(model, other.state_dict(), options=WHOLE)
            assert torch.equal(model(x), other.float()(x))


def offloaded(mesh):
    reference, model = net(0), net(0)
    split(model, mesh, offload_policy=CPUOffloadPolicy(pin_memory=DEVICE == "cuda"))
    x = torch.randn(5, 64, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(2):
        assert torch.equal(model(x), reference(x))


def refused(mesh):
    model = split(net(0), mesh)
    for wrong in (net(0, blocksize=32), net(0, double_quant=False), net(0, quant_storage=torch.float16)):
        try:
            set_model_state_dict(model, wrong.state_dict(), options=WHOLE)
        except CheckpointError as error:
            assert "0.weight" in str(error)
        else:
            raise AssertionError("took a checkpoint of another form")


def experts(mesh):
    def make():
        torch.manual_seed(0)
        return Experts4bit(5, 64, 32, quant_storage=torch.bfloat16).to(torch.bfloat16).to(DEVICE)

    reference, model = make(), make()
    fully_shard(model, mesh=mesh)
    x = torch.randn(7, 64, device=DEVICE, dtype=torch.bfloat16)
    index, weights = torch.randint(0, 5, (7, 2), device=DEVICE), torch.rand(7, 2, device=DEVICE)
    for _ in range(2):
        assert torch.equal(model(x, index, weights), reference(x, index, weights))
    got, entries = get_model_state_dict(model, options=WHOLE), reference.state_dict()
    if RANK == 0:
        assert got.keys() == entries.keys()
        assert all(same(got[key], entries[key]) for key in entries)
    set_model_state_dict(model, entries, options=WHOLE)
    assert torch.equal(model(x, index, weights), reference(x, index, weights))


class Adapted(nn.Module):
    """A frozen 4-bit layer with a trained bypass, as QLoRA has it."""

    def __init__(self, **options):
        super().__init__()
        self.base = halfbyte.nn.LinearNF4(64, 64, bias=False, **options)
        self.down, self.up = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

    def forward(self, x):
        return nn.functional.silu(self.base(x) + self.up(self.down(x)))


def adapted(seed, double=True, storage=torch.bfloat16):
    torch.manual_seed(seed)
    layers = [Adapted(compress_statistics=double, quant_storage=storage) for _ in range(2)]
    return nn.Sequential(*layers).to(torch.bfloat16).to(DEVICE)


def flattened(model, use_orig_params=True, **options):
    """Split by FSDP1, which flattens the parameters of a block into one: bytes and bf16 numbers alike."""

    def policy(module, recurse, nonwrapped_numel):
        # Without the original parameters, those of one block must be trained all or none.
        return recurse or isinstance(module, Adapted) or (not use_orig_params and type(module) is nn.Linear)

    device = torch.device(DEVICE, RANK) if DEVICE == "cuda" else torch.device("cpu")
    options |= {"sync_module_states": DEVICE == "cuda", "use_orig_params": use_orig_params}
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device, **options)


def fsdp1(mesh):
    """FullyShardedDataParallel: a step, whole and sharded state dicts saved, and others loaded."""
    bf16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    # On the CPU torch (2.13) frees what it would copy to the CPU before it does.
    whole = FullStateDictConfig(offload_to_cpu=DEVICE == "cuda", rank0_only=DEVICE == "cuda")
    for original, double, policy in ((True, True, bf16), (True, False, None), (False, True, None)):
        reference, other = adapted(0, double), adapted(1, double)
        entries = {key: value.clone() for key, value in reference.state_dict().items()}
        model = flattened(adapted(0, double), original, mixed_precision=policy)
        torch.manual_seed(RANK)
        x = torch.randn(5, 64, device=DEVICE, dtype=torch.bfloat16)
        loss = model(x).float().square().sum()
        assert torch.equal(loss, reference(x).float().square().sum())
        loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, whole):
            saved = model.state_dict()
        if RANK == 0:
            assert saved.keys() == entries.keys()
            # Packed bytes and scales are as they were, whatever is trained.
            assert all(same(saved[key], entries[key]) == (".base." in key) for key in entries)
        after = model(x)
        if RANK == 0:
            reference.load_state_dict(saved)
            assert torch.equal(reference(x), after)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            model.load_state_dict(other.state_dict())
        for _ in range(2):
            assert torch.equal(model(x), other(x))
        third = flattened(adapted(2, double), original)
        sharded = StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig()
        with FullyShardedDataParallel.state_dict_type(third, *sharded):
            pieces_of_third = third.state_dict()
        with FullyShardedDataParallel.state_dict_type(model, *sharded):
            model.load_state_dict(pieces_of_third)
        assert torch.equal(model(x), adapted(2, double)(x))
        if original:
            got = get_model_state_dict(model, options=WHOLE)
            wanted = adapted(2, double).state_dict()
            assert RANK or (got.keys() == wanted.keys() and all(same(got[key], wanted[key]) for key in wanted))
            set_model_state_dict(model, entries, options=WHOLE)
            assert torch.equal(model(x), adapted(0, double)(x))


def fsdp1_refused(mesh):
    """What would make other numbers of the bytes, or takes no bytes of this form."""
    model = flattened(adapted(0), mixed_precision=MixedPrecision(param_dtype=torch.float16))
    try:
        model(torch.randn(5, 64, device=DEVICE, dtype=torch.bfloat16))
    except ArgumentError as error:
        assert "float16" in str(error) and "quant_storage" in str(error)
    else:
        raise AssertionError("took bytes that were cast")
    model, other = flattened(adapted(0)), adapted(0, storage=torch.float16)
    # torch (2.13) ends a process with an abort where loading fails before the first call, of any model.
    model(torch.randn(5, 64, device=DEVICE, dtype=torch.bfloat16))
    try:
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            model.load_state_dict(other.state_dict())
    except CheckpointError as error:
        assert "base.weight" in str(error) and "float16" in str(error)
    else:
        raise AssertionError("took a checkpoint of another form")


def save(mesh):
    """Leave a checkpoint that the test reads with another number of processes."""
    model = split(net(3), mesh)
    dcp.save(get_model_state_dict(model), checkpoint_id=FOLDER / "checkpoint")


def read(mesh):
    """Read what other processes have saved, however many they were."""
    model = split(net(4), mesh)
    entries = get_model_state_dict(model)
    dcp.load(entries, checkpoint_id=FOLDER / "checkpoint")
    set_model_state_dict(model, entries)
    x = torch.randn(5, 64, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(model(x), net(3)(x))


def train(mesh):
    """One QLoRA step on a sequence each is that of one process on all of them."""
    import peft
    import transformers

    def adapted():
        config = halfbyte.HalfbyteConfig("nf4", compute_dtype=torch.float32, quant_storage=torch.float32)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            MODEL, quantization_config=config, dtype=torch.float32, device_map={"": DEVICE}
        )
        torch.manual_seed(0)
        options = peft.LoraConfig(
            r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        return peft.get_peft_model(model, options).train()

    def step(model, ids):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {
            name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in trained.items()
        }
        optimizer.step()
        after = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in trained.items()}
        return loss.detach(), gradients, after

    torch.manual_seed(7)
    ids = torch.randint(3, 1000, (WORLD, 32), device=DEVICE)
    model = adapted()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss, gradients, after = step(model, ids[RANK : RANK + 1])
    dist.all_reduce(loss)
    alone, wanted, expected = step(adapted(), ids)
    torch.testing.assert_close(loss / WORLD, alone, rtol=1e-5, atol=1e-6)
    assert len(gradients) == 8 * 2 * 2
    for name, gradient in wanted.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, (name, error)
        assert (after[name] - expected[name]).abs().max() < 2e-4, name


def tensor_parallel(mesh):
    """transformers' own: each process reads and quantizes its slice of every layer."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version("5.23"):
        return

    def load(**options):
        config = halfbyte.HalfbyteConfig("nf4", double_quant=False)
        return transformers.AutoModelForCausalLM.from_pretrained(
            MODEL, dtype=torch.float32, quantization_config=config, **options
        ).eval()

    ids = torch.arange(40, 72, device=DEVICE).view(1, -1)
    with torch.no_grad():
        wanted = load(device_map={"": DEVICE})(input_ids=ids).logits
        model = load(tp_plan="auto")
        logits = model(input_ids=ids).logits
    layer = model.model.layers[0].mlp.gate_proj
    assert layer.quant_state.shape == (768 // WORLD, 256)
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    # Rows of 256 and 768 are whole blocks on each process: the codes are those of one process.
    assert (logits - wanted).norm() < 1e-5 * wanted.norm()
    try:
        model.save_pretrained(FOLDER / "sliced")
    except halfbyte.errors.HalfbyteError as error:
        assert "tensor parallelism" in str(error)
    else:
        raise AssertionError("saved a slice")


os.environ |= {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": PORT,
    "RANK": str(RANK),
    "WORLD_SIZE": str(WORLD),
    "LOCAL_RANK": str(RANK),
}
torch.set_num_threads(1)
if DEVICE == "cuda":
    torch.cuda.set_device(RANK)
dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=RANK, world_size=WORLD)
mesh = dist.init_device_mesh(DEVICE, (WORLD,))
for case in CASE.split(","):
    globals()[case](mesh)
    print("passed", case, flush=True)
if "fsdp1_refused" in CASE:
    # A load that fails half-way leaves threads in torch's FSDP1, with which the interpreter's end aborts now and then.
    dist.barrier()
    os._exit(0)
dist.destroy_process_group()
