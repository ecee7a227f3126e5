"""Before a step: every rank learns whether the gradients are fit, and all raise together if they are not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dion_dtensor.assembly import agreed_maximum, own_shard
from dion_dtensor.buckets import Bucket, Member, local_of
from dion_dtensor.layout import StorageLayout, has_partial

__all__ = ["checked_gradients"]

MISSING, FINE, PARTIAL, NOT_FINITE, MISLAID, SPARSE = range(6)


def checked_gradients(
    buckets: Sequence[Bucket], validate: bool
) -> list[tuple[Bucket, list[Member], list[Tensor]]]:
    """The members of each bucket that have a gradient, with their local gradients.

    Args:
        buckets: of the optimizer.
        validate: let all ranks of all meshes agree first; otherwise the gradients are taken as they are.

    Raises:
        RuntimeError: on all ranks alike, naming each unfit gradient's parameter and what is wrong.
    """
    if validate:
        problems = _problems([member for bucket in buckets for member in bucket.members])
        if problems:
            raise RuntimeError("no parameter was changed by this step:\n" + "\n".join(problems))
    work = []
    for bucket in buckets:
        members, grads = [], []
        for member in bucket.members:
            if member.parameter.grad is not None:
                members.append(member)
                grads.append(own_shard(member.parameter.grad, member.layout))
        if members:
            work.append((bucket, members, grads))
    return work


def _problems(members: Sequence[Member]) -> list[str]:
    """What is wrong with each parameter's gradient on any rank; the same list on every rank."""
    mine = _codes(members)
    both = torch.tensor([*mine, *(-code for code in mine)])
    meshes = _meshes(members)
    # Parameters may lie on several meshes: what one of them learns is carried to the ranks of the next.
    for mesh in meshes * len(meshes):
        both = agreed_maximum(both.to(mesh.device_type), mesh)
    agreed = both.tolist()
    largest, smallest = agreed[: len(members)], [-code for code in agreed[len(members) :]]
    texts = []
    for member, own, high, low in zip(members, mine, largest, smallest, strict=True):
        where = f"  {member.name} ({member.layout.describe()}): the gradient"
        if high == SPARSE:
            texts.append(f"{where} is sparse; make it dense")
        elif high == MISLAID:
            grad = member.parameter.grad
            here = f" ({StorageLayout.of(grad).describe()})" if own == MISLAID and grad is not None else ""
            texts.append(f"{where} does not lie as its parameter does{here}; redistribute it")
        elif high == NOT_FINITE:
            texts.append(f"{where} has NaN or inf; skip this step or lower the learning rate")
        elif low == MISSING != high:
            texts.append(f"{where} is missing on some ranks only; set it to zeros there, or to None on all")
        elif low != high:
            texts.append(f"{where} is Partial on some ranks only; redistribute it")
    return texts


def _meshes(members: Sequence[Member]) -> list[DeviceMesh]:
    """The meshes of the parameters, in an order that all ranks share; one alone if it has the ranks of all."""
    meshes = list(dict.fromkeys(member.layout.mesh for member in members if member.layout.mesh is not None))
    ranks = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
    for mesh, own in zip(meshes, ranks, strict=True):
        if all(other <= own for other in ranks):
            return [mesh]
    return meshes


def _codes(members: Sequence[Member]) -> list[int]:
    """This rank's view of each gradient."""
    codes = [_layout_code(member) for member in members]
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, member in enumerate(members):
        if codes[index] in (FINE, PARTIAL):
            grad = member.parameter.grad
            assert grad is not None
            alike.setdefault((grad.dtype, grad.device), []).append(index)
    for (dtype, _), indices in alike.items():
        grads = [local_of(members[i].parameter.grad).detach() for i in indices]  # type: ignore[arg-type]
        wide = torch.promote_types(torch.float32, dtype)  # a float16 sum would overflow
        sums = torch.stack(torch._foreach_norm(grads, ord=1, dtype=wide))
        for index, grad, fine in zip(indices, grads, sums.isfinite().tolist(), strict=True):
            if not fine and not bool(grad.isfinite().all()):  # the sum of huge numbers overflows too
                codes[index] = NOT_FINITE
    return codes


def _layout_code(member: Member) -> int:
    grad, layout = member.parameter.grad, member.layout
    if grad is None:
        return MISSING
    if grad.is_sparse:
        return SPARSE
    if isinstance(grad, DTensor) != (layout.mesh is not None):
        return MISLAID
    if isinstance(grad, DTensor):
        if grad.device_mesh != layout.mesh:
            return MISLAID
        if has_partial(grad.placements):
            return PARTIAL
        if tuple(grad.placements) != layout.placements:
            return MISLAID
    return FINE
