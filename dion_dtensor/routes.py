"""Which rank holds each row of a sharded stack, and which ranks work on each of its matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from dion_dtensor.fake import with_real_tensors
from dion_dtensor.layout import owners
from dion_dtensor.placements import axes_sharding, constant

__all__ = ["EVERYWHERE", "HOST", "ROUTES", "Route", "route"]

EVERYWHERE = -1
"""In place of a coordinate: every rank of the axis has the row."""
HOST = torch.device("cpu")
"""Where indices are worked out, whatever torch's default device is."""


@dataclass(frozen=True, eq=False)
class Route:
    """Between storage, where each axis of the route shards the rows or holds copies, and the work.

    Attributes:
        mesh, axes: whose groups are asked for when rows travel, so that nothing keeps them from being destroyed.
        sizes: ranks of each axis.
        here: this rank's coordinates.
        sharded: for each axis, whether it shards the rows; otherwise each of its ranks holds all.
        owner: ``[axes, rows]``, int16, the coordinates of the rank that holds each row.
        place: ``[rows]``, the row's index there.
        split: for each axis, whether its ranks share the matrices; otherwise each of them works on all.
    """

    mesh: DeviceMesh
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    here: tuple[int, ...]
    sharded: tuple[bool, ...]
    owner: Tensor
    place: Tensor
    split: tuple[bool, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The axes as rows travel to the work: first each copy drops what others work on, then the rest is sent."""
        return tuple(sorted(range(len(self.sizes)), key=lambda axis: self.sharded[axis]))

    def workers(self, matrices: int) -> Tensor:
        """``[axes, matrices]``, the coordinates of the ranks that work on each of ``matrices`` (a padded number)."""
        where = torch.full((len(self.sizes), matrices), EVERYWHERE, dtype=torch.int16, device=HOST)
        block = torch.arange(matrices, device=HOST)
        length = matrices
        for axis, size in enumerate(self.sizes):
            if self.split[axis]:
                length //= size
                where[axis] = block // length
                block = block % length
        return where

    def here_of(self, at: Tensor) -> Tensor:
        """Which of the rows (or matrices) with coordinates ``at`` this rank has, their indices."""
        here = torch.ones(at.shape[1], dtype=torch.bool, device=HOST)
        for coordinates, own in zip(at, self.here, strict=True):
            here &= (coordinates == own) | (coordinates == EVERYWHERE)
        return here.nonzero().squeeze(1)

    def own(self, matrices: int) -> range:
        """The matrices that this rank works on."""
        start, length = 0, matrices
        for size, here, split in zip(self.sizes, self.here, self.split, strict=True):
            if split:
                length //= size
                start += here * length
        return range(start, start + length)


ROUTES: list[Route] = []
"""By number."""
_known: dict[object, int] = {}


@constant
@with_real_tensors()
def route(mesh: DeviceMesh, placements: tuple[Placement, ...], rows: int, split: tuple[int, ...]) -> int:
    """The number of the route for stacks ``[N, rows, n]`` with ``placements``; an operator takes no other handle.

    Args:
        mesh: of the stack.
        placements: some axes shard the rows (dim 1).
        rows: of each matrix.
        split: the axes whose ranks share the matrices: some of those, and some that hold copies.
    """
    sharding = axes_sharding(placements, 1)
    axes = tuple(sorted({*sharding, *split}))
    # A mesh is equal to one made after its process groups were destroyed, whose names may be others.
    key = (mesh, placements, rows, split, tuple(mesh.get_group(axis).group_name for axis in axes))
    if key not in _known:
        sharded = tuple(axis in sharding for axis in axes)
        coordinates = mesh.get_coordinate()
        assert coordinates is not None
        owner = torch.full((len(axes), rows), EVERYWHERE, dtype=torch.int16, device=HOST)
        place = torch.empty(rows, dtype=torch.long, device=HOST)
        sizes = tuple(mesh.size(axis) for axis in sharding)
        for coordinate, held in owners(rows, sizes, tuple(placements[axis] for axis in sharding)).items():
            own = torch.tensor(held, dtype=torch.long, device=HOST)
            for axis, rank in zip(sharding, coordinate, strict=True):
                owner[axes.index(axis), own] = rank
            place[own] = torch.arange(len(held), device=HOST)
        _known[key] = len(ROUTES)
        ROUTES.append(
            Route(
                mesh=mesh,
                axes=axes,
                sizes=tuple(mesh.size(axis) for axis in axes),
                here=tuple(coordinates[axis] for axis in axes),
                sharded=sharded,
                owner=owner,
                place=place,
                split=tuple(axis in split for axis in axes),
            )
        )
    return _known[key]
