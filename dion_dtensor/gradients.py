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

MISSING, FINE, NOT_FINITE, MISLAID = 0.0, 1.0, 2.0, 3.0


def checked_gradients(
    buckets: Sequence[Bucket], validate: bool
) -> list[tuple[Bucket, list[Member], list[Tensor]]]:
    """The members of each bucket that have a gradient, with their local gradients.

    Args:
        buckets: of the optimizer.
        validate: let all ranks of each mesh agree first; otherwise the gradients are taken as they are.

    Raises:
        RuntimeError: on all ranks of the mesh alike, naming each unfit gradient's parameter and what is wrong.
    """
    members = [member for bucket in buckets for member in bucket.members]
    if validate:
        by_mesh: dict[DeviceMesh | None, list[Member]] = {}
        for member in members:
            by_mesh.setdefault(member.layout.mesh, []).append(member)
        problems = [text for mesh, same in by_mesh.items() for text in _problems(same, mesh)]
        if problems:
            raise RuntimeError("no parameter was changed by this step:\n" + "\n".join(problems))
    work = []
    for bucket in buckets:
        present = [member for member in bucket.members if member.parameter.grad is not None]
        if present:
            work.append((bucket, present, [_local_gradient(member) for member in present]))
    return work


def _local_gradient(member: Member) -> Tensor:
    grad = member.parameter.grad
    assert grad is not None
    return own_shard(grad, member.layout)


def _problems(members: Sequence[Member], mesh: DeviceMesh | None) -> list[str]:
    codes = torch.tensor([_code(member) for member in members], device=members[0].layout.device)
    codes = torch.where(codes == FINE, _finite_codes(members), codes)
    largest = codes
    smallest = codes
    if mesh is not None:
        both = agreed_maximum(torch.cat((codes, -codes)), mesh)
        largest, smallest = both[: len(members)], -both[len(members) :]
    texts = []
    for member, high, low in zip(members, largest.tolist(), smallest.tolist(), strict=True):
        where = f"{member.name} ({member.layout.describe()})"
        if high == MISLAID:
            texts.append(
                f"  {where}: the gradient does not lie as its parameter does{_mislaid(member)}; redistribute it"
            )
        elif high == NOT_FINITE:
            texts.append(f"  {where}: the gradient has NaN or inf; skip this step or lower the learning rate")
        elif low != high:
            texts.append(
                f"  {where}: the gradient is missing on some ranks only; set it to zeros there, or to None on all"
            )
    return texts


def _mislaid(member: Member) -> str:
    grad = member.parameter.grad
    return f" ({StorageLayout.of(grad).describe()})" if grad is not None and _code(member) == MISLAID else ""


def _code(member: Member) -> float:
    grad = member.parameter.grad
    if grad is None:
        return MISSING
    layout = member.layout
    if grad.is_sparse or isinstance(grad, DTensor) != (layout.mesh is not None):
        return MISLAID
    if isinstance(grad, DTensor):
        same = grad.device_mesh == layout.mesh and tuple(grad.placements) == layout.placements
        if not same and not (grad.device_mesh == layout.mesh and has_partial(grad.placements)):
            return MISLAID
    return FINE


def _finite_codes(members: Sequence[Member]) -> Tensor:
    """FINE or NOT_FINITE a member, by the sum of absolute values of its local gradient (zero if empty)."""
    device = members[0].layout.device
    codes = torch.full((len(members),), FINE, device=device)
    grads = [member.parameter.grad for member in members]
    usable = [index for index, grad in enumerate(grads) if grad is not None and not grad.is_sparse]
    if usable:
        local = [local_of(grads[index]).detach() for index in usable]  # type: ignore[arg-type]
        wide = torch.promote_types(torch.float32, local[0].dtype)  # a float16 sum would overflow
        finite = torch.stack(torch._foreach_norm(local, ord=1, dtype=wide)).isfinite()
        codes[torch.tensor(usable, device=device)] = torch.where(finite, FINE, NOT_FINITE)
    return codes
