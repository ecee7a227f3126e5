"""Work on some rows of each matrix: choose them by the whole matrix, move them alone, put the result back.

The choice is the same on every mesh, to the last bit: see :func:`row_sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from dion_dtensor import placements as algebra
from dion_dtensor.assembly import (
    across,
    elementwise,
    from_local,
    local_of,
    on_all_ranks,
    placed,
    whole_dim,
)
from dion_dtensor.exchange import finish_rows, on_host, start_fetch, start_return
from dion_dtensor.layout import sharing_axes
from dion_dtensor.routes import route
from dion_dtensor.whole_matrices import in_turns, on_whole_matrices

__all__ = [
    "column_sums",
    "largest_rows",
    "on_rows",
    "own_rows",
    "row_sums",
    "scaled_rows",
    "sharing",
    "slices",
]


@algebra.constant
def slices(fraction: float, size: int) -> int:
    """``ceil(fraction * size)`` in exact arithmetic of the decimal that the user wrote, one at least."""
    exact = Fraction(str(fraction)) * size
    return max(1, -(-exact.numerator // exact.denominator))


BIAS = 1023
MANTISSA = 52
"""Of float64: what is added to an exponent, and bits below it."""


def largest_rows(sums: Tensor, count: int) -> Tensor:
    """Indices ``[N, count]``, ascending, of the largest of ``sums`` ``[N, m]``; ties to the lowest index."""
    order = torch.sort(sums, dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values


def row_sums(stack: Tensor) -> Tensor:
    """The sum of absolute values of each row of ``[N, m, n]``: ``[N, m]``, float64, whole on every rank.

    The same to the last bit in whatever order and on whatever mesh it is taken: values are first rounded to a multiple
    of a power of two that leaves room to add all of them exactly (Demmel and Nguyen, ARITH 2013).  That multiple is
    at most 2^-49 of the row's largest value times n; for float64 values, what was rounded off is added likewise.
    """

    def largest(values: Tensor) -> Tensor:
        return across(_exponents(_maximum(values)), stack, "max", (2,))

    def summed(values: Tensor) -> Tensor:
        return across(values.sum(-1, keepdim=True), stack, "sum", (2,))

    total = _sums(stack, largest, lambda found: found, summed, _room(stack.shape[2]))
    if isinstance(stack, DTensor):
        placements = algebra.of_reduced(algebra.of_pending(stack.placements, (2,), "sum"))
        total = local_of(
            whole_dim(from_local(total, stack.device_mesh, placements, (*stack.shape[:2], 1)), 1)
        )
    return total.squeeze(-1)


def column_sums(stack: Tensor, owner: Tensor, heights: Sequence[int]) -> Tensor:
    """The sum of absolute values of each column of each matrix of a parameter: ``[N, matrices, n]``, like row sums.

    Args:
        stack: ``[N, m, n]`` of parameters.
        owner: ``[m]``, which of the matrices each row belongs to; their number for none.
        heights: rows of each matrix.
    """
    here, count = own_rows(owner, stack), len(heights)
    rooms = torch.tensor([_room(height) for height in heights], dtype=torch.float64, device=stack.device)

    known = here.clamp(max=count - 1)

    def zeros(values: Tensor) -> Tensor:
        return values.new_zeros(values.shape[0], count + 1, values.shape[2])

    def largest(values: Tensor) -> Tensor:
        rows = here.view(1, -1, 1).expand_as(values)
        most = zeros(values).scatter_reduce(1, rows, values, "amax")[:, :count]
        return across(_exponents(most.contiguous()), stack, "max", (1,), (count,))

    def summed(values: Tensor) -> Tensor:
        sums = zeros(values).index_add(1, here, values)[:, :count]
        return across(sums, stack, "sum", (1,), (count,))

    total = _sums(stack, largest, lambda found: found[:, known], summed, rooms[known].unsqueeze(-1))
    if not isinstance(stack, DTensor):
        return total
    columns = algebra.of_only(stack.placements, (2,))
    shape = (stack.shape[0], count, stack.shape[2])
    return local_of(whole_dim(from_local(total, stack.device_mesh, columns, shape), 2))


def own_rows(values: Tensor, stack: Tensor) -> Tensor:
    """Of ``values`` ``[m]``, the same on every rank, those of the rows of ``[N, m, n]`` that are held here."""
    if not isinstance(stack, DTensor):
        return values
    rows = algebra.of_only(stack.placements, (1,))
    return placed(values.view(1, -1, 1), stack.device_mesh, rows).view(-1)


def _sums(
    stack: Tensor,
    largest: Callable[[Tensor], Tensor],
    of_each: Callable[[Tensor], Tensor],
    summed: Callable[[Tensor], Tensor],
    room: float | Tensor,
) -> Tensor:
    """The exact sums of the absolute values, rounded once to multiples; twice for float64.

    Args:
        stack: of matrices or parameters.
        largest: the exponent of the largest of what is summed together, on all ranks.
        of_each: spreads that over the values.
        summed: on all ranks.
        room: for as many values as are summed.
    """

    def once(values: Tensor) -> tuple[Tensor, Tensor]:
        exponents = of_each(largest(values.abs()))
        values = values.double()  # what was given is let go, eagerly the peak of a step
        high = _multiples(values, exponents, room)
        return summed(high), values - high

    total, rest = once(local_of(stack).abs())
    return total + once(rest)[0] if stack.dtype == torch.float64 else total


def _maximum(values: Tensor) -> Tensor:
    """Of each row ``[..., 1]``; zero where a shard is empty."""
    if not values.shape[-1]:  # a maximum alone refuses an empty dim
        values = torch.nn.functional.pad(values, (0, 1))
    return values.amax(-1, keepdim=True)


def _exponents(values: Tensor) -> Tensor:
    """Of the power of two below each of ``values``, by their bits, with the bias of their dtype; they go to all ranks.

    Inductor's vectorized frexp did not compile beside float32.
    """
    if values.dtype == torch.float64:
        return ((values.view(torch.int64) >> MANTISSA) & 0x7FF).to(torch.int32)
    return ((values.float().view(torch.int32) >> 23) & 0xFF).to(torch.uint8)


def _multiples(values: Tensor, exponents: Tensor, room: float | Tensor) -> Tensor:
    """``values`` rounded so that as many of them as ``room`` is for add up exactly in float64."""
    bias = BIAS if exponents.dtype == torch.int32 else 127
    # Subnormal numbers have the multiples of the smallest normal one.
    power = ((exponents.long().clamp(min=1) + (BIAS - bias)) << MANTISSA).view(torch.float64)
    # Adding 1.5 * 2^e leaves no bits below 2^(e - 52), and rounds to nearest.
    shift = power * room
    return (values + shift) - shift


def _room(count: int) -> float:
    """Of a sum of ``count`` values, in units of the power of two below the largest."""
    return 1.5 * 2.0 ** ((count - 1).bit_length() + 2)


def scaled_rows(stack: Tensor, chosen: Tensor, factor: Any) -> Tensor:
    """``stack`` ``[N, m, n]`` with its ``chosen`` rows ``[N, k]`` multiplied by ``factor``."""
    slot = _slots(stack, chosen)
    return elementwise(lambda values: torch.where(slot >= 0, values * factor, values), stack)


def on_rows(
    function: Callable[..., Any],
    stack: Tensor,
    chosen: Tensor,
    *states: Tensor,
    assemble: bool = False,
    chain: list[Tensor] | None = None,
) -> Any:
    """``function`` on whole matrices made of the chosen rows; where rows are sharded, only those travel.

    Args:
        function: maps a stack ``[j, k, n]`` (and the rows ``[j, k, 1]`` of each of ``states``) to a stack
            ``[j, k, n]``, or to a tuple with one stack ``[j, k, 1]`` more for each of ``states``.
        stack: ``[N, m, n]``, a tensor or a DTensor.
        chosen: ``[N, k]``, ascending indices of rows, the same on every rank (:func:`largest_rows`).
        states: ``[N, m, 1]``, a value for each row.
        assemble: bring all rows together before the choice, by ordinary collectives.
        chain: what other collectives of the step gave, never empty tensors, after which rows travel (see
            :mod:`dion_dtensor.exchange`); changed to what comes after them.

    Returns:
        ``[N, m, n]``, zero but for the chosen rows; with ``states`` a tuple, with each of them changed in these rows.
    """
    if isinstance(stack, DTensor) and algebra.axes_sharding(stack.placements, 1) and not assemble:
        result = _exchanged(function, stack, chosen, states, [] if chain is None else chain)
    else:
        direction, *new = _assembled(function, stack, chosen, states)
        pairs = zip(states, new, strict=True)
        result = (direction, *(_replaced(state, values, chosen) for state, values in pairs))
    return result if states else result[0]


def _assembled(
    function: Callable[..., Any], stack: Tensor, chosen: Tensor, states: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The directions as ``stack`` lies, and the new values ``[N, k, 1]`` of the states on every rank."""
    rows, *values = (_rows(local_of(whole_dim(one, 1)), chosen) for one in (stack, *states))
    if isinstance(stack, DTensor):
        new = _worked(function, rows, values, stack, algebra.of_exchanged(stack.placements, ()))
    else:
        made = function(rows, *values)
        new = list(made) if isinstance(made, tuple) else [made]
    return _spread(new[0], chosen, stack), *new[1:]


