"""The vocabulary of layouts: how a tensor lies in storage, and how a stack lies while it is computed on.

Words: an *axis* belongs to a ``DeviceMesh``, a *dim* to a tensor.  Everything here is data; nothing communicates.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dion_dtensor.fake import with_real_tensors

__all__ = [
    "StorageLayout",
    "compute_placements",
    "contiguous_stride",
    "inner_first",
    "joined",
    "move_shard",
    "owners",
    "shard_dim",
    "shares",
    "sharing_axes",
]


def shard_dim(placement: Placement) -> int | None:
    """The tensor dim that ``placement`` shards, or None.

    ``placement.is_shard()`` is False for ``_StridedShard`` (FSDP2 over tensor parallel), so the type is asked.
    """
    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def move_shard(placement: Placement, dim: int) -> Placement:
    """The same way of sharding, on another dim."""
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)


@dataclass(frozen=True)
class StorageLayout:
    """How a tensor lies on its devices.

    Attributes:
        shape: global shape.
        dtype: element type.
        device: device of the local shard.
        mesh: the mesh of a DTensor, None for a plain tensor.
        placements: one per mesh axis, empty for a plain tensor.
        apart: axes whose ranks hold different logical matrices (experts); ``placements`` say Replicate there.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    apart: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor, replicate_mesh: DeviceMesh | None = None) -> StorageLayout:
        """The layout of ``tensor``, a plain tensor or a DTensor of any placements.

        Args:
            tensor: what is laid out.
            replicate_mesh: further axes, unknown to ``tensor``, whose ranks hold the same; they come first.

        Raises:
            ValueError: ``replicate_mesh`` and the mesh of ``tensor`` are not named axes of one root mesh.
        """
        shape = tuple(tensor.shape)
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        placements = tuple(tensor.placements) if isinstance(tensor, DTensor) else ()
        if replicate_mesh is not None:
            mesh = replicate_mesh if mesh is None else joined(replicate_mesh, mesh)
            placements = (Replicate(),) * replicate_mesh.ndim + placements
        return cls(shape, tensor.dtype, tensor.device, mesh, placements)

    def describe(self) -> str:
        """For messages and the audit: shape, dtype and ``axis=placement`` for each mesh axis."""
        text = f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"
        if self.mesh is None:
            return f"{text} on one device"
        names = self.mesh.mesh_dim_names or tuple(str(axis) for axis in range(self.mesh.ndim))
        parts = (
            f"{name}({self.mesh.size(axis)})={placement}"
            for axis, (name, placement) in enumerate(zip(names, self.placements, strict=True))
        )
        return f"{text} on {', '.join(parts)}"

    def stacked(self, count: int) -> StorageLayout:
        """The layout of a stack, along a new leading dim, of which each rank holds ``count`` such tensors."""
        placements = [
            placement if (dim := shard_dim(placement)) is None else move_shard(placement, dim + 1)
            for placement in self.placements
        ]
        for axis in self.apart:
            assert self.mesh is not None
            placements[axis] = Shard(0)
            count *= self.mesh.size(axis)
        return replace(self, shape=(count, *self.shape), placements=tuple(placements), apart=())

    def derived(
        self,
        dims: Sequence[str | None],
        sizes: Sequence[int],
        dtype: torch.dtype,
        own_dims: Sequence[str] | None = None,
    ) -> StorageLayout:
        """The layout of a state of a tensor whose dims are ``own_dims`` (rows, then columns), and the state's ``dims``.

        A mesh axis that shards rows shards the state's "row" dim in the same way, likewise "column".  Where the
        state lacks that dim, the axis shards its "rank" dim, so that no rank holds more than its share, or
        replicates the state when there is none.
        """
        own = own_dims or ("row", *["column"] * (len(self.shape) - 1))

        def placed(placement: Placement) -> Placement:
            dim = shard_dim(placement)
            if dim is None:
                return placement
            name = own[dim]
            if name not in dims:
                name = "rank"
            return move_shard(placement, dims.index(name)) if name in dims else Replicate()

        return replace(self, shape=tuple(sizes), dtype=dtype, placements=tuple(map(placed, self.placements)))

    def largest_shard(self) -> int:
        """Elements of the largest shard of any rank, the same on all ranks."""
        most = 1
        for dim, size in enumerate(self.shape):
            axes = self.axes_sharding(dim)
            sizes = tuple(self.mesh.size(axis) for axis in axes) if self.mesh is not None else ()
            most *= _most_held(size, sizes, tuple(self.placements[axis] for axis in axes))
        return most

    def axes_sharding(self, dim: int) -> tuple[int, ...]:
        """The mesh axes that shard ``dim``."""
        return tuple(axis for axis, placement in enumerate(self.placements) if shard_dim(placement) == dim)

    def partial(self, axes: Sequence[int]) -> StorageLayout:
        """The same, with values still to be averaged over ``axes``."""
        placements = tuple(Partial("avg") if axis in axes else p for axis, p in enumerate(self.placements))
        return replace(self, placements=placements)

    def reduced(self) -> StorageLayout:
        """The same, with every value averaged."""
        placements = tuple(Replicate() if isinstance(p, Partial) else p for p in self.placements)
        return replace(self, placements=placements)

    def wrap(self, local: Tensor) -> Tensor:
        """The tensor of this layout whose local shard is ``local`` (no copy, no communication).

        ``local`` must be contiguous: a DTensor believes the strides it is told.
        """
        if self.mesh is None:
            return local
        stride = contiguous_stride(self.shape)
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=stride
        )


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def joined(first: DeviceMesh, second: DeviceMesh) -> DeviceMesh:
    """The mesh of the axes of two slices of one root mesh, those of ``first`` first.

    Raises:
        ValueError: axes without names, of another root mesh, or in both.
    """
    names = (first.mesh_dim_names or ()) + (second.mesh_dim_names or ())
    if both := sorted(set(first.mesh_dim_names or ()) & set(second.mesh_dim_names or ())):
        raise ValueError(
            f"replicate_mesh {first} has the axis {both[0]!r}, which the parameter's mesh {second} has too; give only "
            "axes that no parameter lies on, or None: a DTensor carries its own"
        )
    root = second._get_root_mesh()
    if len(names) != first.ndim + second.ndim or not set(names) <= set(root.mesh_dim_names or ()):
        raise ValueError(
            f"replicate_mesh {first} and the parameter's mesh {second} must be slices, by name, of one root mesh, "
            "such as mesh['replicate'] and mesh['shard'] of one mesh with the axes 'replicate' and 'shard'"
        )
    return root[names]


