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
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Work, all_to_all_single
from torch.fx.node import has_side_effect

from dion_dtensor.routes import EVERYWHERE, HOST, ROUTES, Route

__all__ = ["finish_rows", "forget", "on_host", "start_fetch", "start_return"]


@dataclass(frozen=True, eq=False)
class Rows:
    """What this rank has of all rows.

    Attributes:
        sources: ``[a, b, n]`` each, where they lie; a row is what all of them have of it.
        first, second: ``[h]``, where in the sources each of them does.
        which: ``[h]``, its number, ascending.
    """

    sources: tuple[Tensor, ...]
    first: Tensor
    second: Tensor
    which: Tensor

    def taken(self, order: Tensor) -> Tensor:
        """``[len(order), bytes of a row]``: those of the indices ``order``.

        As bytes: gloo knows fewer dtypes than torch, and a row may be empty here.
        """
        first, second = (_on(self.sources[0], index[order]) for index in (self.first, self.second))
        parts = [source[first, second].view(torch.uint8) for source in self.sources]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
def start_fetch(
    local: Tensor,
    chosen: Tensor,
    number: int,
    matrices: int,
    after: Sequence[Tensor],
    beside: Tensor | None = None,
) -> Tensor:
    """Start to bring the chosen rows of each matrix together.

    Args:
        local: ``[N, rows held here, n]``.
        chosen: ``[N, k]``, indices into all rows, the same on every rank, :func:`on_host`.
        number: of the route.
        matrices: N, padded to a multiple of the ranks that share the work.
        after: results of the collectives that come before.
        beside: ``[N, rows held here, s]``, which goes along.

    Returns:
        A token for :func:`finish_rows`, which then gives ``[matrices of this rank, k, n]``, zero for padding.
    """
    way, k = ROUTES[number], chosen.shape[1]
    picked, at = chosen.reshape(-1), way.owner[:, chosen.reshape(-1)]
    workers = way.workers(matrices)[:, : len(chosen)].repeat_interleave(k, dim=1)
    held = way.here_of(at)
    rows = Rows(_sources(local, beside), held // k, way.place[picked[held]], held)
    flight = _sent(rows, at, workers, way, way.order)
    which = flight.rows.which
    return _token(flight, which // k - way.own(matrices).start, which % k)


@torch.library.custom_op("dion_dtensor::start_return", mutates_args=())
def start_return(
    values: Tensor,
    chosen: Tensor,
    number: int,
    matrices: int,
    before: int,
    after: Sequence[Tensor],
    beside: Tensor | None = None,
) -> Tensor:
    """The way back of :func:`start_fetch`.

    Args:
        values, beside: ``[matrices of this rank, k, n]`` and ``[..., s]``.
        chosen, number, matrices, after: as given there.
        before: matrices of earlier turns, which come first in the result.

    Returns:
        A token for :func:`finish_rows`, which gives ``[N of all turns, rows held here, n]``, zero where a row was not
        chosen.
    """
    way, (count, k) = ROUTES[number], chosen.shape
    picked, home = chosen.reshape(-1), way.owner[:, chosen.reshape(-1)]
    at = way.workers(matrices)[:, :count].repeat_interleave(k, dim=1)
    held = way.here_of(at)
    rows = Rows(_sources(values, beside), held // k - way.own(matrices).start, held % k, held)
    flight = _sent(rows, at, home, way, way.order[::-1])
    which = flight.rows.which
    return _token(flight, before + which // k, way.place[picked[which]])


@torch.library.custom_op("dion_dtensor::finish_rows", mutates_args=())
def finish_rows(
    tokens: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    after: Sequence[Tensor],
    beside: int = 0,
    beside_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Wait for the rows that ``tokens`` stand for, and lay them among zeros.

    Args:
        tokens: given by the starts.
        shape: of the result.
        dtype: of the rows.
        after: what is to be started before.
        beside, beside_dtype: numbers that go along with a row, and their dtype; 0 for none.

    Returns:
        The rows, and what went along with them, ``[..., beside]``, if anything did.
    """
    flown = [_flights.pop(token.data_ptr()) for token in tokens]
    for flight, _, _ in flown:
        flight.landed()
    results = _zeros(tokens[0], shape, dtype, beside, beside_dtype)
    widths = [one.shape[-1] * one.element_size() for one in results]
    for flight, first, second in flown:
        assert flight.arriving is not None
        places = tuple(_on(results[0], index[flight.arriving]) for index in (first, second))
        for result, part in zip(results, torch.split(flight.rows.sources[0][0], widths, dim=1), strict=True):
            if part.numel():
                result[places] = part.contiguous().view(result.dtype)
    return results


@start_fetch.register_fake
@start_return.register_fake
def _(rows: Tensor, *others: Any) -> Tensor:
    return rows.new_empty(1, dtype=torch.uint8)


@finish_rows.register_fake
def _(
    tokens: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    after: Sequence[Tensor],
    beside: int = 0,
    beside_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    return _zeros(tokens[0], shape, dtype, beside, beside_dtype)


def _zeros(
    token: Tensor, shape: Sequence[int], dtype: torch.dtype, beside: int, beside_dtype: torch.dtype | None
) -> list[Tensor]:
    """What :func:`finish_rows` lays rows among."""
    found = [token.new_zeros(tuple(shape), dtype=dtype)]
    if beside:
        found.append(token.new_zeros((*shape[:-1], beside), dtype=beside_dtype))
    return found


# A rank that holds none of the rows has no use for the results, but the others wait for it: a compiler must not leave
# the calls out there.
for _operator in ("start_fetch", "start_return", "finish_rows"):
    has_side_effect(getattr(torch.ops.dion_dtensor, _operator).default)


def _sources(rows: Tensor, beside: Tensor | None) -> tuple[Tensor, ...]:
    return (rows,) if beside is None else (rows, beside)


def _on(other: Tensor, index: Tensor) -> Tensor:
    """``index`` where ``other`` lies; the host need not wait for what is queued there."""
    return index.to(other.device, non_blocking=True)


def _token(flight: Flight, first: Tensor, second: Tensor) -> Tensor:
    """What stands for a flight whose rows belong at ``[first, second]`` of the result."""
    token = flight.rows.sources[0].new_empty(1, dtype=torch.uint8)
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
        flight = Flight(Rows((copy,), torch.zeros_like(kept), kept, flight.rows.which), kept)
    return flight


def _hop(rows: Rows, at: Tensor, target: Tensor, way: Route, axis: int) -> Flight:
    """Move rows along one axis.

    Args:
        rows: what this rank has.
        at: ``[axes, all]``, where every row is; its row of this axis becomes ``target``.
        target: ``[all]``, the coordinate each row goes to, or EVERYWHERE.
        way, axis: the route, and which of its axes.
    """
    ranks, mine = way.sizes[axis], rows.which
    came_from = at[axis].clone()
    at[axis] = target
    wanted = way.here_of(at)
    if bool((came_from == EVERYWHERE).all()):  # nothing has to travel
        kept = torch.isin(mine, wanted)
        return Flight(Rows(rows.sources, rows.first[kept], rows.second[kept], mine[kept]))
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
    rows_sent = rows.taken(order)
    width, sent = rows_sent.shape[1], rows_sent.reshape(-1)
    received = sent.new_empty(len(wanted) * width)
    sizes_in, sizes_out = [one * width for one in expected], [one * width for one in counts]
    work = all_to_all_single(
        received, sent, sizes_in, sizes_out, group=way.mesh.get_group(way.axes[axis]), async_op=True
    )
    second = torch.empty_like(arriving).scatter_(0, arriving, torch.arange(len(arriving), device=HOST))
    source = received.view(1, len(wanted), width)
    return Flight(Rows((source,), torch.zeros_like(second), second, wanted), arriving, work, sent)
