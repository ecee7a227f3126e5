"""Every matrix of a stack whole on some rank, and back: what most rules ask for.

Where there is much to send, the matrices go in two turns, so that the second is on its way while the first is worked
on, and the first on its way back while the second is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from dion_dtensor import placements as algebra
from dion_dtensor.alltoall import exchanges, start_exchange
from dion_dtensor.assembly import from_local
from dion_dtensor.layout import compute_placements, shard_dim, shares
from dion_dtensor.placements import constant

__all__ = ["in_turns", "on_whole_matrices"]

OVERLAP_BYTES = 32 << 20
"""Of what a rank sends, from which on two turns hide more than their shorter messages and batches cost."""

Move = tuple[int, tuple[Placement, ...], tuple[Placement, ...], tuple[int, ...]]
"""Axis, placements before and after, and shape of the stack."""
Flying = Callable[[], Tensor]
"""Waits for a local shard."""


def on_whole_matrices(
    function: Callable[..., Any], stack: Tensor, *others: Tensor, likes: Sequence[int] | None = None
) -> Any:
    """``function(stack, *others)`` with every matrix of the stack whole on some rank.

    Args:
        function: maps a stack of whole matrices ``[k, m, n]`` (and the matching slices of ``others``) to a stack
            ``[k, m, n]``, or to a tuple of which each stack has the shape of the argument in its place (see
            ``likes``), each matrix by itself; it sees plain tensors and any ``k``, also none where there are fewer
            matrices than ranks, and may be called more than once.
        stack: ``[N, m, n]``, a tensor or a DTensor of any placements; an axis may be ``Partial``, and one that shards
            the stack's own dim holds different matrices, which stay where they are.
        others: further stacks ``[N, ...]`` on the same mesh.
        likes: for each result the argument whose shape it has; None for the arguments in order.

    Returns:
        A stack, or a tuple of stacks, each in the dtype that ``function`` returns, and placed as the argument that it
        is like (``Partial`` becomes ``Replicate``).
    """
    if not isinstance(stack, DTensor):
        return function(stack, *others)
    mesh, arguments = stack.device_mesh, (stack, *others)
    count = stack.to_local().shape[0]
    target, ranks = compute_placements(mesh, stack.placements, count)
    # One order for all, since it says which rank works on which matrix.
    order = algebra.order_of_moves(algebra.of_apart(stack.placements), target, mesh)
    stays = not algebra.moves(algebra.of_apart(stack.placements), target, order)
    turns = [count] if stays else in_turns(stack, stack.shape[1], ranks, count)

    def away(tensor: Tensor) -> list[Flying]:
        assert isinstance(tensor, DTensor)
        locals_ = torch.split(tensor.to_local(), turns)
        ways = [_way(tensor, target, order, size) for size in turns]
        return _sent([_here(local) for local in locals_], mesh, ways)

    def way_back(index: int, size: int) -> list[Move]:
        way = _way(arguments[index], target, order, size, reduced=True)
        return [(axis, after, before, shape) for axis, before, after, shape in reversed(way)]

    arriving = [away(tensor) for tensor in arguments]
    alone, results, ways = False, [], []
    for size in turns:  # taken off the lists, so that nothing is kept longer than it is needed
        # Contiguous, so that sums run in the same order whatever the collective left behind.
        made = function(*(one.pop(0)().contiguous() for one in arriving))
        alone = isinstance(made, Tensor)
        left = [made] if alone else list(made)
        del made
        shown = list(range(len(left)) if likes is None else likes)
        ways.append([way_back(index, size) for index in shown])
        results.append([_sent([_here(left.pop(0))], mesh, [way[:1]])[0] for way in ways[-1]])
    whole = []
    for place, index in enumerate(shown):
        flying = _sent([one.pop(0) for one in results], mesh, [one[place][1:] for one in ways])
        parts = [arrived() for arrived in flying]
        local = parts[0] if len(parts) == 1 else torch.cat(parts)
        like = arguments[index]
        assert isinstance(like, DTensor)
        placements = algebra.of_reduced(like.placements)
        whole.append(from_local(local, mesh, placements, tuple(like.shape)))
    return whole[0] if alone else tuple(whole)


def in_turns(stack: DTensor, rows: int, ranks: int, count: int) -> list[int]:
    """How many matrices go together, the same on every rank; ``ranks`` divides all but the last number.

    Args:
        stack: ``[N, m, n]``.
        rows: how many of each matrix travel.
        ranks: among which the matrices are shared.
        count: matrices.
    """
    # Not of the local shard, since shards may be uneven.
    size = stack.numel() * rows // max(stack.shape[1], 1) * stack.element_size()
    for axis, placement in enumerate(stack.placements):
        if shard_dim(placement) is not None:
            size //= stack.device_mesh.size(axis)
    share = -(-count // ranks)
    if share < 2 or size < OVERLAP_BYTES:
        return [count]
    first = (share - share // 2) * ranks
    return [first, count - first]


def _way(
    tensor: Tensor,
    target: tuple[Placement, ...],
    order: tuple[int, ...],
    size: int,
    *,
    reduced: bool = False,
) -> list[Move]:
    """How ``size`` of the matrices come to lie as ``target``; ``reduced`` as if sums had been taken."""
    assert isinstance(tensor, DTensor)
    placements = algebra.of_apart(tensor.placements)
    way: list[Move] = []
    for axis, before, after in algebra.moves(
        algebra.of_reduced(placements) if reduced else placements, target, order
    ):
        way.append((axis, before, after, (size, *tensor.shape[1:])))
        if after[axis] == Shard(0):
            size = _own_share(tensor.device_mesh, axis, size)
    return way


@constant
def _own_share(mesh: DeviceMesh, axis: int, count: int) -> int:
    """How many of ``count`` matrices this rank works on after a move along ``axis``."""
    coordinates = mesh.get_coordinate()
    assert coordinates is not None
    return shares(count, mesh.size(axis))[coordinates[axis]]


def _sent(flying: list[Flying], mesh: DeviceMesh, ways: Sequence[Sequence[Move]]) -> list[Flying]:
    """Each turn on its way, stage by stage, so that what one waits for the others have started as well."""
    for stage in range(len(ways[0])):
        flying = [_started(one, mesh, *way[stage]) for one, way in zip(flying, ways, strict=True)]
    return flying


def _started(
    before: Flying,
    mesh: DeviceMesh,
    axis: int,
    old: tuple[Placement, ...],
    new: tuple[Placement, ...],
    shape: tuple[int, ...],
) -> Flying:
    """Wait for ``before`` and start a move."""
    if mesh.size(axis) == 1:
        return before
    local = before()
    if exchanges(axis, old, new):
        return start_exchange(local, mesh, axis, old, new, shape)
    return _here(from_local(local, mesh, old, shape).redistribute(placements=new).to_local())


def _here(local: Tensor) -> Flying:
    return lambda: local
