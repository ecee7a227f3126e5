"""The chosen columns of logical matrices travel alone where columns are sharded, with the rows that lie here.

A rank sends those that it holds, as high as what it holds of their matrix; whoever works on a parameter gets those of
all columns.  Rows may be sharded as well, and stay so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from dion_dtensor import placements as algebra
from dion_dtensor.assembly import from_local, on_all_ranks
from dion_dtensor.exchange import finish_rows, on_host, start_fetch, start_return
from dion_dtensor.matrices import Split
from dion_dtensor.routes import route
from dion_dtensor.selection import sharing
from dion_dtensor.spans import index_of, rows_here

__all__ = ["brought", "taken_back"]


class Some(NamedTuple):
    """Matrices with as many rows here.

    Attributes:
        number: of them, in each parameter.
        height: rows of each.
        rows: where these lie in the local shard.
        chosen: ``[N * number, k]``, columns, on the host.
    """

    number: int
    height: int
    rows: slice | Tensor
    chosen: Tensor


class Flight(NamedTuple):
    """What the way back of some columns takes.

    Attributes:
        storage: the parameters ``[N, height, n]``.
        route: its number, on which columns are what rows are elsewhere.
        padded: N, a multiple of the ranks that share the work.
        every: what travels.
    """

    storage: DTensor
    route: int
    padded: int
    every: tuple[Some, ...]


def brought(
    stack: DTensor, chosen: Tensor, split: Split, matrices: Sequence[int], chain: list[Tensor]
) -> tuple[DTensor, Flight]:
    """The chosen columns of some matrices on the ranks that work on their parameters.

    Args:
        stack: ``[N, height, n]`` of parameters, some axis shards ``n``.
        chosen: ``[N, matrices, k]``, ascending indices of columns, the same on every rank.
        split: of the parameters, into blocks of rows.
        matrices: their numbers among the logical matrices of a parameter.
        chain: see :func:`~dion_dtensor.selection.on_rows`.

    Returns:
        ``[padded N, height, k]``: of each row the chosen columns of its matrix, zero where it is of none; and what
        :func:`taken_back` takes.
    """
    mesh, local, placements = stack.device_mesh, stack.to_local(), stack.placements
    turned = algebra.of_transposed(placements)
    count, k = len(local), chosen.shape[2]
    split_axes, ranks, _ = sharing(mesh, turned, count)
    padded = count + -count % ranks
    number = route(mesh, turned, stack.shape[2], split_axes)
    every, tokens = [], []
    for numbers, height, span in rows_here(
        mesh, placements, str(split), (stack.shape[1], stack.shape[2]), tuple(matrices)
    ):
        here = chosen[:, list(numbers)].flatten(0, 1)
        some = Some(len(numbers), height, index_of(span, stack.device), on_host(here))
        columns = _by_matrix(local[:, some.rows], some)
        tokens.append(start_fetch(columns, some.chosen, number, padded * some.number, chain))
        chain[:] = tokens[-1:]
        every.append(some)
    values = local.new_zeros(padded // ranks, local.shape[1], k)
    for some, token in zip(every, tokens, strict=True):
        shape = (padded // ranks * some.number, k, some.height)
        values[:, some.rows] = _by_parameter(finish_rows([token], shape, local.dtype, chain)[0], some)
    lies = algebra.of_transposed(algebra.of_exchanged(turned, split_axes))
    total = on_all_ranks(padded // ranks, mesh, algebra.axes_sharding(lies, 0))
    shape = (total, stack.shape[1], k)
    return from_local(values, mesh, lies, shape), Flight(stack, number, padded, tuple(every))


def taken_back(values: Tensor, flight: Flight, chain: list[Tensor]) -> DTensor:
    """``values`` as :func:`brought` laid them, back home: ``[N, height, n]``, zero but for the chosen columns."""
    assert isinstance(values, DTensor)
    made, stack = values.to_local(), flight.storage
    local, tokens = stack.to_local(), []
    for some in flight.every:
        columns = _by_matrix(made[:, some.rows], some)
        after = [made, *chain]
        tokens.append(start_return(columns, some.chosen, flight.route, flight.padded * some.number, 0, after))
        chain[:] = tokens[-1:]
    result = made.new_zeros(local.shape)
    for some, token in zip(flight.every, tokens, strict=True):
        shape = (len(local) * some.number, local.shape[2], some.height)
        result[:, some.rows] = _by_parameter(finish_rows([token], shape, made.dtype, chain)[0], some)
    return from_local(result, stack.device_mesh, stack.placements, tuple(stack.shape))


def _by_matrix(rows: Tensor, some: Some) -> Tensor:
    """``[N * number, n, height]`` of ``[N, number * height, n]``."""
    return rows.reshape(len(rows), some.number, some.height, rows.shape[2]).mT.flatten(0, 1).contiguous()


def _by_parameter(columns: Tensor, some: Some) -> Tensor:
    """The inverse of :func:`_by_matrix`."""
    return columns.view(len(columns) // some.number, some.number, *columns.shape[1:]).mT.flatten(1, 2)
