"""What every rank runs for L3 and L4."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map

from conformance.adapters import Spec, find
from conformance.launch import Rank
from conformance.port.grading import Spectrum
from conformance.port.mesh_cases import RESUME_AFTER, STEPS, Layout, MeshCase
from conformance.port.mesh_grading import Values, beyond, grade, name_of, problems_of, worst_spectrum
from conformance.port.watchdog import watched
from conformance.process_groups import shared_group, shared_mesh, whole


@dataclass(frozen=True)
class Work:
    """What the ranks are to do.

    Attributes:
        adapter: path, or the object itself.
        cases: (case, compute dtype).
        timeout: seconds a case.
        folder: where checkpoints go; all ranks see it.
    """

    adapter: Any
    cases: tuple[tuple[MeshCase, str], ...]
    timeout: float
    folder: str


@dataclass(frozen=True)
class Started:
    """A rank begins a case."""

    index: int


@dataclass(frozen=True)
class Hung:
    """A rank is about to end itself.

    Attributes:
        message: where it is.
        waits: in a collective, so for another rank.
        stack: where it is, frame by frame.
    """

    message: str
    waits: bool
    stack: str = ""


@dataclass(frozen=True)
class Finished:
    """A case is done; from rank 0.

    Attributes:
        index: in Work.cases.
        errors: by quantity, the largest error over its parameters and what that parameter is allowed.
        problem: what is wrong besides, such as ranks that disagree.
        digest: SHA-256 of all results, to compare backends.
        values: by quantity of each parameter, the whole tensor.
        spectrum: of the update of the parameter that uses most of its tolerance.
        off: by quantity, the parameters beyond their tolerance, in words.
    """

    index: int
    errors: Mapping[str, tuple[float, float | None]]
    problem: str
    digest: str
    seconds: float
    values: Mapping[str, Any]
    spectrum: Spectrum = ()
    off: Mapping[str, str] = field(default_factory=dict)


def program(rank: Rank, work: Work) -> None:
    """Runs the cases in order; emits Started, and Finished on rank 0. What an adapter raises ends the rank."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # DTensor tells how a redistribution could be faster

    def hung(line: str, waits: bool, stack: str) -> None:
        rank.emit(Hung(line, waits, stack))
        rank.linger()

    shared = [work.folder]  # joined ranks have made one each
    with watched(work.timeout, rank.index, hung):
        dist.broadcast_object_list(shared, src=0)
    adapter = find(work.adapter) if isinstance(work.adapter, str) else work.adapter
    for index, (case, dtype) in enumerate(work.cases):
        rank.emit(Started(index))
        dist.barrier()  # so that all watches end together, however long rank 0 has graded the case before
        began = time.perf_counter()
        with watched(work.timeout, rank.index, hung):
            values = run_case(adapter, case, dtype, rank, shared[0])
            digests: list[Any] = [None] * rank.count
            dist.all_gather_object(digests, None if values is None else _digest(values))
        if rank.index == 0:
            assert values is not None
            present = {one for one in digests if one is not None}
            problem = "" if len(present) == 1 else "the ranks hold different values: " + _groups(digests)
            errors = grade(case, dtype, values)
            numbers = {name: value.double().cpu().numpy() for name, value in values.items()}
            seconds = time.perf_counter() - began
            along = worst_spectrum(case, dtype, values)
            off = beyond(case, dtype, values)
            rank.emit(Finished(index, errors, problem, _digest(values), seconds, numbers, along, off))


def run_case(adapter: Any, case: MeshCase, dtype: str, rank: Rank, folder: str) -> Values | None:
    """Whole weights' updates and states after the last step; None on ranks outside of the mesh."""
    problems = problems_of(case)
    meshes = [build_mesh(one, rank.device.type) for one in (case.layout, case.resume) if one is not None]
    groups = [_group_of(mesh, one) for mesh, one in zip(meshes, (case.layout, case.resume), strict=False)]
    spec = _spec(case, dtype)
    storage = torch.float64 if dtype == "float64" else torch.float32

    def laid(tensor: Tensor, layout: Layout, mesh: DeviceMesh) -> Tensor:
        return lay_out(tensor.to(storage).to(rank.device), layout, mesh)

    def start(weights: Mapping[str, Tensor], layout: Layout, mesh: DeviceMesh) -> tuple[nn.Module, Any]:
        model = _Model({name: nn.Parameter(laid(value, layout, mesh)) for name, value in weights.items()})
        return model, adapter.build(list(model.named()), spec)

    def steps(model: Any, optimizer: Any, which: range, layout: Layout, mesh: DeviceMesh) -> None:
        for step in which:
            for name, parameter in model.named():
                parameter.grad = unaveraged(laid(problems[name].drawn["grads"][step], layout, mesh), layout)
            optimizer.step()

    first = {name: problem.drawn["weight"] for name, problem in problems.items()}
    model: Any = None
    inside = meshes[0].get_coordinate() is not None
    if inside:
        model, optimizer = start(first, case.layout, meshes[0])
    if case.resume is None:
        if not inside:
            return None
        steps(model, optimizer, range(STEPS), case.layout, meshes[0])
        return _collect(adapter, model, optimizer, first)
    path, weights = str(Path(folder) / hashlib.sha256(f"{case.id}{dtype}".encode()).hexdigest()[:16]), None
    if inside:
        steps(model, optimizer, range(RESUME_AFTER), case.layout, meshes[0])
        weights = {name: whole(parameter) for name, parameter in model.named()}
        saved = get_optimizer_state_dict(model, optimizer)
        state_dict_saver.save({"optimizer": saved}, checkpoint_id=path, process_group=groups[0])
    kept: list[Any] = [
        {name: w.cpu() for name, w in weights.items()} if weights and rank.index == 0 else None
    ]
    dist.broadcast_object_list(kept, src=0)
    dist.barrier()
    if meshes[1].get_coordinate() is None:
        return None
    model, optimizer = start(kept[0], case.resume, meshes[1])
    wanted = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    # Copies: loaded in place, the state would come back whatever the port's load_state_dict does with it.
    wanted = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, wanted)
    state_dict_loader.load(wanted, checkpoint_id=path, process_group=groups[1])
    set_optimizer_state_dict(model, optimizer, wanted["optimizer"])
    steps(model, optimizer, range(RESUME_AFTER, STEPS), case.resume, meshes[1])
    return _collect(adapter, model, optimizer, first)


