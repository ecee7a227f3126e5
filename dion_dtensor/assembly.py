"""Verbs on stacks ``[N, m, n]`` that mean the same on every mesh.

On plain tensors each verb is the obvious local operation.  On DTensors it redistributes, so the collective (all-to-all,
all-gather, reduce-scatter, all-reduce, or nothing) follows from the placements, eagerly and under
``torch.compile(fullgraph=True)``.  What needs no communication runs on the local shards, and the placements of the
result are worked out here: DTensor's own search for them takes seconds an operation on meshes of three and more axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from dion_dtensor import placements as algebra
from dion_dtensor.layout import StorageLayout, contiguous_stride, has_partial

__all__ = [
    "across",
    "agreed_maximum",
    "averaged",
    "by_row",
    "elementwise",
    "everywhere",
    "from_local",
    "is_pending",
    "laid_like",
    "local_of",
    "norm",
    "on_all_ranks",
    "own_shard",
    "placed",
    "product",
    "reduced",
    "scattered",
    "shards",
    "transposed",
    "whole_dim",
]


def whole_dim(tensor: Tensor, dim: int) -> Tensor:
    """``tensor`` with ``dim`` assembled on every rank (all-gather over the axes that shard it); the rest stays."""
    if not isinstance(tensor, DTensor):
        return tensor
    for placements in algebra.ways_to_whole(tensor.placements, dim % tensor.ndim, tensor.device_mesh):
        tensor = tensor.redistribute(placements=placements)
    return tensor


def everywhere(tensor: Tensor) -> Tensor:
    """A plain tensor of all that a DTensor has, on every rank; a plain one as it is."""
    for dim in range(tensor.ndim):
        tensor = whole_dim(tensor, dim)
    return local_of(reduced(tensor))


def reduced(tensor: Tensor) -> Tensor:
    """``tensor`` with every pending reduction done (all-reduce over its ``Partial`` axes)."""
    if not isinstance(tensor, DTensor):
        return tensor
    for placements in algebra.ways_to_reduced(tensor.placements):
        tensor = tensor.redistribute(placements=placements)
    return tensor


def averaged(local: Tensor, layout: StorageLayout, axes: Sequence[int]) -> Tensor:
    """``local``, a shard in ``layout``, averaged over the ranks of ``axes``."""
    assert layout.mesh is not None
    pending = [Partial("avg") if axis in axes else Replicate() for axis in range(layout.mesh.ndim)]
    return local_of(reduced(from_local(local, layout.mesh, pending, tuple(local.shape))))


def placed(values: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """This rank's shard of plain ``values``, which every rank holds whole (no communication)."""
    return local_of(DTensor.from_local(values, mesh, run_check=False).redistribute(placements=placements))


def own_shard(tensor: Tensor, layout: StorageLayout) -> Tensor:
    """This rank's shard of ``tensor`` in ``layout``; communicates only if ``tensor`` does not lie so yet.

    Raises:
        TypeError: a plain tensor where ``layout`` is that of a DTensor.
    """
    if layout.mesh is None:
        return tensor
    if not isinstance(tensor, DTensor):
        raise TypeError(f"a plain tensor was given where a DTensor as {layout.describe()} is needed")
    for placements in algebra.ways_to(tensor.placements, layout.placements):
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def laid_like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor``, whole on every rank in the dims that ``other`` shards beyond it, lying as ``other`` does."""
    if not isinstance(tensor, DTensor) or not isinstance(other, DTensor):
        return tensor
    return tensor.redistribute(placements=other.placements)


def scattered(values: Tensor, layout: StorageLayout) -> Tensor:
    """This rank's shard in ``layout`` of ``values``, which every rank holds whole (no communication)."""
    if layout.mesh is None:
        return values
    return placed(values, layout.mesh, layout.placements)


def elementwise(function: Callable[..., Tensor], stack: Tensor, *others: Tensor) -> Tensor:
    """``function(stack, *others)`` on each element by itself.

    Args:
        function: of tensors; it sees the local shards.
        stack: its layout is that of the result.
        others: tensors of the same layout; a dim of size one, whole on every rank, is broadcast.

    Raises:
        ValueError: another layout.
    """
    if not isinstance(stack, DTensor):
        return function(stack, *others)
    for other in others:
        if isinstance(other, DTensor):
            whole = tuple(dim for dim, size in enumerate(other.shape) if size == 1)
            if not algebra.suit(stack.placements, other.placements, whole):
                raise ValueError(f"elementwise on stacks placed {stack.placements} and {other.placements}")
    local = function(stack.to_local(), *(o.to_local() if isinstance(o, DTensor) else o for o in others))
    return from_local(local, stack.device_mesh, stack.placements, tuple(stack.shape))


