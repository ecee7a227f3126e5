"""One rank of the main job: train, and judge every step."""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from conformance.job.events import Started, Stepped
from conformance.job.gather import Gatherer
from conformance.job.judge import Judge, Step, merge, shares
from conformance.job.model import GPT, is_matrix, loss_of, make_model
from conformance.job.results import TRAINED, Row
from conformance.job.settings import DTYPES, OPTIMIZERS, DtypeSetting, OptimizerSetting, Settings
from conformance.job.sharding import layout, shard
from conformance.job.text import batch, read_text
from conformance.launch import Rank
from conformance.meshes import Mesh, mesh_for
from dion_dtensor import Dion, Dion2, Dion3, Muon, NorMuon, param_groups

OPTIMIZER_OF = {"muon": Muon, "normuon": NorMuon, "dion": Dion, "dion2": Dion2, "dion3": Dion3}


def train(rank: Rank, settings: Settings) -> None:
    """Runs every (dtype, optimizer) of `settings` and emits Started, Stepped and Row events on rank 0.

    Raises:
        RuntimeError: the optimizer refused a step, or put a parameter on another rule than it should.
    """
    quiet()
    forget_mesh_hash()
    described = mesh_for(rank.count, settings.shape.heads)
    mesh = init_device_mesh(rank.device.type, described.sizes, mesh_dim_names=described.names)
    text = read_text()
    for dtype in settings.dtypes:
        for optimizer in settings.optimizers:
            run = _Run(rank, settings, OPTIMIZERS[optimizer], DTYPES[dtype], mesh, described, text)
            run.train()


