"""The vocabulary of layouts: how a tensor lies in storage, and how a stack lies while it is computed on.

Words: an *axis* belongs to a ``DeviceMesh``, a *dim* to a tensor.  Everything here is data; nothing communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

__all__ = ["StorageLayout", "compute_placements", "move_shard", "shard_dim"]


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
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> StorageLayout:
        """The layout of ``tensor``, a plain tensor or a DTensor of any placements."""
        shape = tuple(tensor.shape)
        if isinstance(tensor, DTensor):
            return cls(shape, tensor.dtype, tensor.device, tensor.device_mesh, tuple(tensor.placements))
        return cls(shape, tensor.dtype, tensor.device)

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
        """The layout of ``count`` such tensors stacked along a new leading dim."""
        placements = tuple(
            placement if (dim := shard_dim(placement)) is None else move_shard(placement, dim + 1)
            for placement in self.placements
        )
        return replace(self, shape=(count, *self.shape), placements=placements)

    def derived(self, dims: Sequence[str | None], sizes: Sequence[int], dtype: torch.dtype) -> StorageLayout:
        """The layout of a state of a matrix ``[row, column]`` whose dims are named in ``dims``.

        A mesh axis that shards rows shards the state's "row" dim in the same way, likewise "column".  Where the
        state lacks that dim, the axis shards its "rank" dim, so that no rank holds more than its share, or
        replicates the state when there is none.
        """

        def placed(placement: Placement) -> Placement:
            dim = shard_dim(placement)
            if dim is None:
                return placement
            name = ("row", "column")[dim]
            if name in dims:
                return move_shard(placement, dims.index(name))
            return Shard(dims.index("rank")) if "rank" in dims else Replicate()

        return replace(self, shape=tuple(sizes), dtype=dtype, placements=tuple(map(placed, self.placements)))

    def wrap(self, local: Tensor) -> Tensor:
        """The tensor of this layout whose local shard is ``local`` (no copy, no communication).

        ``local`` must be contiguous: a DTensor believes the strides it is told.
        """
        if self.mesh is None:
            return local
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=stride
        )


def compute_placements(
    mesh: DeviceMesh, placements: Sequence[Placement], count: int
) -> tuple[tuple[Placement, ...], int]:
    """Where the ranks work on ``count`` whole matrices of a stack: ``(placements, ranks that share the work)``.

    An axis splits the stack as long as padding the stack at most doubles it; a longer axis would move and compute
    more zeros than matrices, so there every rank assembles (or keeps) the matrices and repeats the work.  A pure
    function of the mesh, the placements and ``count``: all ranks decide alike.
    """
    chosen: list[Placement] = [Replicate()] * mesh.ndim
    remaining, ranks = count, 1
    # Sharded axes first: they must communicate anyway, and splitting the stack spares them the larger all-gather.
    for axis in sorted(range(mesh.ndim), key=lambda axis: isinstance(placements[axis], Replicate)):
        size = mesh.size(axis)
        if remaining > 1 and -(-remaining // size) * size <= 2 * remaining:
            chosen[axis] = Shard(0)
            remaining = -(-remaining // size)
            ranks *= size
    return tuple(chosen), ranks


def has_partial(placements: Sequence[Placement]) -> bool:
    """Whether some axis still has to be reduced."""
    return any(isinstance(placement, Partial) for placement in placements)
