"""Chosen slices of logical matrices that are blocks of one parameter's rows, where shards may cut the blocks.

The parameter stays as it lies, and only the chosen slices of its blocks travel; whoever works on a parameter gets those
of all its blocks. The choice is the same on every mesh, to the last bit, as in `selection.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dion_dtensor import placements as algebra
from dion_dtensor.assembly import elementwise, from_local, laid_like, local_of, placed, shards, whole_dim
from dion_dtensor.chosen_columns import brought, taken_back
from dion_dtensor.matrices import Piece, Split, by_rows
from dion_dtensor.selection import column_sums, largest_rows, on_rows, own_rows
from dion_dtensor.whole_matrices import on_whole_matrices

__all__ = ["Blocks", "blocks_of", "on_columns_of_blocks", "on_rows_of_blocks", "scaled_where"]

Function = Callable[..., Any]
Number = Callable[[int], int]
"""Slices to be chosen of so many."""


class Blocks(NamedTuple):
    """The logical matrices of a parameter ``[height, n]``.

    Attributes:
        split: into blocks of rows, or of columns of what these are the rows of.
        pieces: by shape.
        rows: for each piece ``[count, m]``, which of the parameter's rows its matrices have.
        owner: ``[height]``, the number of the matrix that has each row.
        heights: rows of each matrix.
        n: columns of all.
    """

    split: Split
    pieces: tuple[Piece, ...]
    rows: tuple[Tensor, ...]
    owner: Tensor
    heights: tuple[int, ...]
    n: int


def blocks_of(split: Split, stack: Tensor) -> Blocks:
    """Of each parameter in a stack ``[N, height, n]``.

    Args:
        split: into blocks of rows, or of columns of what ``stack`` is the transpose of.
        stack: a tensor or a DTensor.
    """
    height, n = stack.shape[1:]
    _, of_rows = by_rows(split)
    pieces = of_rows.pieces((height, n))
    numbered = of_rows.split(torch.arange(height, device=stack.device).view(1, -1, 1))
    rows = tuple(stack.flatten(1) for stack in numbered)
    heights = tuple(piece.m for piece in pieces for _ in range(piece.count))
    numbers = [
        torch.arange(p.first, p.first + p.count, device=stack.device).repeat_interleave(p.m) for p in pieces
    ]
    order = torch.cat([some.flatten() for some in rows])
    owner = torch.empty_like(order).scatter(0, order, torch.cat(numbers))
    return Blocks(split, pieces, rows, owner, heights, n)


def on_rows_of_blocks(
    function: Function,
    stack: Tensor,
    sums: Tensor,
    blocks: Blocks,
    which: Sequence[int],
    number: Number,
    *states: Tensor,
    assemble: bool = False,
    chain: list[Tensor] | None = None,
) -> tuple[Any, Tensor]:
    """``function`` on whole matrices made of the rows of largest norm of each logical matrix.

    Args:
        function: as in :func:`on_rows`, of stacks of rows chosen of logical matrices.
        stack: ``[N, height, n]``, what it works on.
        sums: ``[N, height]``, by which is chosen (:func:`row_sums`).
        blocks: of each of the N parameters.
        which: pieces whose rows are chosen; nothing is chosen of the others.
        number: rows to be chosen of a matrix.
        states: ``[N, height, 1]``, a value for each row.
        assemble, chain: as in :func:`on_rows`.

    Returns:
        The result of :func:`on_rows`, and the chosen rows ``[N, k]``, indices into those of the parameter.
    """
    taken = [(blocks.pieces[i], blocks.rows[i], number(blocks.pieces[i].m)) for i in which]
    chosen = []
    for piece, rows, k in taken:
        own = largest_rows(sums[:, rows.flatten()].view(-1, piece.m), k).view(-1, piece.count, k)
        chosen.append(rows.expand(len(own), -1, -1).gather(2, own).flatten(1))

    def on_pieces(*values: Tensor) -> Any:
        cut = zip(
            *(torch.split(one, [p.count * k for p, _, k in taken], dim=1) for one in values), strict=True
        )
        made = []
        for (_, _, k), parts in zip(taken, cut, strict=True):
            # Contiguous, so that sums run in the same order as on one device.
            result = function(*(part.contiguous().view(-1, k, part.shape[2]) for part in parts))
            result = result if isinstance(result, tuple) else (result,)
            made.append([one.view(part.shape) for one, part in zip(result, parts, strict=True)])
        joined = tuple(torch.cat(results, dim=1) for results in zip(*made, strict=True))
        return joined if states else joined[0]

    every = torch.cat(chosen, dim=1)
    return on_rows(on_pieces, stack, every, *states, assemble=assemble, chain=chain), every


def on_columns_of_blocks(
    function: Function,
    stack: Tensor,
    norms_of: Tensor,
    blocks: Blocks,
    which: Sequence[int],
    number: Number,
    *,
    assemble: bool = False,
    chain: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``function`` on whole matrices made of the columns of largest norm of each logical matrix, transposed.

    Args:
        function: of stacks ``[j, k, m]``.
        stack, blocks, which, number, chain: as in :func:`on_rows_of_blocks`.
        norms_of: likewise, by whose column sums is chosen.
        assemble: bring all columns, and the rows of all blocks together, not the chosen ones of these alone.

    Returns:
        ``[N, height, n]``, zero but for the chosen columns of the logical matrices, and which those are, as zeros and
        ones.
    """
    k, device = number(blocks.n), stack.device
    pieces = {index: blocks.pieces[index] for index in which}
    heights = [piece.m for piece in pieces.values() for _ in range(piece.count)]
    matrices = [piece.first + one for piece in pieces.values() for one in range(piece.count)]
    count, place = len(matrices), torch.tensor(matrices, device=device)
    numbers = torch.full((len(blocks.heights),), count, device=device)
    owner = numbers.scatter(0, place, torch.arange(count, device=device))[blocks.owner]
    sums = column_sums(norms_of, owner, heights)
    chosen = largest_rows(sums.flatten(0, 1), k).view(*sums.shape[:2], k)
    here = own_rows(owner, stack)
    known, real = here.clamp(max=count - 1), (here < count).unsqueeze(-1)

    every = assemble or len(pieces) == len(blocks.pieces)
    # The rows of these matrices in their order, and the place of each row among them.
    mine = torch.ones_like(owner, dtype=torch.bool) if every else owner < count
    among = mine.cumsum(0) - 1
    places = {index: among[blocks.rows[index].flatten()] for index in which}

    def on_pieces(some: Tensor) -> Tensor:
        result = torch.zeros_like(some)
        for index, piece in pieces.items():
            part = some[:, places[index]].view(len(some) * piece.count, piece.m, k)
            made = function(part.mT.contiguous()).mT.to(result.dtype)
            result[:, places[index]] = made.reshape(len(some), piece.count * piece.m, k)
        return result

    def worked(values: Tensor) -> Tensor:
        """``values`` ``[N, height, k]``, of each row its matrix's chosen columns."""
        if every:
            result: Tensor = on_whole_matrices(on_pieces, values)
        else:
            total = sum(piece.m * piece.count for piece in pieces.values())
            rows = torch.argsort(~mine, stable=True)[:total].expand(len(local_of(values)), -1)
            result = on_rows(on_pieces, values, rows, chain=chain)
        return result

    chain = [] if chain is None else chain
    chain.append(sums)
    ones = torch.zeros(*sums.shape, dtype=stack.dtype, device=device).scatter(2, chosen, 1)
    if isinstance(stack, DTensor):
        ones = placed(ones, stack.device_mesh, algebra.of_only(stack.placements, (2,)))
    mask = torch.where(real, ones[:, known], 0)
    if isinstance(stack, DTensor) and shards(stack, 2) and not assemble:
        values, flight = brought(stack, chosen, blocks.split, matrices, chain)
        spread: Tensor = taken_back(worked(values), flight, chain)
    else:
        spread = _on_gathered(worked, stack, chosen[:, known], real)
    return spread, _laid(mask, stack, blocks.n)


