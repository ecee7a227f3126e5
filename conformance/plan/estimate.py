"""A model's optimizer step on a mesh: each bucket counted on the real engine, then priced by the hardware."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from conformance.plan.counting import fake_mesh, launched
from conformance.plan.models import Model, Weight
from conformance.plan.operators import Operator, Stopwatch
from dion_dtensor.layout import inner_first
from dion_dtensor.planning import (
    Bucket,
    Cost,
    Duration,
    Hardware,
    Transfer,
    choose,
    duration,
    predict,
    total,
    usual_hardware,
)
from dion_dtensor.planning.buckets import collective
from dion_dtensor.planning.predict import ADAMW
from dion_dtensor.sorting import CPU_BUCKET_BYTES, runs_of

__all__ = ["MESH_AXES", "Candidate", "Estimate", "candidate", "estimates", "placements_of"]

MESH_AXES = {1: ("fsdp",), 2: ("fsdp", "tp"), 3: ("dp", "fsdp", "tp")}
"""Names of the axes of a mesh by their number."""


@dataclass(frozen=True)
class Candidate:
    """An optimizer, the share of each matrix that it works on, and whether replicas average its gradients first."""

    algorithm: str
    share: float = 1.0
    averaged: bool = True

    def __str__(self) -> str:
        title = {"adamw": "AdamW", "muon": "Muon", "normuon": "NorMuon"}.get(self.algorithm)
        share = f"{self.algorithm.title()} {Fraction(self.share).limit_denominator(1024)}"
        return title or share + ("" if self.averaged else ", P R averaged")

    @property
    def hyper(self) -> dict[str, Any]:
        """What differs from the rule's defaults."""
        if self.algorithm == "dion":
            return {"rank_fraction": self.share}
        return {"fraction": self.share} if self.algorithm in ("dion2", "dion3") else {}


@dataclass(frozen=True)
class Estimate:
    """One optimizer's step on one rank, that of the most work.

    Attributes:
        candidate: the optimizer.
        cost: counted; ``touched`` is in closed form.
        time: of it.
        host: seconds of it that are the host's work; 0 where that is not known.
        predicted: FLOPs and bytes in closed form, as a check on the count.
    """

    candidate: Candidate
    cost: Cost
    time: Duration
    host: float
    predicted: tuple[float, float]


def candidate(text: str) -> Candidate:
    """ "muon", "dion:1/16", "dion2:0.25", or "dion:1/16:unaveraged": replicas average P and R, not the gradient.

    Raises:
        ValueError: an unknown algorithm, a share outside (0, 1], or another rule than Dion unaveraged.
    """
    name, _, rest = text.partition(":")
    share, _, how = rest.partition(":")
    if name not in ("adamw", "muon", "normuon", "dion", "dion2", "dion3"):
        raise ValueError(
            f"optimizer {text!r} is unknown; choose adamw, muon, normuon, dion:R, dion2:F or dion3:F"
        )
    try:
        value = float(Fraction(share or "1"))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"optimizer {text!r}: {share!r} is no fraction") from error
    if not 0 < value <= 1:
        raise ValueError(f"optimizer {text!r}: {share} must be in (0, 1]")
    if how not in ("", "unaveraged") or (how and name != "dion"):
        raise ValueError(f"optimizer {text!r}: only dion:R may end in :unaveraged")
    return Candidate(name, value, averaged=not how)


def placements_of(
    weight: Weight, names: Sequence[str], sizes: Sequence[int], dims: Mapping[str, int] | None = None
) -> tuple[Placement, ...]:
    """FSDP2 shards rows, tensor parallelism columns or rows, both on one dim as FSDP2 nests them.

    Args:
        weight: whose.
        names: of the mesh axes.
        sizes: of them.
        dims: 0 or 1, by the name of the axis that shards that dim of every weight instead.
    """
    usual = {"fsdp": 0, "tp": 1 if weight.row_parallel else 0}
    sharded = {name: (dims or {}).get(name, usual.get(name)) for name in names}
    tp = next((size for name, size in zip(names, sizes, strict=True) if name == "tp"), 1)
    result: list[Placement] = []
    for name in names:
        dim = sharded[name]
        if dim is None:
            result.append(Replicate())
        elif name == "fsdp" and tp > 1 and sharded.get("tp") == dim:
            result.append(_StridedShard(dim, split_factor=tp))
        else:
            result.append(Shard(dim))
    return tuple(result)


@dataclass(frozen=True)
class _Setting:
    """What all weights of a plan share; see :func:`estimates`."""

    mesh: DeviceMesh
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    dims: Mapping[str, int]
    gradients: bool
    compute_dtype: torch.dtype
    kind: str  # of the device


