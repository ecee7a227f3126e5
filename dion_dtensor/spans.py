"""Which rows of which logical matrices lie here: known once a mesh, placements and a split are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from dion_dtensor import placements as algebra
from dion_dtensor.fake import with_real_tensors
from dion_dtensor.layout import owners
from dion_dtensor.matrices import by_rows
from dion_dtensor.split_text import parse_split

__all__ = ["Span", "index_of", "rows_here", "spans"]

Span = tuple[int, int, tuple[int, ...]]
"""Indices: from the first number up to the second, or those listed."""


def index_of(span: Span, device: torch.device) -> slice | Tensor:
    """What takes the indices of ``span`` out of a dim: a view where it can."""
    first, last, indices = span
    return torch.tensor(indices, device=device) if indices else slice(first, last)


@algebra.constant
def spans(
    mesh: DeviceMesh | None, placements: tuple[Placement, ...], split: str, shape: tuple[int, int]
) -> tuple[tuple[Span, Span, Span], ...]:
    """Of each matrix: its rows in the parameter, where in the local shard those held here lie, and which they are.

    Args:
        mesh: None for a plain tensor.
        placements: of a stack ``[N, height, n]``.
        split: into blocks of rows, or of columns of what the stack is the transpose of; as text, since older Dynamos
            hand on no object of a class of ours.
        shape: ``(height, n)``.
    """
    place = {row: position for position, row in enumerate(_held(mesh, placements, shape[0]))}
    found = []
    for rows in _matrices(split, shape[0]):
        own = [index for index, row in enumerate(rows) if row in place]
        found.append((_span(rows), _span([place[rows[index]] for index in own]), _span(own)))
    return tuple(found)


@algebra.constant
def rows_here(
    mesh: DeviceMesh,
    placements: tuple[Placement, ...],
    split: str,
    shape: tuple[int, int],
    which: tuple[int, ...],
) -> tuple[tuple[tuple[int, ...], int, Span], ...]:
    """The matrices that have rows here, those with as many together, in an order that depends on the rows alone.

    Args:
        mesh, placements, split, shape: as in :func:`spans`.
        which: numbers of matrices; others are left out.

    Returns:
        The places of some matrices in ``which``, how many rows each of them has here, and where these lie in the local
        shard.
    """
    place = {row: position for position, row in enumerate(_held(mesh, placements, shape[0]))}
    every = _matrices(split, shape[0])
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for number, matrix in enumerate(which):
        here = [place[row] for row in every[matrix] if row in place]
        if here:
            matrices, rows = groups.setdefault(len(here), ([], []))
            matrices.append(number)
            rows.extend(here)
    return tuple((tuple(matrices), height, _span(rows)) for height, (matrices, rows) in groups.items())


@with_real_tensors()
def _matrices(split: str, height: int) -> list[list[int]]:
    """The rows of each matrix."""
    parsed = parse_split(split)
    assert parsed is not None
    _, of_rows = by_rows(parsed)
    numbered = of_rows.split(torch.arange(height, device="cpu").view(1, -1, 1))
    return [matrix.tolist() for piece in numbered for matrix in piece.flatten(1).unbind()]


def _held(mesh: DeviceMesh | None, placements: tuple[Placement, ...], height: int) -> list[int]:
    """The rows in the order in which the local shard has them."""
    if mesh is None:
        return list(range(height))
    axes, here = algebra.axes_sharding(placements, 1), mesh.get_coordinate()
    assert here is not None
    sizes = tuple(mesh.size(axis) for axis in axes)
    every = owners(height, sizes, tuple(placements[axis] for axis in axes))
    return every[tuple(here[axis] for axis in axes)]


def _span(indices: list[int]) -> Span:
    if not indices:
        return 0, 0, ()
    first, last = indices[0], indices[-1] + 1
    return (first, last, ()) if indices == list(range(first, last)) else (0, 0, tuple(indices))
