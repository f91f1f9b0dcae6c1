"""Parameters spread over processes by FSDP: training, and checkpoints that give each process its own states."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

from halfbyte import optim
from halfbyte.errors import CheckpointError, UnsupportedError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 65))


def sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=mesh)
    return model


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model, whole = sharded(mesh), network()
    optimizer, other = optim.AdamW(model.parameters(), lr=1e-3), optim.AdamW(whole.parameters(), lr=1e-3)
    train(model, optimizer, range(5))
    train(whole, other, range(5))
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)

    model = sharded(mesh)
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-3)
    train(model, optimizer, range(3))
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8, torch.float32}
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=f"{folder}/checkpoint")
    weights = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(3, 6))

    again = sharded(mesh)
    for p, weight in zip(again.parameters(), weights, strict=True):
        p.data.copy_(weight)
    resumed = optim.AdamW8bit(again.parameters(), lr=1e-3)
    template = {"optimizer": get_optimizer_state_dict(again, resumed)}
    dcp.load(template, checkpoint_id=f"{folder}/checkpoint")
    set_optimizer_state_dict(again, resumed, template["optimizer"])
    train(again, resumed, range(3, 6))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[q][key])), key

    torch.save(optimizer.state_dict(), f"{folder}/of_rank_{rank}.pt")
    dist.barrier()
    with pytest.raises(CheckpointError, match=f"shard{rank}of2"):
        resumed.load_state_dict(torch.load(f"{folder}/of_rank_{1 - rank}.pt"))
    with pytest.raises(UnsupportedError, match="max_grad_norm"):
        clipped = optim.AdamW(model.parameters(), max_grad_norm=1.0)
        clipped.step()
    with pytest.raises(UnsupportedError, match="max_unorm"):
        optim.LAMB(model.parameters()).step()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)
