"""Functions that the tests run on ranks; they must be importable there."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from conformance.job.gather import Gatherer
from conformance.job.model import GPTShape, loss_of, make_model
from conformance.job.sharding import layout, shard
from conformance.job.text import batch, read_text
from conformance.launch import Rank

SMALL = GPTShape(width=32, layers=1, heads=4, length=16)


def total(rank: Rank, start: int) -> int:
    """Sum of all ranks' indices plus `start`, by a collective."""
    value = torch.tensor([rank.index], device=rank.device)
    dist.all_reduce(value)
    rank.emit(f"rank {rank.index} of {rank.count}")
    return start + int(value)


def raise_on(rank: Rank, guilty: int) -> None:
    """One rank raises, the others wait for it in a collective."""
    if rank.index == guilty:
        raise ValueError("no such luck\nsecond line")
    dist.barrier()


def raise_everywhere(rank: Rank, _: None) -> None:
    """All ranks raise the same."""
    raise ValueError("all together")


def kill_on(rank: Rank, guilty: int) -> None:
    """One rank is killed by the system, the others wait for it in a collective."""
    if rank.index == guilty:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_on(rank: Rank, guilty: int) -> None:
    """One rank leaves without a word, the others work on without noticing."""
    if rank.index == guilty:
        os._exit(7)
    time.sleep(600)


def ignore_the_end(rank: Rank, guilty: int) -> None:
    """One rank raises, the others ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank.index == guilty:
        time.sleep(0.3)
        raise ValueError("over")
    time.sleep(600)


def write_pid_and_wait(rank: Rank, folder: str) -> None:
    """Leaves this process's id in a file and waits."""
    with open(os.path.join(folder, str(rank.index)), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def sharded_gradients(rank: Rank, _: None) -> tuple[dict[str, torch.Tensor], dict[str, str], bool]:
    """Whole gradients of the sharded model, every parameter's layout, and whether gathers agree with DTensor."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = shard(make_model(SMALL, torch.float64), mesh)
    inputs, targets = batch(read_text(), 0, sequences=4, length=SMALL.length)
    place = mesh.get_local_rank("fsdp")
    loss_of(model(inputs.chunk(2)[place]), targets.chunk(2)[place]).backward()  # type: ignore[no-untyped-call]
    parameters = dict(model.named_parameters())
    grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    gathered = Gatherer(parameters)(list(grads.values()))
    whole = {name: grad.full_tensor() for name, grad in grads.items()}  # type: ignore[attr-defined]
    same = all(torch.equal(gathered[name], whole[name]) for name in whole)
    return gathered, {name: layout(parameter) for name, parameter in parameters.items()}, same
