"""What four of the ranks run for wrapped models and for faults; the others return None."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from conformance.process_groups import shared_mesh
from dion_dtensor import Dion, Muon, audit, param_groups
from dion_dtensor.layout import owners
from tests.dtensor.layouts import build_mesh, lay_out, layout

WRAPPED = {
    "fsdp": ((4,), ("shard",)),
    "hsdp": ((2, 2), ("replicate", "shard")),
    "tp": ((2, 2), ("fsdp", "tp")),
    "fsdp+tp": ((2, 2), ("fsdp", "tp")),
    "one mesh": ((2, 2), ("fsdp", "tp")),
    "two axes as one": ((2, 2), ("fsdp", "tp")),
    "a mesh for each": ((4,), ("shard",)),
}
WRAPPED_LAYOUTS = {
    "fsdp": "on shard(4)=S(0)",
    "hsdp": "on replicate(2)=R, shard(2)=S(0)",
    "tp": "on tp(2)=S(0)",
    "fsdp+tp": "on fsdp(2)=_S(0, 2), tp(2)=S(0)",
    "one mesh": "on fsdp(2)=_S(0, 2), tp(2)=S(0)",
    "two axes as one": "on fsdp_tp(4)=S(0)",
    "a mesh for each": "on replicate(2)=R, shard(2)=S(0)",
}
"""What the audit says of a matrix there."""
NEWER = {"one mesh", "two axes as one", "a mesh for each"}
"""Ways of FSDP2 that torch 2.11 does not have."""


class Block(nn.Module):
    """Sizes that four ranks cannot share evenly, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 10, dtype=torch.float64)
        self.up = nn.Linear(10, 22, dtype=torch.float64)
        self.down = nn.Linear(22, 10, bias=False, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.up(self.embedding(tokens)).relu())


