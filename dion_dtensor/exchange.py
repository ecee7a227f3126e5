"""Chosen rows travel from the ranks that hold them to the ranks that work on their matrix, and back.

Which rows are chosen depends on the data, so how many of them each rank holds does too: the exchange is an operator
that ``torch.compile`` does not look into, with a result of fixed shape.  Every rank knows all choices and who holds
which row, so nothing but the rows themselves is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement
from torch.fx.node import has_side_effect

from dion_dtensor.layout import owners
from dion_dtensor.placements import axes_sharding, constant

__all__ = ["fetch_rows", "return_rows", "route"]

EVERYWHERE = -1
"""In place of a coordinate: every rank of the axis has the row."""


@dataclass(frozen=True, eq=False)
class Route:
    """Between storage, where each axis of the route shards the rows or holds copies, and the work.

    Attributes:
        groups: process group of each axis, in the order of the mesh.
        sizes: ranks of each axis.
        here: this rank's coordinates.
        sharded: for each axis, whether it shards the rows; otherwise each of its ranks holds all.
        owner: ``[rows, axes]``, the coordinates of the rank that holds each row.
        place: ``[rows]``, the row's index there.
        split: for each axis, whether its ranks share the matrices; otherwise each of them works on all.
    """

    groups: tuple[ProcessGroup, ...]
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
        """``[matrices, axes]``, the coordinates of the ranks that work on each of ``matrices`` (a padded number)."""
        where = torch.empty(matrices, len(self.sizes), dtype=torch.long)
        block = torch.arange(matrices)
        length = matrices
        for axis, size in enumerate(self.sizes):
            if self.split[axis]:
                length //= size
                where[:, axis] = block // length
                block = block % length
            else:
                where[:, axis] = EVERYWHERE
        return where

    def here_of(self, at: Tensor) -> Tensor:
        """Which of the rows (or matrices) with coordinates ``at`` this rank has."""
        return ((at == torch.tensor(self.here)) | (at == EVERYWHERE)).all(dim=1)

    def own(self, matrices: int) -> range:
        """The matrices that this rank works on."""
        start, length = 0, matrices
        for size, here, split in zip(self.sizes, self.here, self.split, strict=True):
            if split:
                length //= size
                start += here * length
        return range(start, start + length)


_routes: list[Route] = []
_known: dict[object, int] = {}


@constant
def route(mesh: DeviceMesh, placements: tuple[Placement, ...], rows: int, split: tuple[int, ...]) -> int:
    """The number of the route for stacks ``[N, rows, n]`` with ``placements``; an operator takes no other handle.

    Args:
        mesh: of the stack.
        placements: some axes shard the rows (dim 1).
        rows: of each matrix.
        split: the axes whose ranks share the matrices: some of those, and some that hold copies.
    """
    key = (mesh, placements, rows, split)
    if key not in _known:
        sharding = axes_sharding(placements, 1)
        axes = tuple(sorted({*sharding, *split}))
        sharded = tuple(axis in sharding for axis in axes)
        coordinates = mesh.get_coordinate()
        assert coordinates is not None
        holder = torch.empty(rows, len(sharding), dtype=torch.long)
        place = torch.empty(rows, dtype=torch.long)
        sizes = tuple(mesh.size(axis) for axis in sharding)
        for coordinate, held in owners(rows, sizes, tuple(placements[axis] for axis in sharding)).items():
            holder[held] = torch.tensor(coordinate)
            place[held] = torch.arange(len(held))
        owner = torch.full((rows, len(axes)), EVERYWHERE)
        owner[:, torch.tensor(sharded)] = holder
        _known[key] = len(_routes)
        _routes.append(
            Route(
                groups=tuple(mesh.get_group(axis) for axis in axes),
                sizes=tuple(mesh.size(axis) for axis in axes),
                here=tuple(coordinates[axis] for axis in axes),
                sharded=sharded,
                owner=owner,
                place=place,
                split=tuple(axis in split for axis in axes),
            )
        )
    return _known[key]


@torch.library.custom_op("dion_dtensor::fetch_rows", mutates_args=())
def fetch_rows(local: Tensor, chosen: Tensor, number: int, matrices: int, after: Sequence[Tensor]) -> Tensor:
    """Bring the chosen rows of each matrix together.

    A compiler sees no collective in here, and may order what does not depend on it differently on ranks with other
    shapes, so that they wait for each other. So whatever else communicates comes before, by ``after``, or works with
    the result.

    Args:
        local: ``[N, rows held here, n]``.
        chosen: ``[N, k]``, indices into all rows, the same on every rank.
        number: of the route.
        matrices: N, padded to a multiple of the ranks that share the work.
        after: results of the collectives that come before.

    Returns:
        ``[matrices of this rank, k, n]``, zero for padding.
    """
    way, k = _routes[number], chosen.shape[1]
    picked = chosen.cpu().reshape(-1)
    workers = way.workers(matrices)[: len(chosen)].repeat_interleave(k, dim=0)
    at, keys = way.owner[picked].clone(), torch.arange(len(picked))
    held = keys[way.here_of(at)]
    rows = local[(held // k).to(local.device), way.place[picked[held]].to(local.device)]
    for axis in way.order:
        rows, held = _hop(rows, held, at, workers[:, axis], way, axis)
    own = way.own(matrices)
    result = local.new_zeros(len(own), k, local.shape[2])
    result[(held // k - own.start).to(local.device), (held % k).to(local.device)] = rows
    return result


@fetch_rows.register_fake
def _(local: Tensor, chosen: Tensor, number: int, matrices: int, after: Sequence[Tensor]) -> Tensor:
    return local.new_empty(len(_routes[number].own(matrices)), chosen.shape[1], local.shape[2])


@torch.library.custom_op("dion_dtensor::return_rows", mutates_args=())
def return_rows(
    values: Tensor, chosen: Tensor, number: int, matrices: int, held_rows: int, after: Sequence[Tensor]
) -> Tensor:
    """The way back of :func:`fetch_rows`.

    Args:
        values: ``[matrices of this rank, k, n]``.
        chosen, number, matrices: as given there.
        held_rows: rows of each matrix that this rank holds.
        after: as there.

    Returns:
        ``[N, held_rows, n]``, zero where a row was not chosen.
    """
    way, (count, k) = _routes[number], chosen.shape
    picked = chosen.cpu().reshape(-1)
    at = way.workers(matrices)[:count].repeat_interleave(k, dim=0).clone()
    home, keys = way.owner[picked], torch.arange(len(picked))
    held = keys[way.here_of(at)]
    rows = values[(held // k - way.own(matrices).start).to(values.device), (held % k).to(values.device)]
    for axis in reversed(way.order):
        rows, held = _hop(rows, held, at, home[:, axis], way, axis)
    result = values.new_zeros(count, held_rows, values.shape[2])
    result[(held // k).to(values.device), way.place[picked[held]].to(values.device)] = rows
    return result


@return_rows.register_fake
def _(
    values: Tensor, chosen: Tensor, number: int, matrices: int, held_rows: int, after: Sequence[Tensor]
) -> Tensor:
    return values.new_empty(chosen.shape[0], held_rows, values.shape[2])


# A rank that holds none of the rows has no use for the results, but the others wait for it: a compiler must not leave
# the calls out there.
for _operator in ("fetch_rows", "return_rows"):
    has_side_effect(getattr(torch.ops.dion_dtensor, _operator).default)


def _hop(
    rows: Tensor, held: Tensor, at: Tensor, target: Tensor, way: Route, axis: int
) -> tuple[Tensor, Tensor]:
    """Move rows along one axis.

    Args:
        rows: ``[h, n]``, what this rank holds.
        held: ``[h]``, which row each is, ascending.
        at: ``[all, axes]``, where every row is; its column of this axis becomes ``target``.
        target: ``[all]``, the coordinate each row goes to, or EVERYWHERE.
        way, axis: the route, and which of its axes.

    Returns:
        What this rank holds afterwards, and which row each is, ascending.
    """
    ranks = way.sizes[axis]
    came_from, mine = at[:, axis].clone(), held
    at[:, axis] = target
    wanted = torch.arange(len(at))[way.here_of(at)]
    if bool((came_from == EVERYWHERE).all()):  # nothing has to travel
        kept = torch.isin(mine, wanted)
        return rows[kept.to(rows.device)], mine[kept]
    goes = target[mine]
    if bool((target == EVERYWHERE).all()):
        order = torch.arange(len(mine)).repeat(ranks)
        counts = [len(mine)] * ranks
    else:
        order = torch.argsort(goes, stable=True)
        counts = torch.bincount(goes, minlength=ranks).tolist()
    sources = came_from[wanted]
    arriving = torch.argsort(sources, stable=True)
    expected = torch.bincount(sources, minlength=ranks).tolist()
    # As flat bytes: gloo knows fewer dtypes than torch, and a row may be empty here.
    width = rows.shape[1] * rows.element_size()
    sent = rows[order.to(rows.device)].reshape(-1).view(torch.uint8)
    received = sent.new_empty(len(wanted) * width)
    sizes_in, sizes_out = [n * width for n in expected], [n * width for n in counts]
    all_to_all_single(received, sent, sizes_in, sizes_out, group=way.groups[axis])
    moved = rows.new_empty(len(wanted), rows.shape[1])
    moved[arriving.to(rows.device)] = received.view(rows.dtype).reshape(moved.shape)
    return moved, wanted