class _Model(nn.Module):
    """Parameters with dotted names."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters())


def _collect(adapter: Any, model: Any, optimizer: Any, first: Mapping[str, Tensor]) -> Values:
    values: Values = {}
    optimizer.state_dict()  # a state may differ from rank to rank until it is asked for
    for name, parameter in model.named():
        weight = whole(parameter)
        values[f"{name}/update"] = weight.double() - first[name].to(weight.dtype).to(weight.device).double()
        for key, own in getattr(adapter, "state_keys", {}).items():
            state = optimizer.state[parameter].get(own)
            if key != "step" and isinstance(state, DTensor):
                values[f"{name}/{key}"] = whole(state)
    return values


def _digest(values: Values) -> str:
    total = hashlib.sha256()
    for name in sorted(values):
        total.update(name.encode() + values[name].double().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _groups(digests: Sequence[str | None]) -> str:
    """Which ranks agree with each other."""
    classes: dict[str, list[int]] = {}
    for rank, digest in enumerate(digests):
        if digest is not None:
            classes.setdefault(digest, []).append(rank)
    return " against ".join("ranks " + ",".join(map(str, ranks)) for ranks in classes.values())


def build_mesh(layout: Layout, device: str) -> DeviceMesh:
    """The mesh of a layout on the first ranks, made once a process group."""
    return shared_mesh(layout.mesh, layout.axes, device)


def _group_of(mesh: DeviceMesh, layout: Layout | None) -> Any:
    """The process group of the mesh's ranks."""
    assert layout is not None
    return shared_group(layout.ranks)


def placements(layout: Layout) -> list[Placement]:
    """One an axis."""
    made: list[Placement] = []
    for axis, code in enumerate(layout.codes):
        if code in "RP":
            made.append(Replicate())
        elif code[0] == "S":
            made.append(Shard(int(code[1])))
        else:
            made.append(_StridedShard(int(code[1]), split_factor=layout.mesh[axis + 1]))
    return made


def lay_out(tensor: Tensor, layout: Layout, mesh: DeviceMesh) -> DTensor:
    """A DTensor of the layout with the value of `tensor`, sharing no memory with it."""
    laid = DTensor.from_local(tensor.clone(), mesh, run_check=False).redistribute(
        placements=placements(layout)
    )
    stride = torch.empty(tensor.shape, device="meta").stride()
    local = laid.to_local().clone().contiguous()
    return DTensor.from_local(
        local, mesh, laid.placements, run_check=False, shape=tensor.shape, stride=stride
    )


def unaveraged(grad: Tensor, layout: Layout) -> Tensor:
    """`grad`, or on the axes of code P an average still to be taken: the ranks there are off by amounts that cancel."""
    assert isinstance(grad, DTensor)
    mesh, local, laid = grad.device_mesh, grad.to_local(), list(grad.placements)
    for axis, code in enumerate(layout.codes):
        if code == "P":
            rank, laid[axis] = mesh.get_local_rank(axis), Partial("avg")
            ranks = mesh.size(axis)
            local = local * (1 + 3 * (rank - (ranks - 1) / 2))  # the factors' mean is one
    return DTensor.from_local(local, mesh, laid, run_check=False, shape=grad.shape, stride=grad.stride())


def _spec(case: MeshCase, dtype: str) -> Spec:
    storage = "float64" if dtype == "float64" else "float32"
    return Spec(name_of(0), (), storage, dtype, case.algorithm, case.dialect, None, case.hyper, {}, {})


def checkpoint_folder() -> str:
    """A fresh folder for checkpoints, for the process that starts the ranks to remove."""
    return tempfile.mkdtemp(prefix="conformance-checkpoint-")