def wrapped_training(kind: str, algorithm: str, compiled: bool) -> tuple[dict[str, Tensor], str] | None:
    """Three steps of a model wrapped as ``kind`` says; full weights and the audit."""
    if kind != "plain" and torch.distributed.get_rank() >= 4:
        shared_mesh(*WRAPPED[kind])  # groups are made by all ranks together
        return None
    torch.manual_seed(0)
    model = Block()
    if kind in ("fsdp", "hsdp"):
        fully_shard(model, mesh=shared_mesh(*WRAPPED[kind]))
    elif kind in ("tp", "fsdp+tp"):
        mesh = shared_mesh(*WRAPPED[kind])
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        if kind == "fsdp+tp":
            fully_shard(model, mesh=mesh["fsdp"])
    elif kind == "a mesh for each":
        _shard_on_two_meshes(model)
    elif kind != "plain":
        _shard_on_the_whole_mesh(model, kind == "two axes as one")
    optimizer_type = Dion if algorithm == "dion" else Muon
    groups = param_groups(model, algorithm=algorithm, lr=0.05)
    # Seven tokens give gradients of rank seven at most; r = 5 stays clear of columns that are nearly dependent,
    # where the rounding of the sharded backward itself would be amplified.
    options = {"rank_fraction": 0.5} if algorithm == "dion" else {}
    optimizer = optimizer_type(groups, compile=compiled, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        tokens = torch.randint(0, 7, (4, 5), generator=generator)
        if kind in ("one mesh", "two axes as one"):
            tokens = distribute_tensor(tokens, shared_mesh(*WRAPPED[kind]))
        model(tokens).square().sum().backward()
        optimizer.step()
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return weights, str(audit(optimizer))


def _shard_on_two_meshes(model: Block) -> None:
    """Of FSDP2 over four ranks, the matrices over pairs of them."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import (
        FSDPMeshInfo,
        HSDPMeshInfo,
        ShardPlacementResult,
    )

    mesh, pairs = shared_mesh(*WRAPPED["fsdp"]), shared_mesh(*WRAPPED["hsdp"])
    halves = HSDPMeshInfo(pairs, shard_mesh_dim=1, replicate_mesh_dim=0)

    def place(parameter: nn.Parameter) -> ShardPlacementResult:
        every = FSDPMeshInfo(mesh, shard_mesh_dim=0)
        return ShardPlacementResult(Shard(0), halves if parameter.ndim == 2 else every)

    fully_shard(model, mesh=mesh, shard_placement_fn=place)


def _shard_on_the_whole_mesh(model: Block, as_one: bool) -> None:
    """DTensors of one mesh, some of whose axes FSDP2 is told to shard over: the first, or both ``as_one``."""
    from torch.distributed.fsdp import DataParallelMeshDims  # torch 2.11 has none

    mesh = shared_mesh(*WRAPPED["one mesh"])
    dims = {} if as_one else {"up.weight": 0, "up.bias": 0, "down.weight": 1}
    for name, parameter in list(model.named_parameters()):
        tensor = Shard(dims[name]) if name in dims else Replicate()
        owner, _, own = name.rpartition(".")
        laid = distribute_tensor(parameter.detach(), mesh, [Replicate(), tensor])
        setattr(model.get_submodule(owner), own, nn.Parameter(laid))
    shard = ("fsdp", "tp") if as_one else ("fsdp",)
    fully_shard(model, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard=shard))


def rows_mistaken(place: str, sizes: list[int], wrapped: bool) -> list[int] | None:
    """Of the ``sizes`` of a dim those whose rows do not lie here as is believed.

    Sharded by torch's redistribution, or ``wrapped`` by its FSDP2 over its tensor parallelism.
    """
    where = layout(place)
    mesh = build_mesh(where)
    here = mesh.get_coordinate()
    if here is None:
        return None
    found = []
    for size in sizes:
        rows = torch.arange(float(size)).view(size, 1)
        if wrapped:
            model = nn.Sequential(nn.Linear(1, size, bias=False))
            model[0].weight.data.copy_(rows)
            parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
            fully_shard(model, mesh=mesh["shard"])
            laid = model[0].weight.detach()
        else:
            laid = lay_out(rows, where, mesh)
        assert isinstance(laid, DTensor)
        held = owners(size, where.mesh, tuple(laid.placements))[tuple(here)]
        if laid.to_local().flatten().tolist() != held:
            found.append(size)
    return found


def faulty_step(fault: str, faulty_rank: int) -> tuple[str, bool] | None:
    """The error of a step with a fault on one rank, and whether weights and state are as before."""
    where = layout("2x2 T0 S0")
    mesh = build_mesh(where)
    if mesh.get_coordinate() is None:
        return None
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    parameters = [nn.Parameter(lay_out(weight, where, mesh)) for weight in weights]
    named = list(zip(["first.weight", "second.weight"], parameters, strict=True))
    optimizer = Muon(named, compile=False)
    for parameter in parameters:
        parameter.grad = lay_out(torch.ones(6, 4), where, mesh)
    optimizer.step()
    before = [p.to_local().clone() for p in parameters]
    states = copy.deepcopy([optimizer.state[p]["momentum"].to_local() for p in parameters])
    bad = parameters[1]
    assert bad.grad is not None
    if rank == faulty_rank:
        if fault == "nan":
            bad.grad.to_local()[0, 0] = float("nan")
        elif fault == "missing":
            bad.grad = None
    if fault == "placement" and rank == faulty_rank:
        bad.grad = lay_out(torch.ones(6, 4), layout("2x2 S0 S1"), mesh)
    message = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    same = all(torch.equal(p.to_local(), old) for p, old in zip(parameters, before, strict=True))
    same &= all(
        torch.equal(optimizer.state[p]["momentum"].to_local(), old)
        for p, old in zip(parameters, states, strict=True)
    )
    return message, same


def fault_among_meshes(where: str, faulty_rank: int) -> tuple[str, bool] | None:
    """A plain parameter, one on half of the ranks, one on all of them; NaN in one of them on one rank."""
    mesh = shared_mesh((2, 2), ("fsdp", "tp"))
    if mesh.get_coordinate() is None:
        return None
    ones = torch.ones(4, 4)
    parameters = {
        "plain": nn.Parameter(ones.clone()),
        "submesh": nn.Parameter(lay_out(ones, layout("2 S0"), mesh["fsdp"])),
        "mesh": nn.Parameter(lay_out(ones, layout("2x2 S0 S1"), mesh)),
    }
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    if torch.distributed.get_rank() == faulty_rank:
        bad = parameters[where].grad
        (bad.to_local() if isinstance(bad, DTensor) else bad).fill_(float("nan"))  # type: ignore[union-attr]
    message = ""
    try:
        Muon([(f"{name}.weight", p) for name, p in parameters.items()], compile=False).step()
    except RuntimeError as error:
        message = str(error)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters.values()]
    return message, all(bool((one == 1).all()) for one in local)


def partial_gradient(algorithm: str) -> tuple[Tensor, Tensor] | None:
    """A step with gradients not yet averaged over the replicate axis, and one with the averaged ones."""
    mesh = build_mesh(layout("2x2 R S0"))
    if mesh.get_coordinate() is None:
        return None
    rank = torch.distributed.get_rank()
    results = []
    for averaged in (False, True):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        halves = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        parameter = nn.Parameter(lay_out(weight, layout("2x2 R S0"), mesh))
        optimizer = (Dion if algorithm == "dion" else Muon)([("w", parameter)], compile=False)
        if averaged:
            parameter.grad = lay_out(halves.mean(0), layout("2x2 R S0"), mesh)
        else:
            own = DTensor.from_local(halves[rank // 2], mesh, [Replicate(), Replicate()], run_check=False)
            local = own.redistribute(placements=[Replicate(), Shard(0)]).to_local()
            parameter.grad = DTensor.from_local(local, mesh, [Partial("avg"), Shard(0)], run_check=False)
        optimizer.step()
        results.append(parameter.detach().full_tensor())
    return results[0], results[1]


def loaded_beside_a_flattened_mesh(before: str, after: str) -> bool | None:
    """Whether a momentum saved in one layout is the gradient in another, on a mesh that was flattened too."""
    mesh = build_mesh(layout(before), flattened=True)
    if mesh.get_coordinate() is None:
        return None
    drawn = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = []
    for where in map(layout, (before, after)):
        parameter = nn.Parameter(lay_out(drawn[0], where, mesh))
        made.append((Muon([("w", parameter)], compile=False), parameter))
    (saving, parameter), (loading, other) = made
    parameter.grad = lay_out(drawn[1], layout(before), mesh)
    saving.step()
    loading.load_state_dict(saving.state_dict())
    expected = lay_out(drawn[1], layout(after), mesh)
    own = loading.state[other]["momentum"]
    return torch.equal(own.to_local(), expected.to_local())


def pending_gradient(algorithm: str) -> tuple[Tensor, Tensor] | None:
    """A step with a gradient to be averaged over the axis that shards its parameter, and one with the average."""
    where = layout("4 S0")
    mesh = build_mesh(where)
    if mesh.get_coordinate() is None:
        return None
    drawn = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for pending in (True, False):
        parameter = nn.Parameter(lay_out(drawn[4], where, mesh))
        optimizer = (Dion if algorithm == "dion" else Muon)([("w", parameter)], compile=False)
        own = drawn[torch.distributed.get_rank()]
        parameter.grad = (
            DTensor.from_local(own.clone(), mesh, [Partial("avg")], run_check=False)
            if pending
            else lay_out(drawn[:4].mean(0), where, mesh)
        )
        optimizer.step()
        results.append(parameter.detach().full_tensor())
    return results[0], results[1]


def replicated_gradient() -> tuple[Tensor, Tensor] | None:
    """A step with a gradient that is replicated where its parameter is sharded, and one with its shards."""
    mesh = build_mesh(layout("2x2 R S0"))
    if mesh.get_coordinate() is None:
        return None
    results = []
    for codes in ("2x2 R R", "2x2 R S0"):
        generator = torch.Generator().manual_seed(0)
        weight, grad = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
        parameter = nn.Parameter(lay_out(weight, layout("2x2 R S0"), mesh))
        optimizer = Muon([("w", parameter)], compile=False)
        parameter.grad = lay_out(grad, layout(codes), mesh)
        optimizer.step()
        results.append(parameter.detach().full_tensor())
    return results[0], results[1]


def state_of_rank(algorithm: str) -> list[tuple[str, list[str]]] | None:
    """Names and state keys, with a gradient on no parameter."""
    where = layout("2x2 S0 S0")
    mesh = build_mesh(where)
    if mesh.get_coordinate() is None:
        return None
    shapes: list[Any] = [(2, 3), (3, 2), (9, 9)]
    named = [
        (f"w{i}", nn.Parameter(lay_out(torch.ones(shape), where, mesh))) for i, shape in enumerate(shapes)
    ]
    optimizer = (Dion if algorithm == "dion" else Muon)(named, compile=False)
    return [(name, sorted(optimizer.state[parameter])) for name, parameter in named]
