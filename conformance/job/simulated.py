"""One step on meshes larger than this machine: one process plays all ranks (`LocalTensorMode`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
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
from dion_ref import ALGORITHMS

SHAPE = GPTShape(width=64, layers=1, heads=4)
"""Smaller than the job's: one process computes what up to 64 ranks would. Every layout divides evenly."""
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
    """Judges one float64 step of every matrix optimizer on every simulated mesh; emits Started and Row.

    With several ranks (local processes without a process group) each takes a part of the cases.
    """
    quiet()
    snapshots: dict[str, Snapshot] = {}
    for optimizer, name in cases(settings)[rank.index :: rank.count]:
        mesh, setting = MESHES[name], OPTIMIZERS[optimizer]
        dist.init_process_group("fake", rank=0, world_size=mesh.ranks, store=HashStore())
        rank.emit(Started(optimizer, "float64", mesh.label, 1))
        if optimizer not in snapshots:
            snapshots[optimizer] = take_snapshot(setting, settings)
        rank.emit(_judge_mesh(setting, settings, mesh, snapshots[optimizer]))
        dist.destroy_process_group()


def cases(settings: Settings) -> list[tuple[str, str]]:
    """(optimizer, mesh) of every simulated row: the matrix optimizers on each mesh.

    Every other mesh has them in the opposite order, so that two processes get equal shares.
    """
    matrix = [name for name in settings.optimizers if OPTIMIZERS[name].algorithm != OPTIMIZERS[name].scalar]
    order = {0: matrix, 1: matrix[::-1]}
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


def _whole(value: Tensor) -> Tensor:
    """The whole plain tensor, which must be the same on every simulated rank.

    Raises:
        RuntimeError: the ranks disagree.
    """
    full: Any = value.full_tensor() if isinstance(value, DTensor) else value
    if isinstance(full, LocalTensor):
        return full.reconcile()
    assert isinstance(full, Tensor)
    return full


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


def _judge_mesh(setting: OptimizerSetting, settings: Settings, described: Mesh, snapshot: Snapshot) -> Row:
    began, cpu_began = time.perf_counter(), cpu_seconds()
    dtype = DTYPES["float64"]
    judge = Judge(setting, dtype, seed=settings.seed)
    with LocalTensorMode(described.ranks):
        mesh = init_device_mesh("cpu", described.sizes, mesh_dim_names=described.names)
        laid = {n: _distribute(w, mesh, placements_for(n, described)) for n, w in snapshot.weights.items()}
        model = _Named(laid)
        optimizer = make_optimizer(model, setting, dtype, replace(settings, compile=False))
        for group in optimizer.param_groups:
            if (
                "path" in group
            ):  # the exchange of rows asks each rank for itself, and a simulation is one process
                group["path"] = "assemble"
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            parameter.grad = _distribute(snapshot.grads[name], mesh, placements_for(name, described))
        _load(optimizer, parameters, snapshot)
        stepped = time.perf_counter()
        optimizer.step()
        seconds = time.perf_counter() - stepped
        weights = {name: _whole(parameter.detach()) for name, parameter in parameters.items()}
        states = {
            name: {key: _whole(value) for key, value in optimizer.state[parameter].items() if key != "step"}
            for name, parameter in parameters.items()
        }
    for name, weight in weights.items():
        before = snapshot.states[name]
        old = {key: value for key, value in before.items() if key != "step"}
        count = int(before.get("step", WARM_UP))
        step = Step(snapshot.weights[name], snapshot.grads[name], old, weight, states[name], count)
        judge.step(name, step)
    return Row(
        optimizer=setting.name,
        dtype="float64",
        mesh=described.label,
        kind=SIMULATED,
        series=tuple(judge.series()),
        losses=(),
        seconds=time.perf_counter() - began,
        first_step_seconds=seconds,
        step_seconds=seconds,
        layouts=layouts_of(parameters),
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
