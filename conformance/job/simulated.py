"""One step on meshes larger than this machine: the ranks are threads of one process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from conformance.job.events import Started
from conformance.job.judge import Judge, Step
from conformance.job.model import GPTShape, is_matrix, loss_of, make_model
from conformance.job.results import SIMULATED, Row
from conformance.job.settings import DTYPES, OPTIMIZERS, OptimizerSetting, Settings
from conformance.job.text import batch, read_text
from conformance.job.training import cpu_seconds, layouts_of, make_optimizer, quiet
from conformance.launch import Rank
from conformance.meshes import SIMULATED as MESHES
from conformance.meshes import Mesh
from conformance.process_groups import whole
from conformance.rank_threads import on_threads
from dion_ref import ALGORITHMS

SHAPE = GPTShape(width=64, layers=1, heads=4)
"""Smaller than the job's: one process computes what up to 64 ranks would."""
OUTSIDE = ("embedding.", "position.", "head.")
"""Trained, but not judged: they are laid out as the norms are, and cost as much as all the rest."""
WARM_UP = 2  # steps of the oracle before the one that is judged, for a state that is not zero
COLWISE = ("qkv.weight", "up.weight")


@dataclass(frozen=True)
class Snapshot:
    """Weights, gradients and states of all parameters before the judged step, float64, whole."""

    weights: dict[str, Tensor]
    grads: dict[str, Tensor]
    states: dict[str, dict[str, Any]]


def simulate(rank: Rank, settings: Settings) -> None:
    """Judges one float64 step of every optimizer on every simulated mesh; emits Started and Row.

    With several ranks (local processes without a process group) each takes a part of the cases.
    """
    quiet()
    snapshots: dict[str, Snapshot] = {}
    for optimizer, name in cases(settings)[rank.index :: rank.count]:
        mesh, setting = MESHES[name], OPTIMIZERS[optimizer]
        rank.emit(Started(optimizer, "float64", mesh.label, 1))
        if optimizer not in snapshots:
            snapshots[optimizer] = take_snapshot(setting, settings)
        rank.emit(_judge_mesh(setting, settings, mesh, snapshots[optimizer]))


def cases(settings: Settings) -> list[tuple[str, str]]:
    """(optimizer, mesh) of every simulated row: all optimizers on each mesh.

    Every other mesh has them in the opposite order, so that two processes get equal shares.
    """
    order = {0: settings.optimizers, 1: settings.optimizers[::-1]}
    return [(optimizer, mesh) for place, mesh in enumerate(settings.meshes) for optimizer in order[place % 2]]


