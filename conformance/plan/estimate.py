"""A model's optimizer step on a mesh: each bucket counted on the real engine, then priced by the hardware."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from dion_dtensor.layout import strided_axes
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
        predicted: FLOPs and bytes in closed form, as a check on the count.
    """

    candidate: Candidate
    cost: Cost
    time: Duration
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


def placements_of(weight: Weight, names: Sequence[str], sizes: Sequence[int]) -> tuple[Placement, ...]:
    """FSDP2 shards rows, tensor parallelism columns or rows, both on the rows as FSDP2 nests them."""
    result: list[Placement] = []
    tp = next((size for name, size in zip(names, sizes, strict=True) if name == "tp"), 1)
    for name in names:
        if name == "fsdp":
            nested = tp > 1 and not weight.row_parallel
            result.append(_StridedShard(0, split_factor=tp) if nested else Shard(0))
        elif name == "tp":
            result.append(Shard(1) if weight.row_parallel else Shard(0))
        else:
            result.append(Replicate())
    return tuple(result)


def estimates(
    model: Model,
    sizes: Sequence[int],
    names: Sequence[str],
    candidates: Sequence[Candidate],
    hardware: Hardware,
    *,
    gradients: bool = False,
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
        compute_dtype: of the orthonormalization.
        stopwatch: for operators and the work of the host; None for FLOPs by the hardware's rate, and no such work.
        told: is called with what is going on.

    Raises:
        RuntimeError: a process group exists already.
        ValueError: the hardware lacks a dtype or an axis.
    """
    result = []
    with fake_mesh(tuple(sizes), tuple(names)) as mesh:
        scalars = _elementwise(model.scalars, sizes, names, gradients)
        for one in candidates:
            costs, closed = [scalars], []
            operators: list[Operator] = []
            for weight in model.weights:
                told(f"{one}: {weight.name}")
                counted, predicted, launches = _weight(
                    weight, mesh, names, sizes, one, gradients, compute_dtype
                )
                costs.append(counted)
                closed.append(predicted)
                operators += launches
            cost = total(costs)
            check = total([scalars, *closed])
            time = duration(cost, hardware)
            if stopwatch is not None:
                spent = [
                    stopwatch.host(one.algorithm, weight.count, _buckets(weight, sizes))
                    for weight in model.weights
                ]
                spent += map(stopwatch.operator, operators)
                time = replace(time, compute=sum(spent) + cost.touched / hardware.memory_bandwidth)
            result.append(Estimate(one, cost, time, (sum(check.flops.values()), check.bytes())))
    return result


def _buckets(weight: Weight, sizes: Sequence[int]) -> int:
    """Tensors of one device are stepped a few at a time, as a CPU's caches want it."""
    most = CPU_BUCKET_BYTES if math.prod(sizes) == 1 else None
    return runs_of(weight.count, 4 * weight.shape[0] * weight.shape[1], most)


def _elementwise(elements: int, sizes: Sequence[int], names: Sequence[str], gradients: bool) -> Cost:
    """AdamW in float32 reads four tensors and writes three; gradients are checked before."""
    held = _held(elements, sizes, names)
    return Cost(transfers=_averaging(held, sizes, names) if gradients else (), touched=8 * 4 * held)


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
    weight: Weight,
    mesh: DeviceMesh,
    names: Sequence[str],
    sizes: Sequence[int],
    one: Candidate,
    gradients: bool,
    compute_dtype: torch.dtype,
) -> tuple[Cost, Cost, tuple[Operator, ...]]:
    """Counted, in closed form, and the operators; of all matrices of ``weight``."""
    elements = weight.count * weight.shape[0] * weight.shape[1]
    if one.algorithm == "adamw":
        cost = _elementwise(elements, sizes, names, gradients)
        return cost, cost, ()
    placements = placements_of(weight, names, sizes)
    shards = tuple(getattr(placement, "dim", None) for placement in placements)
    bucket = Bucket(
        weight.shape,
        weight.count,
        tuple(sizes),
        shards,
        strided=strided_axes(placements),
        compute_dtype=compute_dtype,
    )
    way, hyper = None, dict(one.hyper)
    if one.algorithm in ("dion", "dion2", "dion3"):
        among = ("low_rank", "assemble", "exchange") if one.averaged else ("low_rank",)
        way = choose(bucket, one.algorithm, usual_hardware(len(sizes)), fraction=one.share, among=among).way
        hyper["path"] = way
    pending = () if one.averaged else tuple(axis for axis, name in enumerate(names) if name == "dp")
    found = launched(
        mesh,
        placements,
        weight.shape,
        weight.count,
        one.algorithm,
        hyper,
        compute_dtype=compute_dtype,
        pending=pending,
    )
    cost = found.cost
    guess = predict(bucket, one.algorithm, way, one.share)
    before: tuple[Transfer, ...] = ()
    if gradients and one.averaged:
        before = _averaging(_held(elements, sizes, names), sizes, names)
    transfers = (*before, *cost.transfers)
    return (
        Cost(cost.flops, transfers, cost.memory, guess.touched),
        replace(guess, transfers=(*before, *guess.transfers)),
        found.operators,
    )
