"""What becomes of placements: the algebra behind the verbs of ``assembly``.  Nothing here communicates.

Each function is a constant under ``torch.compile``: placements are fixed when a bucket is compiled, and Dynamo cannot
look into a ``_StridedShard``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from dion_dtensor.layout import inner_first, move_shard, shard_dim

__all__ = [
    "axes_holding_copies",
    "axes_sharding",
    "moves",
    "of_apart",
    "of_exchanged",
    "of_only",
    "of_pending",
    "of_product",
    "of_reduced",
    "of_transposed",
    "order_of_moves",
    "suit",
    "ways_to",
    "ways_to_reduced",
    "ways_to_whole",
]

Placements = tuple[Placement, ...]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def constant(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let Dynamo call ``function`` when it traces, and take the result as it is."""
    marked: Callable[Arguments, Result] = torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return marked


@constant
def suit(placements: Placements, others: Placements, whole: tuple[int, ...]) -> bool:
    """Whether a tensor may be combined with another elementwise, whose dims ``whole`` have size one.

    An average that is still pending is linear: the same value may be added on each of its ranks.
    """
    return all(
        ours == theirs
        or (isinstance(theirs, Replicate) and (shard_dim(ours) in whole or ours == Partial("avg")))
        for ours, theirs in zip(placements, others, strict=True)
    )


@constant
def of_reduced(placements: Placements) -> Placements:
    """``Partial`` reduced to ``Replicate``."""
    return tuple(Replicate() if isinstance(p, Partial) else p for p in placements)


@constant
def ways_to_reduced(placements: Placements) -> tuple[Placements, ...]:
    """What comes after each of the reductions, one axis after the other; of several at once torch warns."""
    pending = [axis for axis, p in enumerate(placements) if isinstance(p, Partial)]
    return tuple(
        tuple(Replicate() if axis in pending[:count] else p for axis, p in enumerate(placements))
        for count in range(1, len(pending) + 1)
    )


@constant
def ways_to(placements: Placements, target: Placements) -> tuple[Placements, ...]:
    """What comes after each of the redistributions to ``target``: those sums that every rank is to hold one by one."""
    found, current = [], list(placements)
    for axis, (own, other) in enumerate(zip(placements, target, strict=True)):
        if isinstance(own, Partial) and isinstance(other, Replicate):
            current[axis] = other
            found.append(tuple(current))
    return tuple(found) if tuple(current) == target else (*found, target)


@constant
def of_apart(placements: Placements) -> Placements:
    """Axes whose ranks hold different matrices left alone, as if they held the same."""
    return tuple(Replicate() if shard_dim(p) == 0 else p for p in placements)


@constant
def axes_sharding(placements: Placements, dim: int) -> tuple[int, ...]:
    """The axes that shard ``dim``."""
    return tuple(axis for axis, p in enumerate(placements) if shard_dim(p) == dim)


@constant
def axes_holding_copies(placements: Placements) -> tuple[int, ...]:
    """The axes whose ranks hold the same."""
    return tuple(axis for axis, p in enumerate(placements) if isinstance(p, Replicate))


@constant
def of_only(placements: Placements, dims: tuple[int, ...]) -> Placements:
    """The shards of ``dims`` alone, the rest on every rank."""
    return tuple(p if shard_dim(p) in dims else Replicate() for p in placements)


@constant
def of_exchanged(placements: Placements, split: tuple[int, ...]) -> Placements:
    """Rows gone to the ranks that work on them: the axes ``split`` share the stack, no other shards rows."""
    return tuple(
        Shard(0) if axis in split else Replicate() if shard_dim(p) == 1 else p
        for axis, p in enumerate(placements)
    )


def _inner_first(placements: Placements, mesh: DeviceMesh) -> list[int]:
    return list(inner_first([mesh.size(axis) for axis in range(mesh.ndim)], placements))


@constant
def ways_to_whole(placements: Placements, dim: int, mesh: DeviceMesh) -> tuple[Placements, ...]:
    """What comes after each of the redistributions that assemble ``dim``, the inner axis first.

    One after the other: where a mesh has been flattened, torch makes one gather of those over its axes, and takes
    uneven shards for shards of the flat mesh (seen with 2.14); where it has not, torch warns of several gathers.
    """
    current, found = list(placements), []
    for axis in [axis for axis in _inner_first(placements, mesh) if shard_dim(placements[axis]) == dim]:
        current[axis] = Replicate()
        found.append(tuple(current))
    return tuple(found)


@constant
def of_pending(placements: Placements, dims: tuple[int, ...], operation: str) -> Placements:
    """What each shard holds of a reduction over ``dims``.

    A reduction of values whose average is pending becomes the average of the reductions.
    """
    return tuple(Partial(operation) if shard_dim(p) in dims else p for p in placements)


@constant
def order_of_moves(placements: Placements, target: Placements, mesh: DeviceMesh) -> tuple[int, ...]:
    """The axes in the order in which to change them one by one from ``placements`` to ``target``, least bytes first.

    A redistribution of several axes at once may gather what an exchange on each axis would do.  First the axes that
    hold copies and then the sums that are shared out, since they leave each rank less to send; then the shards,
    the inner one of a dim first, exchanges before gathers; at last the sums that every rank is to hold.
    """

    def rank(axis: int) -> tuple[int, int]:
        if isinstance(placements[axis], Replicate):
            return 0, axis
        return (1 if isinstance(target[axis], Shard) else 2), axis

    order = [axis for axis in range(len(placements)) if shard_dim(placements[axis]) is None]
    order.sort(key=rank)
    shared = [axis for axis in order if rank(axis)[0] < 2]
    left = _inner_first(placements, mesh)
    moved = []
    while left:
        heads = {shard_dim(placements[axis]): axis for axis in reversed(left)}.values()
        head = min(heads, key=lambda axis: (not isinstance(target[axis], Shard), left.index(axis)))
        moved.append(head)
        left.remove(head)
    return (*shared, *moved, *order[len(shared) :])


@constant
def moves(
    placements: Placements, target: Placements, order: tuple[int, ...]
) -> tuple[tuple[int, Placements, Placements], ...]:
    """``(axis, before, after)`` of each redistribution of one axis; the axes done are seen as holding copies."""
    current, result = list(placements), []
    for axis in order:
        after = [*current[:axis], target[axis], *current[axis + 1 :]]
        if current != after:
            result.append((axis, tuple(current), tuple(after)))
        current[axis] = Replicate()
    return tuple(result)


@constant
def of_transposed(placements: Placements) -> Placements:
    """A stack ``[N, m, n]`` seen as ``[N, n, m]``."""
    return tuple(move_shard(p, 3 - dim) if (dim := shard_dim(p)) else p for p in placements)


@constant
def of_product(left: Placements, right: Placements) -> Placements:
    """The product of stacks ``[N, m, k]`` and ``[N, k, n]``, shard by shard.

    Raises:
        ValueError: an axis on which the shards do not meet.
    """
    return tuple(_of_product(a, b) for a, b in zip(left, right, strict=True))


def _of_product(left: Placement, right: Placement) -> Placement:
    if shard_dim(left) == 2 and right == move_shard(left, 1):
        return Partial("sum")
    if shard_dim(left) == 0 and left == right:
        return left
    if isinstance(right, Replicate) and (shard_dim(left) == 1 or isinstance(left, Partial | Replicate)):
        return left
    if isinstance(left, Replicate) and shard_dim(right) == 2:
        return right
    raise ValueError(
        f"a product of stacks placed {left} and {right} on one axis needs one of them assembled first"
    )