def _exchanged(
    function: Callable[..., Any],
    stack: DTensor,
    chosen: Tensor,
    states: tuple[Tensor, ...],
    chain: list[Tensor],
) -> tuple[Tensor, ...]:
    """Where rows are sharded: the chosen ones alone travel, in two turns where that is much, as whole matrices do.

    Their states go along.  What is started, waited for and gathered is chained, so that its order is the same on every
    rank.
    """
    mesh, storage, local = stack.device_mesh, stack.placements, stack.to_local()
    count, k = chosen.shape
    split, ranks, in_all = sharing(mesh, storage, count)
    placements = algebra.of_exchanged(storage, split)
    number = route(mesh, storage, stack.shape[1], split)
    lengths = in_turns(stack, k, in_all, count)
    padded = [length + -length % ranks for length in lengths]
    stacks, here = torch.split(local, lengths), torch.split(on_host(chosen), lengths)
    beside = _beside([local_of(state) for state in states])
    with_rows = [None] * len(lengths) if beside is None else torch.split(beside, lengths)
    what: tuple[Any, ...] = (0, None) if beside is None else (beside.shape[-1], beside.dtype)
    last, leaving, returning = [local_of(one) for one in chain], [], []
    for turn, matrices in enumerate(padded):
        leaving.append(start_fetch(stacks[turn], here[turn], number, matrices, last, with_rows[turn]))
        last = [leaving[turn]]
    for turn, matrices in enumerate(padded):
        shape = (matrices // ranks, k, local.shape[2])
        rows, *came = finish_rows([leaving[turn]], shape, local.dtype, last, *what)
        values, *new = _worked(function, rows, _apart(came), stack, placements)
        before = sum(lengths[:turn])
        returning.append(start_return(values, here[turn], number, matrices, before, last, _beside(new)))
        last = [returning[turn]]
    back, *came = finish_rows(returning, (count, *local.shape[1:]), values.dtype, last, *what)
    chain[:] = last
    changed = [_changed(state, values, chosen) for state, values in zip(states, _apart(came), strict=True)]
    return from_local(back, mesh, storage, tuple(stack.shape)), *changed


def _beside(values: Sequence[Tensor]) -> Tensor | None:
    """Of some values of each row ``[..., 1]`` one tensor."""
    if len(values) < 2:
        return values[0] if values else None
    return torch.cat(list(values), dim=-1)


def _apart(found: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`_beside`."""
    return [values for one in found for values in torch.split(one, 1, dim=-1)]


def _worked(
    function: Callable[..., Any],
    rows: Tensor,
    values: list[Tensor],
    stack: DTensor,
    placements: tuple[Placement, ...],
) -> list[Tensor]:
    """``function`` on chosen ``rows`` ``[j, k, n]`` and ``values`` ``[j, k, 1]``, local shards of ``placements``."""
    mesh = stack.device_mesh
    count = on_all_ranks(len(rows), mesh, algebra.axes_sharding(placements, 0))
    shape = (count, rows.shape[1], stack.shape[2])
    given = (from_local(one, mesh, algebra.of_only(placements, (0,)), (*shape[:2], 1)) for one in values)
    result = on_whole_matrices(function, from_local(rows, mesh, placements, shape), *given)
    return [one.to_local() for one in (result if isinstance(result, tuple) else (result,))]


def sharing(mesh: DeviceMesh, storage: tuple[Placement, ...], count: int) -> tuple[tuple[int, ...], int, int]:
    """The axes, of those that shard rows or hold copies, whose ranks share ``count`` matrices before rows are sent.

    And how many ranks that makes, and how many share them once columns have been assembled as well.

    Axes that shard columns come before copies: a copy that does not share costs work, such an axis an all-gather.
    """
    columns = algebra.axes_sharding(storage, 2)
    order = (*algebra.axes_sharding(storage, 1), *columns, *algebra.axes_holding_copies(storage))
    chosen, in_all = sharing_axes(mesh, storage, order, count)
    split, ranks = [], 1
    for axis in range(mesh.ndim):  # a plain loop, which Dynamo can trace
        if axis in chosen and axis not in columns:
            split.append(axis)
            ranks *= mesh.size(axis)
    return tuple(split), ranks, in_all


def _rows(stack: Tensor, chosen: Tensor) -> Tensor:
    """``[N, k, n]``: the chosen rows of plain ``[N, m, n]``."""
    # Indexed by row and not by element, so that compiled code reads whole rows.
    return stack[torch.arange(stack.shape[0], device=stack.device).unsqueeze(-1), chosen]


def _slots(stack: Tensor, chosen: Tensor) -> Tensor:
    """``[N, rows held here, 1]``: which of the chosen rows each row is, or -1."""
    count = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    slots = torch.full((chosen.shape[0], stack.shape[1]), -1, device=chosen.device).scatter(1, chosen, count)
    slots = slots.unsqueeze(-1)
    if isinstance(stack, DTensor):
        return placed(slots, stack.device_mesh, algebra.of_only(stack.placements, (1,)))
    return slots


def _spread(values: Tensor, chosen: Tensor, stack: Tensor) -> Tensor:
    """``values`` ``[N, k, n]`` as rows of zeros laid as ``stack``."""
    slots = _slots(stack, chosen)

    def spread(shard: Tensor) -> Tensor:
        return torch.where(slots >= 0, _rows(values, slots.squeeze(-1).clamp(min=0)), 0)

    return elementwise(spread, stack)


def _replaced(state: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """``state`` ``[N, m, 1]`` with ``values`` ``[N, k, 1]`` in the chosen rows."""
    slots = _slots(state, chosen)

    def replaced(shard: Tensor) -> Tensor:
        return torch.where(slots >= 0, values.gather(1, slots.clamp(min=0)), shard)

    return elementwise(replaced, state)


def _changed(state: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """``state`` ``[N, m, 1]`` with this rank's new ``values`` in the chosen rows of those that it holds."""
    slots = _slots(state, chosen)
    return elementwise(lambda shard: torch.where(slots >= 0, values, shard), state)