def take_snapshot(setting: OptimizerSetting, settings: Settings) -> Snapshot:
    """The model after WARM_UP steps of the oracle, and the next gradient, on one process."""
    judge = Judge(setting, DTYPES["float64"], seed=settings.seed)
    model = make_model(SHAPE, torch.float64, seed=settings.seed)
    parameters = dict(model.named_parameters())
    states = {name: judge.fresh_state(name, p.detach()) for name, p in parameters.items()}
    text = read_text()
    for step in range(WARM_UP + 1):
        inputs, targets = batch(
            text, step, sequences=settings.sequences, length=SHAPE.length, seed=settings.seed
        )
        model.zero_grad()
        loss_of(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        if step == WARM_UP:
            break
        with torch.no_grad():
            for name, parameter in parameters.items():
                rule, hyper = ALGORITHMS[judge.algorithm(name)], judge.hyper(name)
                assert parameter.grad is not None
                new, states[name] = rule.step(parameter.detach(), parameter.grad, states[name], hyper)
                parameter.copy_(new)
    kept = {name: p for name, p in parameters.items() if not name.startswith(OUTSIDE)}
    grads = {name: p.grad.clone() for name, p in kept.items() if p.grad is not None}
    weights = {name: p.detach().clone() for name, p in kept.items()}
    return Snapshot(weights, grads, {name: dict(vars(states[name])) for name in kept})


def placements_for(name: str, mesh: Mesh) -> tuple[Placement, ...]:
    """Placements of a parameter on a mesh, as HSDP, FSDP2 and tensor parallelism leave them.

    On an axis "dp" everything is replicated. Colwise weights are (_StridedShard(0), Shard(0)) on "fsdp" and
    "tp", rowwise ones (Shard(0), Shard(1)), all others Shard(0) on "fsdp" and replicated on "tp".
    """
    size = dict(mesh.axes)
    tensor = size.get("tp", 1)
    found: dict[str, Placement] = {"dp": Replicate(), "fsdp": Shard(0), "tp": Replicate()}
    if is_matrix(name) and tensor > 1:
        colwise = name.endswith(COLWISE)
        found["tp"] = Shard(0) if colwise else Shard(1)
        found["fsdp"] = _StridedShard(0, split_factor=tensor) if colwise else Shard(0)
    return tuple(found[axis] for axis in mesh.names)


def _distribute(value: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    whole = DTensor.from_local(value.clone(), mesh, run_check=False)
    return whole.redistribute(placements=placements)


class _Named(nn.Module):
    """Modules named like the model's, holding DTensor parameters: what `param_groups` needs to see."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in parameters.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(value))


@dataclass(frozen=True)
class _Stepped:
    """What a rank has after the step: whole weights and states, the seconds it took, and how its shards lie."""

    weights: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]
    seconds: float
    layouts: dict[str, int]


def _step(setting: OptimizerSetting, settings: Settings, described: Mesh, snapshot: Snapshot) -> _Stepped:
    """The step of one rank."""
    mesh = init_device_mesh("cpu", described.sizes, mesh_dim_names=described.names)
    laid = {n: _distribute(w, mesh, placements_for(n, described)) for n, w in snapshot.weights.items()}
    model = _Named(laid)
    optimizer = make_optimizer(model, setting, DTYPES["float64"], replace(settings, compile=False))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.grad = _distribute(snapshot.grads[name], mesh, placements_for(name, described))
    _load(optimizer, parameters, snapshot)
    began = time.perf_counter()
    optimizer.step()
    seconds = time.perf_counter() - began
    weights = {name: whole(parameter.detach()) for name, parameter in parameters.items()}
    states = {
        name: {key: whole(value) for key, value in optimizer.state[parameter].items() if key != "step"}
        for name, parameter in parameters.items()
    }
    return _Stepped(weights, states, seconds, layouts_of(parameters))


def _need_agreement(ranks: list[_Stepped]) -> None:
    """Refuse ranks of which one has other weights or states than the first.

    Raises:
        RuntimeError: naming the parameter.
    """
    first = ranks[0]
    for index, rank in enumerate(ranks):
        for name, weight in rank.weights.items():
            own = {"weight": weight, **rank.states[name]}
            for key, value in {"weight": first.weights[name], **first.states[name]}.items():
                if not torch.equal(own[key], value):
                    raise RuntimeError(f"{name}: rank {index} has another {key} than rank 0 after the step")


def _judge_mesh(setting: OptimizerSetting, settings: Settings, described: Mesh, snapshot: Snapshot) -> Row:
    began, cpu_began = time.perf_counter(), cpu_seconds()
    judge = Judge(setting, DTYPES["float64"], seed=settings.seed)
    ranks = on_threads(partial(_step, setting, settings, described, snapshot), described.ranks)
    _need_agreement(ranks)
    first = ranks[0]
    for name, weight in first.weights.items():
        before = snapshot.states[name]
        old = {key: value for key, value in before.items() if key != "step"}
        count = int(before.get("step", WARM_UP))
        step = Step(snapshot.weights[name], snapshot.grads[name], old, weight, first.states[name], count)
        judge.step(name, step)
    return Row(
        optimizer=setting.name,
        dtype="float64",
        mesh=described.label,
        kind=SIMULATED,
        series=tuple(judge.series()),
        losses=(),
        seconds=time.perf_counter() - began,
        first_step_seconds=first.seconds,
        step_seconds=first.seconds,
        layouts=first.layouts,
        cpu_seconds=cpu_seconds() - cpu_began,
    )


def _load(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], snapshot: Snapshot) -> None:
    """Puts the snapshot's states into the optimizer, as a resumed run would."""
    saved = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for index, name in enumerate(order):
        own = saved["state"][index]
        state[index] = {
            key: torch.as_tensor(snapshot.states[name][key], dtype=torch.as_tensor(value).dtype)
            for key, value in own.items()
        }
    optimizer.load_state_dict({**saved, "state": state})
