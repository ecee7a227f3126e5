"""Layouts as data, and how to lay a tensor out on one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from conformance.process_groups import shared_mesh

# S0, S1: Shard; R: Replicate; T0, T1: _StridedShard, as FSDP2 makes it over a tensor-parallel axis that comes later.
CODES = "R S0 S1 T0 T1"


@dataclass(frozen=True)
class Layout:
    """A mesh and one placement code an axis."""

    mesh: tuple[int, ...]
    codes: tuple[str, ...]

    @property
    def world(self) -> int:
        world = 1
        for size in self.mesh:
            world *= size
        return world

    def __str__(self) -> str:
        return "x".join(map(str, self.mesh)) + "-" + "".join(self.codes)


def layout(text: str) -> Layout:
    """``"2x2 S0 S1"`` to a Layout."""
    mesh, *codes = text.split()
    return Layout(tuple(int(size) for size in mesh.split("x")), tuple(codes))


LAYOUTS = [
    layout(text)
    for text in (
        "1 R",
        "1 S0",
        "2 S0",
        "2 S1",
        "3 S0",
        "4 R",
        "4 S0",
        "4 S1",
        "2x2 S0 S1",
        "2x2 S1 S0",
        "2x2 S0 S0",
        "2x2 S1 S1",
        "2x2 R S0",
        "2x2 R S1",
        "2x2 T0 S0",
        "2x2 T1 S1",
        "2x3 S0 S1",
        "8 S0",
        "2x4 T0 S0",
        "4x2 T0 S0",
        "2x2x2 R S0 S1",
        "2x2x2 R T0 S0",
        "2x2x2 S0 S1 S0",
        "2x2x2 R R S1",
    )
]


def build_mesh(layout: Layout, flattened: bool = False) -> DeviceMesh:
    """The mesh of ``layout``, or another one that has been flattened; all ranks must come here."""
    names = ("expert", "replicate", "shard", "tensor")[-len(layout.mesh) :]
    if not flattened:
        return shared_mesh(layout.mesh, names)
    mesh = shared_mesh(layout.mesh, tuple(f"flat_{name}" for name in names))
    mesh._flatten()
    return mesh


def placements(layout: Layout) -> list[Placement]:
    made: list[Placement] = []
    for axis, code in enumerate(layout.codes):
        if code == "R":
            made.append(Replicate())
        elif code[0] == "S":
            made.append(Shard(int(code[1])))
        else:
            made.append(_StridedShard(int(code[1]), split_factor=layout.mesh[axis + 1]))
    return made


def lay_out(tensor: Tensor, layout: Layout, mesh: DeviceMesh) -> DTensor:
    """A DTensor of ``layout`` with the value of ``tensor``, sharing no memory with it."""
    everywhere = DTensor.from_local(tensor.clone(), mesh, run_check=False)
    laid = everywhere.redistribute(placements=placements(layout))
    return DTensor.from_local(
        laid.to_local().clone().contiguous(),
        mesh,
        laid.placements,
        run_check=False,
        shape=tensor.shape,
        stride=torch.empty(tensor.shape, device="meta").stride(),
    )