def estimates(
    model: Model,
    sizes: Sequence[int],
    names: Sequence[str],
    candidates: Sequence[Candidate],
    hardware: Hardware,
    *,
    gradients: bool = False,
    dims: Mapping[str, int] | None = None,
    compute_dtype: torch.dtype = torch.bfloat16,
    stopwatch: Stopwatch | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> list[Estimate]:
    """Every candidate, on a process group of as many fake ranks as the mesh has.

    Args:
        model: its weights.
        sizes: of the mesh axes.
        names: of them; "dp" replicates, "fsdp" and "tp" shard.
        candidates: optimizers.
        hardware: what a rank and its links do.
        gradients: whether what averages them over "dp" is counted, in float32.
        dims: see :func:`placements_of`.
        compute_dtype: of the orthonormalization.
        stopwatch: for operators and the work of the host; None for FLOPs by the hardware's rate, and no such work.
        told: is called with what is going on.

    Raises:
        RuntimeError: a process group exists already.
        ValueError: the hardware lacks a dtype or an axis.
    """
    result, sizes, names = [], tuple(sizes), tuple(names)
    with fake_mesh(sizes, names) as mesh:
        kind = "cpu" if stopwatch else "cuda"
        setting = _Setting(mesh, sizes, names, dims or {}, gradients, compute_dtype, kind)
        scalars = _elementwise(model.scalars, sizes, names, gradients)
        for one in candidates:
            costs, closed, runs = [scalars], [], 0
            operators: list[tuple[Operator, float]] = []
            for weight in model.weights:
                told(f"{one}: {weight.name}")
                own = _runs(weight, sizes) if stopwatch else 1
                counted, predicted, launches = _weight(weight, one, own, setting)
                costs.append(counted)
                closed.append(predicted)
                operators += launches
                runs += own
            cost = total(costs)
            check = total([scalars, *closed])
            time, host = duration(cost, hardware), 0.0
            if stopwatch is not None and model.weights:
                matrices = sum(weight.count for weight in model.weights)
                # An elementwise rule steps all of them together.
                host = stopwatch.host(one.algorithm, matrices, 1 if one.algorithm == "adamw" else runs)
                spent = sum(times * stopwatch.operator(operator) for operator, times in operators)
                time = replace(time, compute=host + spent + cost.touched / hardware.memory_bandwidth)
            result.append(Estimate(one, cost, time, host, (sum(check.flops.values()), check.bytes())))
    return result


def _runs(weight: Weight, sizes: Sequence[int]) -> int:
    """How often a CPU steps some of the matrices: those of one device a few at a time, as its caches want it."""
    if math.prod(sizes) > 1:
        return 1
    return runs_of(weight.count, 4 * weight.shape[0] * weight.shape[1], CPU_BUCKET_BYTES)


def _elementwise(elements: int, sizes: Sequence[int], names: Sequence[str], gradients: bool) -> Cost:
    """AdamW in float32 reads four tensors and writes three; gradients are checked before."""
    held = _held(elements, sizes, names)
    return Cost(transfers=_averaging(held, sizes, names) if gradients else (), touched=ADAMW * 4 * held)


def _held(elements: int, sizes: Sequence[int], names: Sequence[str]) -> float:
    """How many of them a rank holds."""
    return elements / math.prod(size for size, name in zip(sizes, names, strict=True) if name != "dp")


def _averaging(held: float, sizes: Sequence[int], names: Sequence[str]) -> tuple[Transfer, ...]:
    """What averages the gradients of ``held`` elements a rank over the replicas."""
    return tuple(
        collective("all_reduce", axis, size, 4 * held)
        for axis, (size, name) in enumerate(zip(sizes, names, strict=True))
        if name == "dp"
    )


def _weight(
    weight: Weight, one: Candidate, runs: int, setting: _Setting
) -> tuple[Cost, Cost, list[tuple[Operator, float]]]:
    """Counted, in closed form, and the operators with how often they are launched; of all matrices of ``weight``."""
    sizes, names, gradients = setting.sizes, setting.names, setting.gradients
    elements = weight.count * weight.shape[0] * weight.shape[1]
    if one.algorithm == "adamw":
        cost = _elementwise(elements, sizes, names, gradients)
        return cost, cost, []
    placements = placements_of(weight, names, sizes, setting.dims)
    shards = tuple(getattr(placement, "dim", None) for placement in placements)
    number = -(-weight.count // runs)
    bucket = Bucket(
        weight.shape,
        number,
        sizes,
        shards,
        order=inner_first(sizes, placements),
        compute_dtype=setting.compute_dtype,
        device=setting.kind,
    )
    way, hyper = None, dict(one.hyper)
    if one.algorithm in ("dion", "dion2", "dion3"):
        among = ("low_rank", "assemble", "exchange") if one.averaged else ("low_rank",)
        way = choose(bucket, one.algorithm, usual_hardware(len(sizes)), fraction=one.share, among=among).way
        hyper["path"] = way
    pending = () if one.averaged else tuple(axis for axis, name in enumerate(names) if name == "dp")
    found = launched(
        setting.mesh,
        placements,
        weight.shape,
        number,
        one.algorithm,
        hyper,
        compute_dtype=setting.compute_dtype,
        kind=setting.kind,
        pending=pending,
    )
    times = weight.count / number
    guess = predict(bucket, one.algorithm, way, one.share)
    before: tuple[Transfer, ...] = ()
    if gradients and one.averaged:
        before = _averaging(_held(elements, sizes, names), sizes, names)
    return (
        _repeated(replace(found.cost, touched=guess.touched), times, before),
        _repeated(guess, times, before),
        [(operator, times) for operator in found.operators],
    )


def _repeated(cost: Cost, times: float, before: tuple[Transfer, ...]) -> Cost:
    """Of so many runs, which send nothing where there is more than one: these are of one rank."""
    flops = {dtype: times * amount for dtype, amount in cost.flops.items()}
    return Cost(flops, (*before, *cost.transfers), cost.memory, times * cost.touched)
