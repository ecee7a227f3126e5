"""The words of the planner, and what the verbs of ``assembly`` send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

__all__ = [
    "FEW_WEIGHTS",
    "PARTIAL",
    "Bucket",
    "Cost",
    "Transfer",
    "assembly",
    "collective",
    "sharing",
    "total",
]

PARTIAL = -1
"""In place of a sharded dim: the axis holds terms of a sum."""

FEW_WEIGHTS = 4
"""So many weights of a bucket at most are changed by its compiled update itself, on a CPU: it has a loop for each."""

Shards = Sequence[int | None]


@dataclass(frozen=True)
class Bucket:
    """``count`` logical matrices ``[m, n]`` on a mesh.

    Attributes:
        shape: m and n.
        count: how many are stepped together.
        sizes: of the mesh axes.
        shards: for each axis the dim that it shards (0 rows, 1 columns), or None where it replicates.
        compute_dtype: of the polynomial and of what is assembled for it.
        state_dtype: of parameters, gradients and momentum.
        order: the axes that shard, of each dim the one first that cuts the smallest pieces; () for the last axis first,
            as it is where no shard is strided (FSDP2's beside tensor parallelism are).
        symmetric: share of the multiplications that a symmetric product takes; 1 for all, 5/8 in four blocks.
        device: kind of it; what there is outside of the update differs.
    """

    shape: tuple[int, int]
    count: int = 1
    sizes: tuple[int, ...] = ()
    shards: tuple[int | None, ...] = ()
    compute_dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32
    symmetric: float = 1.0
    order: tuple[int, ...] = ()
    device: str = "cuda"

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.shards):
            raise ValueError(
                f"{len(self.sizes)} axes {self.sizes}, but shards={self.shards}; give one an axis"
            )
        if any(shard not in (None, 0, 1) for shard in self.shards):
            raise ValueError(f"shards={self.shards} must be 0 (rows), 1 (columns) or None for each axis")

    def local(self, dim: int, size: int | None = None) -> int:
        """What the fullest rank holds of ``size`` (the own size by default) along ``dim``."""
        held = self.shape[dim] if size is None else size
        for axis_size, shard in zip(self.sizes, self.shards, strict=True):
            if shard == dim:
                held = -(-held // axis_size)
        return held

    def inner_first(self, dim: int) -> tuple[int, ...]:
        """The axes that shard ``dim``, the one that cuts the smallest pieces first."""
        return tuple(_inner_first(self.axes(dim), self.order))

    def axes(self, dim: int | None) -> tuple[int, ...]:
        """The axes that shard ``dim``; for None, those that replicate."""
        return tuple(axis for axis, shard in enumerate(self.shards) if shard == dim)


@dataclass(frozen=True)
class Transfer:
    """Bytes that a rank sends by one collective on one axis, by the ring's count; or receives, where that is more.

    Of x bytes on a rank, A ranks: all-gather (A - 1) x, reduce-scatter and all-to-all (A - 1)/A x, all-reduce twice
    that.
    """

    axis: int
    collective: str
    bytes: float


@dataclass(frozen=True)
class Cost:
    """Of one bucket on the fullest rank.

    Attributes:
        flops: of matrix products and factorizations, by name of the dtype.
        transfers: one a collective.
        memory: peak of what exists during the step alone, in bytes.
        touched: bytes that elementwise passes read and write in memory.
    """

    flops: dict[str, float] = field(default_factory=dict)
    transfers: tuple[Transfer, ...] = ()
    memory: float = 0.0
    touched: float = 0.0

    def bytes(self, axis: int | None = None) -> float:
        """Sent on ``axis``, or on all."""
        return sum(one.bytes for one in self.transfers if axis in (None, one.axis))


def total(costs: Iterable[Cost]) -> Cost:
    """Of buckets that are stepped one after the other."""
    flops: dict[str, float] = {}
    transfers: list[Transfer] = []
    memory = touched = 0.0
    for cost in costs:
        for dtype, count in cost.flops.items():
            flops[dtype] = flops.get(dtype, 0.0) + count
        transfers.extend(cost.transfers)
        memory = max(memory, cost.memory)
        touched += cost.touched
    return Cost(flops, tuple(transfers), memory, touched)


def collective(name: str, axis: int, size: int, local_bytes: float) -> Transfer:
    """One collective of ``size`` ranks that each hold ``local_bytes`` before it."""
    factor = {
        "all_gather": size - 1.0,
        "all_to_all": (size - 1) / size,
        "reduce_scatter": (size - 1) / size,
        "all_reduce": 2 * (size - 1) / size,
    }[name]
    return Transfer(axis, name, factor * local_bytes)


def sharing(sizes: Sequence[int], shards: Shards, count: int) -> tuple[tuple[int, ...], int]:
    """The axes whose ranks share ``count`` matrices, and the most matrices of a rank.

    As ``layout.sharing_axes``, sharded axes first.
    """
    split: list[int] = []
    remaining = count
    for axis in sorted(range(len(sizes)), key=lambda axis: shards[axis] is None):
        share = -(-remaining // sizes[axis])
        if remaining > 1 and (shards[axis] in (0, 1) or share * sizes[axis] <= 2 * remaining):
            split.append(axis)
            remaining = share
    return tuple(sorted(split)), remaining


def assembly(
    rows: int,
    columns: int,
    count: int,
    sizes: Sequence[int],
    shards: Shards,
    into: int,
    back: int,
    order: Sequence[int] = (),
    like: Shards | None = None,
) -> tuple[list[Transfer], int]:
    """What ``on_whole_matrices`` sends for ``count`` matrices, and how many of them a rank works on.

    One axis after the other.  Where the ranks share the matrices: all-to-all, reduce-scatter where Partial, nothing
    where replicated; else all-gather or all-reduce.  The result goes back the other way.  For FSDP on A ranks that
    makes twice (A - 1)/A of the local shard, as in microsoft/dion (README, "all-to-all").

    Args:
        rows, columns: of a matrix.
        count: how many.
        sizes: of the axes.
        shards: 0, 1, None or PARTIAL for each axis.
        into: bytes of an element on the way in.
        back: on the way back.
        order: as in :class:`Bucket`.
        like: shards of the matrices that these go along with; None where they go alone.
    """
    split, own = sharing(sizes, like or shards, count)
    each = 1.0  # elements of a matrix that a rank has
    for dim, size in ((0, rows), (1, columns)):
        local = size
        for axis, shard in enumerate(shards):
            if shard == dim:
                local = -(-local // sizes[axis])
        each *= local
    sent: list[Transfer] = []
    way_back: list[Transfer] = []
    for axis in _moves(like or shards, split, order):
        A, shard, shared, held = sizes[axis], shards[axis], axis in split, count
        if shared:  # the rank that works on most receives as much as this
            count = -(-count // A)
            held = count * A
        if shard == PARTIAL:
            sent.append(collective("reduce_scatter" if shared else "all_reduce", axis, A, held * each * into))
        if shard == PARTIAL or shard is None:
            if shared:
                way_back.append(collective("all_gather", axis, A, count * each * back))
            continue
        sent.append(collective("all_to_all" if shared else "all_gather", axis, A, held * each * into))
        if shared:
            way_back.append(collective("all_to_all", axis, A, held * each * back))
        each *= A
    return [*sent, *reversed(way_back)], own


def _inner_first(axes: Iterable[int], order: Sequence[int]) -> list[int]:
    return sorted(axes, key=lambda axis: (order.index(axis) if axis in order else len(order), -axis))


def _moves(shards: Shards, split: Sequence[int], order: Sequence[int]) -> list[int]:
    """As ``placements.order_of_moves``."""
    copies = [axis for axis, shard in enumerate(shards) if shard is None]
    sums = [axis for axis, shard in enumerate(shards) if shard == PARTIAL]
    left = _inner_first((a for a, shard in enumerate(shards) if shard not in (None, PARTIAL)), order)
    inner_first: list[int] = []
    while left:
        heads = {shards[axis]: axis for axis in reversed(left)}.values()
        head = min(heads, key=lambda axis: (axis not in split, left.index(axis)))
        inner_first.append(head)
        left.remove(head)
    return [*copies, *(a for a in sums if a in split), *inner_first, *(a for a in sums if a not in split)]
