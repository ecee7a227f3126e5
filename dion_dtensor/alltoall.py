"""The all-to-all between shards of every matrix and whole matrices on some ranks, along one mesh axis.

DTensor's own redistribution waits for it at once, and on a CPU gathers everything instead.  Here it is started and
waited for apart, so that other work comes in between, eagerly as in compiled code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from dion_dtensor.layout import owners, shard_dim, shares
from dion_dtensor.placements import Placements, constant

__all__ = ["exchanges", "start_exchange"]

Runs = tuple[tuple[int, int], ...]
"""Of a dim from its beginning: ``(rank that holds it, length)``."""


def exchanges(axis: int, before: Placements, after: Placements) -> bool:
    """Whether going from ``before`` to ``after`` is such an all-to-all along ``axis``."""
    return _dim(axis, before, after) > 0


def start_exchange(
    local: Tensor, mesh: DeviceMesh, axis: int, before: Placements, after: Placements, shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    """Start the all-to-all, and return the function that waits for it and gives this rank's shard in ``after``.

    Args:
        local: this rank's shard in ``before``, of which either whole matrices or shards are shared along ``axis``.
        mesh: of both.
        axis: the one on which they differ.
        before, after: one shards the stack's own dim on ``axis``, the other one another dim.
        shape: of the stack; its first dim is what the ranks of ``axis`` have together, by :func:`shares`.
    """
    dim, gathers, runs, lengths, own, group = _route(mesh, axis, before, after, shape)
    ranks, count = len(lengths), shape[0]
    each = shares(count, ranks)

    def block(matrices: int, length: int) -> list[int]:
        return [matrices, *(length if index == dim else local.shape[index] for index in range(1, local.ndim))]

    shards_of = [math.prod(block(matrices, lengths[own])) for matrices in each]
    parts_of = [math.prod(block(each[own], length)) for length in lengths]
    if gathers:
        sent, counts, expected = local.contiguous().view(-1), shards_of, parts_of
    else:
        sent, counts, expected = _by_rank(local, dim, runs, ranks), parts_of, shards_of
    flying = torch.ops._c10d_functional.all_to_all_single(sent, expected, counts, group)

    def finish() -> Tensor:
        received = torch.ops._c10d_functional.wait_tensor(flying)
        if not gathers:
            stack: Tensor = received.view(block(count, lengths[own]))
            return stack
        parts = [
            part.view(block(each[own], n))
            for part, n in zip(torch.split(received, expected), lengths, strict=True)
        ]
        return _merged(parts, dim, runs)

    return finish


def _by_rank(local: Tensor, dim: int, runs: Runs, ranks: int) -> Tensor:
    """The runs of ``dim``, flat, those of the first rank first."""
    if not runs:  # another axis leaves nothing of the dim to the ranks of this one
        return local.reshape(-1)
    pieces = torch.split(local, [length for _, length in runs], dim=dim)
    flat = []
    for rank in range(ranks):
        own = [piece for piece, (holder, _) in zip(pieces, runs, strict=True) if holder == rank]
        if own:
            flat.append((own[0] if len(own) == 1 else torch.cat(own, dim=dim)).reshape(-1))
    return torch.cat(flat)


def _merged(parts: list[Tensor], dim: int, runs: Runs) -> Tensor:
    """What each rank sent, put together along ``dim``."""
    if [rank for rank, _ in runs] == [rank for rank, part in enumerate(parts) if part.shape[dim]]:
        return torch.cat(parts, dim=dim)
    left = [
        list(torch.split(part, [length for rank, length in runs if rank == one], dim=dim))
        if part.shape[dim]
        else []
        for one, part in enumerate(parts)
    ]
    return torch.cat([left[rank].pop(0) for rank, _ in runs], dim=dim)


@constant
def _dim(axis: int, before: Placements, after: Placements) -> int:
    """The dim that is sharded on one side, where the other shards the stack's own; 0 if it is no such change."""
    sides = (before[axis], after[axis])
    dims = [shard_dim(side) for side in sides if side != Shard(0)]
    return (dims[0] or 0) if len(dims) == 1 else 0


@constant
def _route(
    mesh: DeviceMesh, axis: int, before: Placements, after: Placements, shape: tuple[int, ...]
) -> tuple[int, bool, Runs, tuple[int, ...], int, str]:
    """The dim, whether it is gathered, its runs, the length that each rank has, this rank, and the group's name."""
    dim, gathers = _dim(axis, before, after), before[axis] != Shard(0)
    placements = before if gathers else after
    axes = tuple(one for one, placement in enumerate(placements) if shard_dim(placement) == dim)
    sizes = tuple(mesh.size(one) for one in axes)
    coordinates = mesh.get_coordinate()
    assert coordinates is not None
    here = tuple(coordinates[one] for one in axes)
    runs = _runs(axes.index(axis), here, sizes, tuple(placements[one] for one in axes), shape[dim])
    lengths = [0] * mesh.size(axis)
    for rank, length in runs:
        lengths[rank] += length
    return dim, gathers, runs, tuple(lengths), coordinates[axis], mesh.get_group(axis).group_name


@functools.lru_cache(maxsize=4096)
def _runs(
    place: int, here: tuple[int, ...], sizes: tuple[int, ...], placements: Placements, size: int
) -> Runs:
    """Which ranks have which runs of a dim of ``size``, among those that differ from ``here`` at ``place`` alone."""
    held = owners(size, sizes, placements)
    found: list[list[int]] = []
    for rank in range(sizes[place]):
        last = -2
        for index in held[(*here[:place], rank, *here[place + 1 :])]:
            if index == last + 1:
                found[-1][2] += 1
            else:
                found.append([index, rank, 1])
            last = index
    return tuple((rank, length) for _, rank, length in sorted(found))
