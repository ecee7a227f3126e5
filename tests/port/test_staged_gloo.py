"""The backend of ranks that share GPUs, here on the CPU, gives what gloo gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from conformance import launch
from conformance.adapters.ours import adapter
from conformance.port.grading import PASS
from conformance.port.meshes import run_meshes
from conformance.port.runner import Selection
from conformance.vectors import load

RANKS = 3


def redistributed(rank: launch.Rank, _: None) -> list[Any]:
    """Between all placements of a matrix with an uneven number of rows, and what collectives of objects give."""
    mesh = init_device_mesh("cpu", (rank.count,))
    ways: list[Placement] = [Shard(0), Shard(1), Replicate()]
    values = torch.arange(35.0).reshape(7, 5)
    found: list[Any] = [dist.get_backend()]
    for before in [*ways, Partial("sum"), Partial("max"), Partial("avg")]:
        if before.is_partial():
            laid = DTensor.from_local(values * (rank.index + 1), mesh, [before], run_check=False)
        else:
            laid = DTensor.from_local(values, mesh, [Replicate()], run_check=False).redistribute(
                placements=[before]
            )
        found += [laid.redistribute(placements=[after]).full_tensor() for after in ways]
    objects: list[Any] = [None] * rank.count
    dist.all_gather_object(objects, rank.index)
    sent = [f"from {rank.index}"]
    dist.broadcast_object_list(sent, src=1)
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, [f"for {index}" for index in range(rank.count)], src=0)
    dist.barrier()
    ranks, mine_too = rank.count, torch.arange(3.0) + 10 * rank.index
    received = [torch.zeros(2) for _ in range(ranks)]
    dist.all_to_all(received, [torch.full((2,), 10.0 * other + rank.index) for other in range(ranks)])
    summed = mine_too.clone()
    dist.reduce(summed, dst=1)
    passed = torch.zeros(3)
    if rank.index % 2 == 0:
        dist.send(mine_too, (rank.index + 1) % ranks) if rank.index + 1 < ranks else None
    else:
        dist.recv(passed, rank.index - 1)
    found += [*received, summed if rank.index == 1 else torch.zeros(()), passed]
    return [*found, objects, sent, mine]


def test_collectives_are_those_of_gloo() -> None:
    staged = launch.run(redistributed, None, ranks=RANKS, backend="staged_gloo")
    usual = launch.run(redistributed, None, ranks=RANKS)
    assert {rank[0] for rank in staged} == {"staged_gloo"}
    for ours, theirs in zip(staged, usual, strict=True):
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("pattern", ["L3/dion2/dion/2x2-RS0-to-4-S1", "L4/dion/dion/2x2-S0S1"])
def test_meshes_step_and_resume_on_it(pattern: str) -> None:
    selection = Selection(("L3", "L4"), ("float64",), (pattern,))
    (verdict,) = run_meshes(
        "conformance.adapters.ours:adapter",
        adapter.capabilities(),
        load(),
        selection,
        ranks=4,
        backend="staged_gloo",
    )
    assert verdict.status == PASS, verdict.message
