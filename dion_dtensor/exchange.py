"""Chosen rows travel from the ranks that hold them to the ranks that work on their matrix, and back.

Which rows are chosen depends on the data, so how many of them each rank holds does too: the exchange is made of
operators that ``torch.compile`` does not look into, with results of fixed shape.  Every rank knows all choices and who
holds which row, so nothing but the rows themselves is sent.

It is started and waited for apart, so that work on other rows comes in between.  A compiler sees no collective in here,
and may order what does not depend on it differently on ranks with other shapes, so that they wait for each other.  So
whatever else communicates comes before, by ``after``, or works with the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import Work, all_to_all_single
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement
from torch.fx.node import has_side_effect

from dion_dtensor.fake import with_real_tensors
from dion_dtensor.layout import owners
from dion_dtensor.placements import axes_sharding, constant

__all__ = ["finish_rows", "forget", "on_host", "route", "start_fetch", "start_return"]

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


_routes: list[Route] = []
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
        _known[key] = len(_routes)
        _routes.append(
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


@dataclass(frozen=True, eq=False)
class Rows:
    """What this rank has of all rows.

    Attributes:
        source: ``[a, b, n]``, where they lie.
        first, second: ``[h]``, where in ``source`` each of them does.
        which: ``[h]``, its number, ascending.
    """

    source: Tensor
    first: Tensor
    second: Tensor
    which: Tensor

    def taken(self, order: Tensor) -> Tensor:
        """``[len(order), n]``: those of the indices ``order``."""
        return self.source[_on(self.source, self.first[order]), _on(self.source, self.second[order])]


@dataclass(eq=False)
class Flight:
    """Rows on the last hop of their way, or landed where ``work`` is None.

    Attributes:
        rows: what this rank will have.
        arriving: indices into these, in the order in which they lie in their source; None if they lie in any.
        work, sent: what is waited for, and has to be kept until then.
    """

    rows: Rows
    arriving: Tensor | None = None
    work: Work | None = None
    sent: Tensor | None = None

    def landed(self) -> Rows:
        """Wait."""
        if self.work is not None:
            self.work.wait()
        self.work = self.sent = None
        return self.rows


_flights: dict[int, tuple[Flight, Tensor, Tensor]] = {}
"""By the address of the token that an operator gave for it, with the places of the rows in the result."""


def forget() -> None:
    """Drop what a step that failed has left on its way."""
    _flights.clear()


@torch.library.custom_op("dion_dtensor::on_host", mutates_args=())
def on_host(chosen: Tensor) -> Tensor:
    """A copy of ``chosen`` for the host, which waits for it."""
    return chosen.to(HOST, copy=True)


@on_host.register_fake
def _(chosen: Tensor) -> Tensor:
    return torch.empty_like(chosen, device=HOST)


@torch.library.custom_op("dion_dtensor::start_fetch", mutates_args=())
def start_fetch(local: Tensor, chosen: Tensor, number: int, matrices: int, after: Sequence[Tensor]) -> Tensor:
    """Start to bring the chosen rows of each matrix together.

    Args:
        local: ``[N, rows held here, n]``.
        chosen: ``[N, k]``, indices into all rows, the same on every rank, :func:`on_host`.
        number: of the route.
        matrices: N, padded to a multiple of the ranks that share the work.
        after: results of the collectives that come before.

    Returns:
        A token for :func:`finish_rows`, which then gives ``[matrices of this rank, k, n]``, zero for padding.
    """
    way, k = _routes[number], chosen.shape[1]
    picked, at = chosen.reshape(-1), way.owner[:, chosen.reshape(-1)]
    workers = way.workers(matrices)[:, : len(chosen)].repeat_interleave(k, dim=1)
    held = way.here_of(at)
    flight = _sent(Rows(local, held // k, way.place[picked[held]], held), at, workers, way, way.order)
    which = flight.rows.which
    return _token(flight, which // k - way.own(matrices).start, which % k)


@torch.library.custom_op("dion_dtensor::start_return", mutates_args=())
def start_return(
    values: Tensor, chosen: Tensor, number: int, matrices: int, before: int, after: Sequence[Tensor]
) -> Tensor:
    """The way back of :func:`start_fetch`.

    Args:
        values: ``[matrices of this rank, k, n]``.
        chosen, number, matrices, after: as given there.
        before: matrices of earlier turns, which come first in the result.

    Returns:
        A token for :func:`finish_rows`, which gives ``[N of all turns, rows held here, n]``, zero where a row was not
        chosen.
    """
    way, (count, k) = _routes[number], chosen.shape
    picked, home = chosen.reshape(-1), way.owner[:, chosen.reshape(-1)]
    at = way.workers(matrices)[:, :count].repeat_interleave(k, dim=1)
    held = way.here_of(at)
    rows = Rows(values, held // k - way.own(matrices).start, held % k, held)
    flight = _sent(rows, at, home, way, way.order[::-1])
    which = flight.rows.which
    return _token(flight, before + which // k, way.place[picked[which]])


@torch.library.custom_op("dion_dtensor::finish_rows", mutates_args=())
def finish_rows(
    tokens: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, after: Sequence[Tensor]
) -> Tensor:
    """Wait for the rows that ``tokens`` stand for, and lay them among zeros.

    Args:
        tokens: given by the starts.
        shape: of the result.
        dtype: of the rows.
        after: what is to be started before.
    """
    flown = [_flights.pop(token.data_ptr()) for token in tokens]
    for flight, _, _ in flown:
        flight.landed()
    result = tokens[0].new_zeros(tuple(shape), dtype=dtype)
    for flight, first, second in flown:
        assert flight.arriving is not None
        first, second = first[flight.arriving], second[flight.arriving]
        result[_on(result, first), _on(result, second)] = flight.rows.source[0]
    return result


@start_fetch.register_fake
def _(local: Tensor, chosen: Tensor, number: int, matrices: int, after: Sequence[Tensor]) -> Tensor:
    return local.new_empty(1)


@start_return.register_fake
def _(
    values: Tensor, chosen: Tensor, number: int, matrices: int, before: int, after: Sequence[Tensor]
) -> Tensor:
    return values.new_empty(1)


@finish_rows.register_fake
def _(tokens: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, after: Sequence[Tensor]) -> Tensor:
    return tokens[0].new_empty(tuple(shape), dtype=dtype)


# A rank that holds none of the rows has no use for the results, but the others wait for it: a compiler must not leave
# the calls out there.
for _operator in ("start_fetch", "start_return", "finish_rows"):
    has_side_effect(getattr(torch.ops.dion_dtensor, _operator).default)


def _on(other: Tensor, index: Tensor) -> Tensor:
    """``index`` where ``other`` lies; the host need not wait for what is queued there."""
    return index.to(other.device, non_blocking=True)


def _token(flight: Flight, first: Tensor, second: Tensor) -> Tensor:
    """What stands for a flight whose rows belong at ``[first, second]`` of the result."""
    token = flight.rows.source.new_empty(1)
    _flights[token.data_ptr()] = flight, first, second
    return token


def _sent(rows: Rows, at: Tensor, target: Tensor, way: Route, order: Sequence[int]) -> Flight:
    """Move rows from the ranks ``at`` ``[axes, all]`` to those of ``target``, along one axis after the other."""
    flight, at = Flight(rows), at.clone()
    for axis in order:
        flight = _hop(flight.landed(), at, target[axis], way, axis)
    if flight.arriving is None:
        # A copy: the source may be what the operator was given, which the caller may write into before they are laid.
        kept = torch.arange(len(flight.rows.which), device=HOST)
        copy = flight.rows.taken(kept).unsqueeze(0)
        flight = Flight(Rows(copy, torch.zeros_like(kept), kept, flight.rows.which), kept)
    return flight


def _hop(rows: Rows, at: Tensor, target: Tensor, way: Route, axis: int) -> Flight:
    """Move rows along one axis.

    Args:
        rows: what this rank has.
        at: ``[axes, all]``, where every row is; its row of this axis becomes ``target``.
        target: ``[all]``, the coordinate each row goes to, or EVERYWHERE.
        way, axis: the route, and which of its axes.
    """
    ranks, mine, n = way.sizes[axis], rows.which, rows.source.shape[2]
    came_from = at[axis].clone()
    at[axis] = target
    wanted = way.here_of(at)
    if bool((came_from == EVERYWHERE).all()):  # nothing has to travel
        kept = torch.isin(mine, wanted)
        return Flight(Rows(rows.source, rows.first[kept], rows.second[kept], mine[kept]))
    goes = target[mine]
    if bool((target == EVERYWHERE).all()):
        order = torch.arange(len(mine), device=HOST).repeat(ranks)
        counts = [len(mine)] * ranks
    else:
        order = torch.argsort(goes, stable=True)
        counts = torch.bincount(goes, minlength=ranks).tolist()
    sources = came_from[wanted]
    arriving = torch.argsort(sources, stable=True)
    expected = torch.bincount(sources, minlength=ranks).tolist()
    # As flat bytes: gloo knows fewer dtypes than torch, and a row may be empty here.
    width = n * rows.source.element_size()
    sent = rows.taken(order).reshape(-1).view(torch.uint8)
    received = sent.new_empty(len(wanted) * width)
    sizes_in, sizes_out = [one * width for one in expected], [one * width for one in counts]
    work = all_to_all_single(
        received, sent, sizes_in, sizes_out, group=way.mesh.get_group(way.axes[axis]), async_op=True
    )
    second = torch.empty_like(arriving).scatter_(0, arriving, torch.arange(len(arriving), device=HOST))
    source = received.view(rows.source.dtype).view(1, len(wanted), n)
    return Flight(Rows(source, torch.zeros_like(second), second, wanted), arriving, work, sent)
