"""What a step launches, looked at on ranks and without them."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from conformance.plan.counting import launched
from tests.dtensor.layouts import Layout, build_mesh, placements

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("muon", {}),
    ("normuon", {}),
    ("dion", {"rank_fraction": 0.25, "path": "low_rank"}),
    ("dion", {"rank_fraction": 0.25, "path": "assemble"}),
    ("dion2", {"fraction": 0.25, "path": "assemble"}),
)

Counted = list[tuple[str, float, list[tuple[int, int]]]]


def launched_on(mesh: DeviceMesh, place: Layout, device: str) -> Counted:
    """For each case its FLOPs, and axis and bytes of every collective in order."""
    result = []
    for algorithm, hyper in CASES:
        for shape in ((32, 64), (64, 32)):
            # In float32: a CPU without bfloat16 units takes other products for bfloat16.
            options: dict[str, Any] = {"compute_dtype": torch.float32, "device": device}
            found = launched(mesh, tuple(placements(place)), shape, 8, algorithm, hyper, **options)
            result.append((algorithm, sum(found.cost.flops.values()), list(found.collectives)))
    return result


def launched_on_ranks(place: Layout) -> Counted | None:
    """On real processes and tensors with data; None on ranks outside the mesh."""
    mesh = build_mesh(place)
    return None if mesh.get_coordinate() is None else launched_on(mesh, place, "cpu")