@functools.cache
@with_real_tensors()
def owners(
    size: int, sizes: tuple[int, ...], placements: tuple[Placement, ...]
) -> dict[tuple[int, ...], list[int]]:
    """Which indices of a dim of ``size`` each rank holds.

    Args:
        size: of the dim.
        sizes: of the mesh axes that shard it, in the order of the mesh.
        placements: on those axes.

    Returns:
        By coordinates on those axes, the indices in the order in which the local shard has them.
    """
    order, runs = _outer_first(sizes, placements)
    held: dict[tuple[int, ...], Tensor] = {(): torch.arange(size, device="cpu")}
    for axis in order:
        way: Any = Shard(0) if runs[axis] == 1 else _StridedShard(0, split_factor=runs[axis])
        split = {}
        for place, indices in held.items():
            parts, _ = way._split_tensor(indices, sizes[axis], with_padding=False, contiguous=False)
            split.update({(*place, rank): part for rank, part in enumerate(parts)})
        held = split
    return {
        tuple(place[order.index(axis)] for axis in range(len(sizes))): indices.tolist()
        for place, indices in held.items()
    }


def _most_held(size: int, sizes: tuple[int, ...], placements: tuple[Placement, ...]) -> int:
    """The most indices of a dim that a rank holds; mostly without a list of them, which embeddings make long."""
    order, runs = _outer_first(sizes, placements)
    if any(many > 1 for many in runs.values()):
        return max(map(len, owners(size, sizes, placements).values()))
    for axis in order:
        size = -(-size // sizes[axis])
    return size


def inner_first(sizes: Sequence[int], placements: Sequence[Placement]) -> tuple[int, ...]:
    """The axes that shard a tensor, of each dim the one that cuts the smallest pieces first.

    Args:
        sizes: of all axes of the mesh.
        placements: on them.
    """
    dims: dict[int, list[int]] = {}
    for axis, placement in enumerate(placements):
        if (dim := shard_dim(placement)) is not None:
            dims.setdefault(dim, []).append(axis)
    left = []
    for axes in dims.values():
        order, _ = _outer_first([sizes[axis] for axis in axes], [placements[axis] for axis in axes])
        left.append([axes[place] for place in order])

    def turn(axes: list[int]) -> tuple[bool, int]:
        plain = type(placements[axes[-1]]) is Shard
        return plain, -axes[-1] if plain else axes[-1]

    found = []
    while left := [axes for axes in left if axes]:
        found.append(min(left, key=turn).pop())
    return tuple(found)


def _outer_first(sizes: Sequence[int], placements: Sequence[Placement]) -> tuple[list[int], dict[int, int]]:
    """The axes that shard one dim in the order in which they cut it, and into how many runs each of them does.

    From left to right, but a strided shard cuts what later axes left, as many as make its ``split_factor`` ranks.  Its
    own way of cutting, by runs, says the same where shards are even; where there are no such axes it is the only one.
    """
    order: list[int] = []
    runs = {}
    for axis in reversed(range(len(sizes))):
        place, ranks = 0, 1
        factor = getattr(placements[axis], "split_factor", 1)
        while place < len(order) and ranks < factor:
            ranks *= sizes[order[place]]
            place += 1
        runs[axis] = max(1, factor // ranks)
        order.insert(place, axis)
    return order, runs


def compute_placements(
    mesh: DeviceMesh, placements: Sequence[Placement], count: int
) -> tuple[tuple[Placement, ...], int]:
    """Where the ranks work on ``count`` whole matrices of a stack: ``(placements, ranks that share the work)``.

    An axis that shards the stack's own dim stays as it is: its ranks hold different matrices already.

    See :func:`sharing_axes`; along the other axes every rank assembles (or keeps) the matrices and repeats the work.  A
    pure function of the mesh, the placements and ``count``: all ranks decide alike.
    """
    # Sharded axes first: they must communicate anyway, and splitting the stack spares them the larger all-gather.
    axes = sorted(
        (axis for axis in range(mesh.ndim) if shard_dim(placements[axis]) != 0),
        key=lambda axis: isinstance(placements[axis], Replicate),
    )
    split, ranks = sharing_axes(mesh, placements, axes, count)
    return tuple(Shard(0) if axis in split else Replicate() for axis in range(mesh.ndim)), ranks


def sharing_axes(
    mesh: DeviceMesh, placements: Sequence[Placement], axes: Sequence[int], count: int
) -> tuple[tuple[int, ...], int]:
    """Those of ``axes`` whose ranks share ``count`` matrices, and how many ranks that makes.

    The ranks of an axis that shards matrices always do if there are two: shards travel in any case, and to one rank
    fewer bytes than to all.  Of copies and sums, whose way back (or there) is a collective of equal blocks, only as
    long as padding at most doubles them.
    """
    split, ranks = [], 1
    for axis in axes:
        size, remaining = mesh.size(axis), -(-count // ranks)
        travels = shard_dim(placements[axis]) is not None
        if remaining > 1 and (travels or -(-remaining // size) * size <= 2 * remaining):
            split.append(axis)
            ranks *= size
    return tuple(split), ranks


def shares(count: int, ranks: int) -> list[int]:
    """How many of ``count`` matrices each of some ranks works on; as DTensor cuts a dim."""
    block = -(-count // ranks)
    return [min(max(count - rank * block, 0), block) for rank in range(ranks)]


def has_partial(placements: Sequence[Placement]) -> bool:
    """Whether some axis still has to be reduced."""
    return any(isinstance(placement, Partial) for placement in placements)