def quiet() -> None:
    """Silences torch's notes on gloo's missing all-to-all, two-step gathers and a CUDA that is not there."""
    warnings.filterwarnings("ignore", message=".*all_to_all.*")
    warnings.filterwarnings("ignore", message=".*alltoall.*")
    for name in (
        "torch.distributed.tensor",
        "torch.distributed.tensor._redistribute",
        "torch.utils.cpp_extension",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def forget_mesh_hash() -> None:
    """Lets compiled code be found again by later runs.

    The keys of inductor's caches hold the pickled mesh, and a mesh pickles the hash it has remembered (torch 2.14:
    `DeviceMesh._hash`), which Python salts anew in every process. The mesh computes it again when it is asked.
    """
    original = DeviceMesh.__getstate__

    def without_hash(mesh: DeviceMesh) -> dict[str, Any]:
        state: dict[str, Any] = original(mesh)
        return {**state, "_hash": None}

    DeviceMesh.__getstate__ = without_hash  # type: ignore[assignment, method-assign]


def make_optimizer(
    model: torch.nn.Module, setting: OptimizerSetting, dtype: DtypeSetting, settings: Settings
) -> torch.optim.Optimizer:
    """The optimizer under test, made as a user makes it."""
    outside = [
        f"^{name}\\." for name, _ in model.named_children() if name in ("embedding", "position", "head")
    ]
    groups = param_groups(
        model,
        algorithm=setting.algorithm,
        scalar=setting.scalar,
        lr=setting.lr,
        scalar_lr=setting.scalar_lr,
        exclude=outside,
    )
    for group in groups:
        if group["algorithm"] == setting.algorithm:
            group.update(settings.mutation)
    options: dict[str, Any] = {"compile": settings.compile}
    if not dtype.exact:
        options["compute_dtype"] = dtype.compute
    if setting.algorithm == "dion":
        options["seed"] = settings.seed
    kind: Any = OPTIMIZER_OF.get(setting.algorithm, Muon)
    made: torch.optim.Optimizer = kind(groups, **setting.hyper, **options)
    return made


class _Run:
    """One (optimizer, dtype) on this rank."""

    def __init__(
        self,
        rank: Rank,
        settings: Settings,
        optimizer: OptimizerSetting,
        dtype: DtypeSetting,
        mesh: DeviceMesh,
        described: Mesh,
        text: Tensor,
    ) -> None:
        self.start, self.cpu_start = time.perf_counter(), cpu_seconds()
        self.rank, self.settings, self.mesh, self.text = rank, settings, mesh, text
        self.setting, self.dtype, self.described = optimizer, dtype, described
        self._emit(Started(optimizer.name, dtype.name, described.label, settings.steps))
        model = make_model(settings.shape, dtype.storage, seed=settings.seed).to(rank.device)
        self.model: GPT = shard(model, mesh, dtype.compute)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.model, optimizer, dtype, settings)
        self.judge = Judge(optimizer, dtype, seed=settings.seed)
        self._check_rules()
        sizes = {name: p.numel() * (8 if is_matrix(name) else 1) for name, p in self.parameters.items()}
        self.share = shares(sizes, rank.count)[rank.index]
        self.gather_weights = Gatherer(self.parameters)
        self.gather_states = Gatherer(self._states())
        self.losses: list[float] = []
        self.times: list[float] = []

    def _emit(self, event: object) -> None:
        if self.rank.index == 0:
            self.rank.emit(event)

    def _check_rules(self) -> None:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = names.pop(id(parameter))
                if group["algorithm"] != self.judge.algorithm(name):
                    raise RuntimeError(
                        f"{name} is on {group['algorithm']}, it belongs on {self.judge.algorithm(name)}"
                    )
        if names:
            raise RuntimeError(f"no rule takes {', '.join(names.values())}")

    def _states(self) -> dict[str, Tensor]:
        """The state tensors in one list, by parameter and key; step counts are left out."""
        return {
            f"{name}|{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
            if key != "step"
        }

    def _whole_states(self) -> dict[str, dict[str, Tensor]]:
        whole: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for full, value in self.gather_states(list(self._states().values())).items():
            name, key = full.split("|")
            whole[name][key] = value
        return whole

    def train(self) -> None:
        """All steps of this run; emits the Row on rank 0."""
        weights = self.gather_weights(list(self.parameters.values()))
        states = self._whole_states()
        for name in self.share:
            self.judge.initial_state(name, weights[name], states[name])
        for step in range(self.settings.steps):
            loss = self._backward(step)
            grads = self.gather_weights([_grad(name, p) for name, p in self.parameters.items()])
            began = time.perf_counter()
            self.optimizer.step()
            self.times.append(time.perf_counter() - began)
            new_weights = self.gather_weights(list(self.parameters.values()))
            new_states = self._whole_states()
            for name in self.share:
                before = (weights[name], grads[name], states[name])
                self.judge.step(name, Step(*before, new_weights[name], new_states[name], count=step))
            weights, states = new_weights, new_states
            self.losses.append(loss)
            self._emit(Stepped(step, loss))
        self._finish()

    def _backward(self, step: int) -> float:
        """Gradients of this step's batch; returns the global loss."""
        settings = self.settings
        inputs, targets = batch(
            self.text,
            step,
            sequences=settings.sequences,
            length=settings.shape.length,
            seed=settings.seed,
        )
        shards, place = self.mesh["fsdp"].size(), self.mesh.get_local_rank("fsdp")
        inputs, targets = inputs.chunk(shards)[place], targets.chunk(shards)[place]
        self.model.zero_grad()
        loss = loss_of(self.model(inputs.to(self.rank.device)), targets.to(self.rank.device))
        loss.backward()  # type: ignore[no-untyped-call]
        mean = loss.detach().double()
        dist.all_reduce(mean)
        if settings.nan_at is not None and settings.nan_at[0] == step + 1:
            self._put_nan(settings.nan_at[1])
        return float(mean) / self.rank.count

    def _put_nan(self, name: str) -> None:
        """Spoils one element of one rank's part of a gradient."""
        if name not in self.parameters:
            raise ValueError(f"no parameter {name!r}; there are {', '.join(self.parameters)}")
        grad = _grad(name, self.parameters[name])
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        if self.rank.index == 0 and local.numel():
            local.view(-1)[0] = math.nan

    def _finish(self) -> None:
        parts: list[Any] = [None] * self.rank.count
        dist.all_gather_object(
            parts, (self.judge.series(), self.judge.undecided, cpu_seconds() - self.cpu_start)
        )
        later = self.times[1:] or self.times
        row = Row(
            optimizer=self.setting.name,
            dtype=self.dtype.name,
            mesh=self.described.label,
            kind=TRAINED,
            series=tuple(merge(part[0] for part in parts)),
            losses=tuple(self.losses),
            seconds=time.perf_counter() - self.start,
            first_step_seconds=self.times[0],
            step_seconds=statistics.median(later),
            layouts=layouts_of(self.parameters),
            undecided=sum(part[1] for part in parts),
            cpu_seconds=sum(part[2] for part in parts),
        )
        self._emit(row)


def cpu_seconds() -> float:
    """Processor time of this process and of those that it started and waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def layouts_of(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """How many parameters lie in which layout."""
    return dict(Counter(layout(parameter) for parameter in parameters.values()))


def _grad(name: str, parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(f"the backward pass left no gradient of {name}")
    return parameter.grad