def norm(stack: Tensor, dims: tuple[int, ...]) -> Tensor:
    """2-norms over whole ``dims``, which stay with size one (all-reduce over the axes that shard them).

    Summed in float64, where the squares of float32 numbers neither overflow nor vanish; returned in the dtype of
    ``stack``.
    """
    if not isinstance(stack, DTensor):
        whole: Tensor = torch.linalg.vector_norm(stack, dim=dims, keepdim=True, dtype=torch.float64)
        return whole.to(stack.dtype)
    summed = tuple(dim % stack.ndim for dim in dims)
    placements = algebra.of_pending(stack.placements, summed, "sum")
    shape = tuple(1 if dim in summed else size for dim, size in enumerate(stack.shape))
    squares = torch.linalg.vector_norm(stack.to_local(), dim=dims, keepdim=True, dtype=torch.float64).square()
    total = reduced(from_local(squares, stack.device_mesh, placements, shape))
    return elementwise(lambda values: values.sqrt().to(stack.dtype), total)


def transposed(stack: Tensor) -> Tensor:
    """``[N, n, m]`` of ``[N, m, n]``, where it lies."""
    if not isinstance(stack, DTensor):
        return stack.mT
    placements = algebra.of_transposed(stack.placements)
    shape = (stack.shape[0], stack.shape[2], stack.shape[1])
    return from_local(stack.to_local().mT, stack.device_mesh, placements, shape)


def by_row(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """``[N, k, m]`` from a function of row indices, so placed that ``product(by_row(f, X), X)`` needs no assembly.

    Args:
        function: maps the indices ``[j]`` of some of the m rows to ``[k, j]``; the same for each of the N matrices.
        stack: ``[N, m, n]``.
    """
    index = torch.arange(stack.shape[1], device=stack.device)
    if not isinstance(stack, DTensor):
        return function(index).expand(stack.shape[0], -1, -1)
    mesh = stack.device_mesh
    here = placed(index.view(1, -1, 1), mesh, algebra.of_only(stack.placements, (1,))).view(-1)
    local = function(here).expand(stack.to_local().shape[0], -1, -1)
    placements = algebra.of_transposed(algebra.of_only(stack.placements, (0, 1)))
    return from_local(local, mesh, placements, (stack.shape[0], local.shape[1], stack.shape[1]))


def is_pending(stack: Tensor) -> bool:
    """Whether some axis still has to be reduced."""
    return isinstance(stack, DTensor) and has_partial(stack.placements)


def shards(stack: Tensor, dim: int) -> bool:
    """Whether some axis shards ``dim``."""
    return isinstance(stack, DTensor) and bool(algebra.axes_sharding(stack.placements, dim))


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of stacks ``[N, m, k]`` and ``[N, k, n]`` where they lie, without communication.

    An axis that shards ``k`` of both leaves the product ``Partial`` (see :func:`reduced`); one that shards ``m`` or
    ``n`` shards the product likewise.

    Raises:
        ValueError: an axis for which neither holds; assemble one of the two first.
    """
    if not isinstance(left, DTensor) or not isinstance(right, DTensor):
        return left @ right
    placements = algebra.of_product(left.placements, right.placements)
    shape = (*left.shape[:-1], right.shape[-1])
    return from_local(left.to_local() @ right.to_local(), left.device_mesh, placements, shape)


def across(
    local: Tensor, stack: Tensor, operation: str, dims: tuple[int, ...], sizes: tuple[int, ...] = (1, 1)
) -> Tensor:
    """``local``, of ``sizes`` in ``dims`` on every rank, reduced over the axes that shard ``dims`` of ``stack``.

    Args:
        local: what each rank found in its shard of ``stack``.
        stack: a tensor or a DTensor.
        operation: "sum" or "max".
        dims: of ``stack``.
        sizes: of ``local`` in ``dims``.

    Returns:
        A plain tensor; its other dims are sharded as those of ``stack``.
    """
    if not isinstance(stack, DTensor):
        return local
    placements = algebra.of_pending(stack.placements, dims, operation)
    shape = tuple(sizes[dims.index(dim)] if dim in dims else size for dim, size in enumerate(stack.shape))
    return local_of(reduced(from_local(local, stack.device_mesh, placements, shape)))


def agreed_maximum(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """The elementwise maximum of each rank's plain ``values`` over all ranks of ``mesh``, the same on every rank."""
    for axis in range(mesh.ndim):  # one by one: torch warns of reductions over several
        pending = [Partial("max") if other == axis else Replicate() for other in range(mesh.ndim)]
        values = DTensor.from_local(values, mesh, pending, run_check=False).full_tensor()
    return values


def on_all_ranks(here: int, mesh: DeviceMesh, axes: Sequence[int]) -> int:
    """How many the ranks of ``axes`` have together, ``here`` each."""
    for axis in axes:
        here *= mesh.size(axis)
    return here


def local_of(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def from_local(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: tuple[int, ...]
) -> DTensor:
    """A DTensor of global ``shape`` from each rank's shard, which is made contiguous."""
    return DTensor.from_local(
        local.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=contiguous_stride(shape),
    )