def _on_gathered(
    function: Callable[[Tensor], Tensor], stack: Tensor, columns: Tensor, real: Tensor
) -> Tensor:
    """``function`` of ``columns`` ``[N, rows held here, k]``, one choice a row, where every rank has all columns.

    Returns:
        ``[N, height, n]`` that lies as ``stack``, zero but for those; all of a row that is not ``real``.
    """
    whole = whole_dim(stack, 2)
    values = torch.where(real, local_of(whole).gather(2, columns), 0)
    made = torch.where(real, local_of(function(_laid(values, whole, columns.shape[2]))), 0)
    spread = torch.zeros_like(local_of(whole), dtype=made.dtype).scatter_add(2, columns, made)
    return laid_like(_laid(spread, whole, stack.shape[2]), stack)


def _laid(local: Tensor, like: Tensor, width: int) -> Tensor:
    """``[N, height, width]`` that lies as ``like``."""
    if not isinstance(like, DTensor):
        return local
    return from_local(local, like.device_mesh, like.placements, (*like.shape[:2], width))


def scaled_where(stack: Tensor, mask: Tensor, factor: Any) -> Tensor:
    """``stack`` multiplied by ``factor`` where ``mask`` is not zero."""
    return elementwise(lambda values, ones: torch.where(ones != 0, values * factor, values), stack, mask)
