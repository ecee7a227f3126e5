"""What a step launches, looked at on ranks and without them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from conformance.bench.traffic import ITEMSIZE, SENT
from conformance.plan.counting import Recorder, launched
from dion_dtensor import Dion, Dion2, Dion3, Muon, NorMuon
from dion_dtensor.buckets import Bucket
from tests.dtensor.layouts import Layout, build_mesh, lay_out, placements

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("muon", {}),
    ("normuon", {}),
    ("dion", {"rank_fraction": 0.25, "path": "low_rank"}),
    ("dion", {"rank_fraction": 0.25, "path": "assemble"}),
    ("dion2", {"fraction": 0.25, "path": "assemble"}),
    ("dion2", {"fraction": 0.25, "path": "exchange"}),
    ("dion3", {"fraction": 0.25, "path": "exchange"}),
)
EVENLY = 5
"""The first of the cases whose traffic depends on which rows are chosen: it is counted as spread evenly."""
NUMBER = 8
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")

Counted = list[tuple[str, float, list[int], float]]
Seen = list[tuple[float, list[int], float]]


def launched_on(mesh: DeviceMesh, place: Layout, device: str) -> Counted:
    """For each case its FLOPs, the bytes that every collective is given, and those that this rank sends in all."""
    result = []
    for algorithm, hyper in CASES:
        for shape in ((32, 64), (64, 32)):
            # In float32: a CPU without bfloat16 units takes other products for bfloat16.
            options: dict[str, Any] = {"compute_dtype": torch.float32, "device": device}
            found = launched(mesh, tuple(placements(place)), shape, NUMBER, algorithm, hyper, **options)
            given = sorted(size for _, size in found.collectives)
            result.append((algorithm, sum(found.cost.flops.values()), given, found.cost.bytes()))
    return result


def seen_on_ranks(place: Layout) -> Seen | None:
    """What torch's profiler sees of the same on real processes: FLOPs of products, bytes that gloo is given and sends.

    Sorted, since gloo runs what is in flight together on threads of its own.
    """
    mesh = build_mesh(place)
    if mesh.get_coordinate() is None:
        return None
    seen = []
    for algorithm, hyper in CASES:
        for shape in ((32, 64), (64, 32)):
            options: dict[str, Any] = {"compute_dtype": torch.float32, "device": "cpu"}
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiled:
                launched(mesh, tuple(placements(place)), shape, NUMBER, algorithm, hyper, **options)
            assert profiled.profiler is not None
            assert profiled.profiler.kineto_results is not None
            events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
            products, end = 0.0, 0
            for event in events:
                # The outermost alone: an operator that the planner looks at shows again inside itself.
                if event.name() in PRODUCTS and event.start_ns() >= end:
                    products += event.flops()
                    end = event.end_ns()
            gloo = [event for event in events if event.name() in SENT]
            sizes = [math.prod(event.shapes()[0]) * ITEMSIZE[event.dtypes()[0]] for event in gloo]
            shares = [SENT[event.name()](place.mesh[-1]) for event in gloo]
            sent = sum(size * share for size, share in zip(sizes, shares, strict=True))
            seen.append((products, sorted(sizes), sent))
    return seen


def sent_by_a_split(place: Layout, shape: tuple[int, int], split: str | None) -> dict[str, float] | None:
    """By rule the bytes that this rank sends in a step on eight weights, chosen rows as if they lay evenly."""
    mesh = build_mesh(place)
    if mesh.get_coordinate() is None:
        return None
    result = {}
    for rule, options in (
        (Muon, {}),
        (NorMuon, {}),
        (Dion2, {"fraction": 0.25}),
        (Dion3, {"fraction": 0.25}),
    ):
        options = {"compute_dtype": torch.bfloat16, **options}
        result[rule.__name__], _ = _sent(rule, mesh, place, shape, split, options)
    return result


def sent_by_dion(place: Layout, shape: tuple[int, int], split: str, path: str) -> tuple[float, float] | None:
    """The bytes that this rank sends in a step of Dion on eight weights, and those foreseen for their blocks."""
    mesh = build_mesh(place)
    if mesh.get_coordinate() is None:
        return None
    sent, bucket = _sent(Dion, mesh, place, shape, split, {"rank_fraction": 0.125, "path": path})
    assert bucket.choice is not None
    return sent, bucket.choice.cost.bytes()


def _sent(
    rule: type[Any],
    mesh: DeviceMesh,
    place: Layout,
    shape: tuple[int, int],
    split: str | None,
    options: dict[str, Any],
) -> tuple[float, Bucket]:
    """The bytes of a step on eight weights, and their bucket."""
    weights = [torch.nn.Parameter(lay_out(torch.ones(shape), place, mesh)) for _ in range(8)]
    group = {"params": [(f"fused.{i}", weight) for i, weight in enumerate(weights)], "split": split}
    optimizer = rule([group], compile=False, **options)
    for weight in weights:
        assert isinstance(weight, DTensor)
        weight.grad = lay_out(torch.ones(shape), place, mesh)
    with Recorder(mesh, ()) as recorder:
        optimizer.step()
    (bucket,) = optimizer.buckets
    return sum(one.bytes for one in recorder.transfers), bucket


def memory_on_ranks(place: Layout) -> list[tuple[str, float, float]] | None:
    """For each rule that keeps a momentum alone the peak in bytes, as counted and as the allocator says."""
    mesh = build_mesh(place)
    if mesh.get_coordinate() is None:
        return None
    number, shape = 4, (256, 512)
    options: dict[str, Any] = {"compute_dtype": torch.float32, "device": "cpu"}
    given = 2 * 4 * number * shape[0] * shape[1] / mesh.size()  # gradients and momentum
    result = []
    for algorithm, hyper in (("muon", {}), ("normuon", {}), ("dion2", {"fraction": 0.25})):
        for _ in range(3):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                found = launched(mesh, tuple(placements(place)), shape, number, algorithm, hyper, **options)
            joined = given / 2  # counted as the engine makes it before the step
            result.append((algorithm, found.cost.memory - joined, _peak(profiled) - given))
    return result


def _peak(profiled: profile) -> int:
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
