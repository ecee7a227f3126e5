"""What four ranks run where parameters are replicated over ranks that they do not know of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from conformance.process_groups import shared_group, shared_mesh
from tests.dtensor.programs import OPTIMIZERS, OWN
from tests.dtensor.split_programs import whole

SHAPES = ((12, 8), (12, 8), (6, 10))


class Layers(nn.Module):
    """Three matrices in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 12, bias=False, dtype=torch.float64)
        self.second = nn.Linear(12, 8, bias=False, dtype=torch.float64)
        self.third = nn.Linear(8, 12, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu())
        result: Tensor = self.third(hidden.relu())
        return result


def batches(steps: int) -> Tensor:
    """``[steps, 4, 5, 8]``: a batch of five for each of four ranks."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(steps, 4, 5, 8, generator=generator, dtype=torch.float64)


def make(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    named = [(key.removeprefix("module."), p) for key, p in model.named_parameters()]
    group = {"params": named, "algorithm": "dion" if name == "orth_dion" else name}
    own = {"rank_fraction": 0.5} if name in ("dion", "orth_dion") else {}
    made: torch.optim.Optimizer = OPTIMIZERS[name](
        [group], compile=False, **(OWN.get(name, {}) | own | options)
    )
    return made


def replicated(name: str, kind: str, steps: int = 3) -> dict[str, Any] | None:
    """Weights, and the saved momentum, after ``steps``, of a model wrapped as ``kind`` says.

    ``plain``: one process with all the data.  ``ddp``: DistributedDataParallel.  ``no_sync``: the same, gradients not
    averaged.  ``fsdp``: FSDP2 on an axis of a mesh whose other axis it does not know, gradients not averaged over it.
    """
    rank = torch.distributed.get_rank() if kind != "plain" else 0
    mesh = shared_mesh((2, 2), ("replicate", "shard")) if kind != "plain" else None
    group = shared_group(4) if kind in ("ddp", "no_sync") else None
    if rank >= 4:
        return None
    model: nn.Module = Layers()
    options: dict[str, Any] = {}
    if kind == "ddp":
        model = DistributedDataParallel(model, process_group=group)
        options = {"replicate_mesh": group}
    elif kind == "no_sync":
        options = {"replicate_mesh": group, "averaged": False}
    elif kind == "fsdp":
        assert mesh is not None
        fully_shard(model, mesh=mesh["shard"])
        options = {"replicate_mesh": mesh["replicate"], "averaged": False}
    optimizer = make(name, model, **options)
    for batch in batches(steps):
        optimizer.zero_grad()
        mine = batch.flatten(0, 1) if kind == "plain" else batch[rank]
        model(mine).square().mean().backward()
        optimizer.step()
    saved = optimizer.state_dict()
    return {
        "weight": [whole(p) for p in model.parameters()],
        "momentum": [whole(state["momentum"]) for state in saved["state"].values() if "momentum" in state],
        "local": [
            type(state["momentum"]) is not DTensor for state in saved["state"].values() if "momentum" in state
        ],
    }


def low_rank_steps(steps: int) -> tuple[float, float, float] | None:
    """Dion with gradients averaged beforehand against gradients left apart, each step from a shared state.

    The largest relative error of the update, of the averaged momentum, and how far the ranks' momenta are apart.
    """
    group = shared_group(4)
    rank = torch.distributed.get_rank()
    if rank >= 4:
        return None
    models = [Layers(), Layers()]
    optimizers = [
        make("dion", models[0]),
        make("dion", models[1], replicate_mesh=group, averaged=False),
    ]
    generator = torch.Generator().manual_seed(3)
    worst, momentum_error, apart = 0.0, 0.0, 0.0
    for _ in range(steps):
        pairs = list(zip(models[0].parameters(), models[1].parameters(), strict=True))
        old = [ours.detach().clone() for _, ours in pairs]
        for theirs, ours in pairs:
            grads = torch.randn(4, *ours.shape, generator=generator, dtype=torch.float64)
            theirs.grad, ours.grad = grads.mean(0), grads[rank].clone()
        for optimizer in optimizers:
            optimizer.step()
        for (theirs, ours), before in zip(pairs, old, strict=True):
            change, expected = ours.detach() - before, theirs.detach() - before
            worst = max(worst, float((change - expected).norm() / expected.norm()))
            mine = optimizers[1].state[ours]["momentum"]
            mean = mine.clone()
            torch.distributed.all_reduce(mean, group=group)
            mean /= 4
            true = optimizers[0].state[theirs]["momentum"]
            momentum_error = max(momentum_error, float((mean - true).norm() / true.norm()))
            apart = max(apart, float((mine - mean).norm() / mean.norm()))
            # From a shared state: the synchronous one takes over what the other has.
            theirs.data.copy_(ours.detach())
            true.copy_(mean)
            optimizers[0].state[theirs]["Q"].copy_(optimizers[1].state[ours]["Q"])
    return worst, momentum_error, apart


def split_without_averages(name: str) -> float | None:
    """A weight of several logical matrices whose gradients are not averaged: error against one process."""
    group = shared_group(4)
    rank = torch.distributed.get_rank()
    if rank >= 4:
        return None
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(19, 10, generator=generator, dtype=torch.float64)
    parameters = [torch.nn.Parameter(weight.clone()) for _ in range(2)]
    optimizers = [
        OPTIMIZERS[name](
            [{"params": [("fused", parameter)], "algorithm": name, "split": "rows(9, 5, 5)"}],
            compile=False,
            **(OWN.get(name, {}) | options),
        )
        for parameter, options in zip(
            parameters, ({}, {"replicate_mesh": group, "averaged": False}), strict=True
        )
    ]
    for _ in range(3):
        grads = torch.randn(4, 19, 10, generator=generator, dtype=torch.float64)
        for parameter, grad in zip(parameters, (grads.mean(0), grads[rank]), strict=True):
            parameter.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    alone, ours = (parameter.detach() - weight for parameter in parameters)
    return float((ours - alone).norm() / alone.norm())


def momenta_apart(resync_every: int, steps: int) -> list[float] | None:
    """After each step how far this rank's momentum is from the ranks' average, in Dion without averaged gradients."""
    group = shared_group(4)
    rank = torch.distributed.get_rank()
    if rank >= 4:
        return None
    model = Layers()
    options = {"replicate_mesh": group, "averaged": False, "resync_every": resync_every, "path": "low_rank"}
    optimizer = make("dion", model, **options)
    apart = []
    for batch in batches(steps):
        optimizer.zero_grad()
        model(batch[rank]).square().mean().backward()
        optimizer.step()
        momentum = optimizer.state[model.first.weight]["momentum"].detach()
        mean = momentum.clone()
        torch.distributed.all_reduce(mean, group=group)
        apart.append(float((momentum - mean / 4).norm() / mean.norm()))
    return apart


def flattened(sharded: bool, steps: int = 2) -> list[Tensor]:
    """Weights of a model that FSDP2 shards over two axes of a mesh, flattened into one; or of the plain model."""
    model = Layers()
    if sharded:
        mesh = shared_mesh(
            (4, 2), ("outer", "inner")
        )  # of all ranks, who have to make the new group together
        fully_shard(model, mesh=mesh["outer", "inner"]._flatten("both"))
    optimizer = make("muon", model)
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            own = parameter.device_mesh if isinstance(parameter, DTensor) else None
            parameter.grad = drawn if own is None else distribute_tensor(drawn, own, parameter.placements)  # type: ignore[attr-defined]
        optimizer.step()
    return [whole(parameter) for parameter in model.parameters()]
