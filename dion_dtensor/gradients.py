"""Before a step: every rank learns whether the gradients are fit, and all raise together if they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from dion_dtensor.agreement import agreed, differing, fingerprints
from dion_dtensor.assembly import local_of, own_shard
from dion_dtensor.buckets import Bucket
from dion_dtensor.fake import is_fake, with_real_tensors
from dion_dtensor.layout import StorageLayout, has_partial
from dion_dtensor.members import Member

__all__ = ["checked_gradients"]

MOST_NAMED = 12
"""Parameters that an error lists; a model with NaN has it in all of them."""
TAKEN_OUT, MISSING, FINE, PARTIAL, WHOLE, NOT_FINITE, MISLAID, SPARSE, MOVED = range(9)


def checked_gradients(
    buckets: Sequence[Bucket],
    members: Sequence[Member],
    groups: Sequence[Mapping[str, Any]],
    validate: bool,
    averaged: bool,
    refusal: Exception | None = None,
) -> list[tuple[Bucket, list[Member], list[Tensor], tuple[int, ...]]]:
    """The members of each bucket that have a gradient, their local gradients, and axes still to be averaged over.

    Args:
        buckets: of the optimizer.
        members: those that its groups hold now.
        groups: the param groups.
        averaged: whether gradients are averages over the axes that their parameters do not know.
        validate: let all ranks of all meshes agree first; otherwise the gradients are taken as they are.
        refusal: why this rank will not take the step; it is raised, once the others know.

    Raises:
        RuntimeError: on all ranks alike, naming each unfit gradient's parameter and what is wrong.
    """
    if validate:
        problems = _problems(members, buckets, groups, refusal is not None)
        if problems and refusal is None:
            raise RuntimeError("no parameter was changed by this step:\n" + "\n".join(problems))
    if refusal is not None:
        raise refusal
    work, held = [], set(map(id, members))
    for bucket in buckets:
        given = [one for one in bucket.members if one.parameter.grad is not None and id(one) in held]
        laid = [_laid(member, averaged) for member in given]
        may_wait = bool(bucket.rule.pending_states)
        waiting = [
            _pending(grad, member) if may_wait else () for grad, member in zip(laid, given, strict=True)
        ]
        grads = [
            _local(grad, member.layout.partial(axes) if axes else member.layout)
            for grad, member, axes in zip(laid, given, waiting, strict=True)
        ]
        if given:
            work.append((bucket, given, grads, tuple({axis for axes in waiting for axis in axes})))
    return work


def _laid(member: Member, averaged: bool) -> Tensor:
    """A gradient on all axes of its parameter's layout, also on those that the parameter itself does not know."""
    grad, layout = member.parameter.grad, member.layout
    assert grad is not None
    if layout.mesh is None:
        return grad
    own = tuple(grad.placements) if isinstance(grad, DTensor) else ()
    hidden = layout.mesh.ndim - len(own)
    if not hidden:
        return grad
    placements = (Replicate() if averaged else Partial("avg"),) * hidden + own
    return replace(layout, placements=placements, dtype=grad.dtype).wrap(local_of(grad).contiguous())


def _pending(grad: Tensor, member: Member) -> tuple[int, ...]:
    """The axes over which ``grad`` is an average that may be taken later: those whose ranks hold the same weights."""
    if not isinstance(grad, DTensor):
        return ()
    pairs = zip(grad.placements, member.layout.placements, strict=True)
    return tuple(
        axis for axis, (own, weight) in enumerate(pairs) if own == Partial("avg") and weight == Replicate()
    )


def _local(grad: Tensor, layout: StorageLayout) -> Tensor:
    return own_shard(grad, layout) if isinstance(grad, DTensor) else grad


def _problems(
    members: Sequence[Member],
    buckets: Sequence[Bucket],
    groups: Sequence[Mapping[str, Any]],
    refused: bool,
) -> list[str]:
    """What is wrong with each parameter's gradient on any rank; the same list on every rank.

    All that the optimizer was made with are agreed on, so that all ranks send as many numbers whatever is in their
    groups now.

    All ranks give up the graph of a bucket whose weights have moved on one of them, or which one of them has taken
    otherwise before.
    """
    codes = dict(zip(members, _codes(members), strict=True))
    members = [member for bucket in buckets for member in bucket.members]
    mine = [codes.get(member, TAKEN_OUT) for member in members]
    recording = [bucket for bucket in buckets if bucket.recorder is not None]
    moved = [bucket.has_moved() for bucket in recording]
    turns = [bucket.recorder.turns for bucket in recording if bucket.recorder is not None]
    flags = [*moved, *turns, *(-turn for turn in turns)]
    prints = fingerprints(buckets, groups) if not refused else [0] * (1 + len(groups))
    both = [sign * one for one in prints for sign in (1, -1)]
    try:
        found = agreed([refused, *both, *mine, *(-code for code in mine), *flags], members)
    except RuntimeError as error:
        raise RuntimeError(
            "no parameter was changed by this step: the ranks could not agree on the gradients; has a rank died? "
            f"({error})"
        ) from error
    rest = iter(found)
    if next(rest):
        return ["  another rank has refused this step, see its error"]
    of_prints = list(islice(rest, len(both)))
    differ = differing(
        list(zip(of_prints[::2], (-one for one in of_prints[1::2]), strict=True)), members, groups
    )
    if differ:
        return differ
    largest, smallest = list(islice(rest, len(members))), [-code for code in islice(rest, len(members))]
    of_buckets = [list(islice(rest, len(recording))) for _ in range(3)]
    for bucket, anywhere, most, least in zip(recording, *of_buckets, strict=True):
        if bucket.recorder is not None and (anywhere or most != -least):
            bucket.recorder.forget()
    texts = []
    for member, own, high, low in zip(members, mine, largest, smallest, strict=True):
        if high == low and high not in (MOVED, SPARSE, MISLAID, NOT_FINITE):
            continue
        if low == TAKEN_OUT:
            texts.append(
                f"  {member.name} ({member.layout.describe()}): it is in a param group on some ranks only; take it out "
                "on all of them, or on none"
            )
            continue
        where = f"  {member.name} ({member.layout.describe()}): the gradient"
        if high == MOVED:
            now = StorageLayout.of(member.parameter)
            device = (
                "" if now.device == member.layout.device else f" on {now.device}, not {member.layout.device}"
            )
            texts.append(
                f"  {member.name} ({member.layout.describe()}): the parameter now is "
                f"{now.describe()}{_elsewhere(member)}{device}; "
                "make the optimizer after the model is sharded, moved or cast, and carry its state over by a checkpoint"
            )
        elif high == SPARSE:
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
            texts.append(f"{where} is Partial or replicated on some ranks only; redistribute it")
    more = len(texts) - MOST_NAMED
    return texts if more <= 0 else [*texts[:MOST_NAMED], f"  and {more} more"]


def _elsewhere(member: Member) -> str:
    """The ranks of a parameter's mesh, which :meth:`StorageLayout.describe` leaves out."""
    own = member.parameter
    return f" of the ranks {own.device_mesh.mesh.tolist()}" if isinstance(own, DTensor) else ""


def _codes(members: Sequence[Member]) -> list[int]:
    """This rank's view of each gradient."""
    codes = [_layout_code(member) for member in members]
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, member in enumerate(members):
        if codes[index] in (FINE, PARTIAL, WHOLE):
            grad = member.parameter.grad
            assert grad is not None
            alike.setdefault((grad.dtype, grad.device), []).append(index)
    for indices in alike.values():
        grads = [local_of(members[i].parameter.grad).detach() for i in indices]  # type: ignore[arg-type]
        for index, fine in zip(indices, _finite(grads), strict=True):
            if not fine:
                codes[index] = NOT_FINITE
    return codes


def _finite(grads: Sequence[Tensor]) -> list[bool]:
    """Whether all values are finite, of each of some tensors of one dtype on one device."""
    if is_fake(grads[0]):
        return [True] * len(grads)
    return by_extremes(grads) if grads[0].device.type == "cpu" else by_norms(grads)


def by_extremes(grads: Sequence[Tensor]) -> list[bool]:
    """Whether all values are finite: on a CPU as fast as memory is read, where norms take half as long again."""
    ends = [end for grad in grads for end in (torch.aminmax(grad) if grad.numel() else grad.new_zeros(2))]
    fine: list[bool] = torch.stack(ends).isfinite().view(-1, 2).all(dim=1).tolist()
    return fine


def by_norms(grads: Sequence[Tensor]) -> list[bool]:
    """Whether all values are finite: on a GPU one kernel."""
    wide = torch.promote_types(torch.float32, grads[0].dtype)  # squares of float16 would overflow
    sums = torch.stack(torch._foreach_norm(list(grads), dtype=wide)).isfinite().tolist()
    # The squares of huge numbers overflow too.
    return [fine or bool(grad.isfinite().all()) for fine, grad in zip(sums, grads, strict=True)]


def _layout_code(member: Member) -> int:
    grad, layout = member.parameter.grad, member.layout
    own = member.parameter
    now = StorageLayout.of(own)
    hidden = len(layout.placements) - len(now.placements)
    if (now.shape, now.dtype, now.device) != (
        layout.shape,
        layout.dtype,
        layout.device,
    ) or now.placements != layout.placements[hidden:]:
        return MOVED
    if now.mesh is not None and not _same_ranks(now.mesh, layout, hidden):
        return MOVED
    if grad is None:
        return MISSING
    if grad.is_sparse:
        return SPARSE
    if isinstance(grad, DTensor) != isinstance(own, DTensor) or grad.shape != own.shape:
        return MISLAID
    if isinstance(grad, DTensor):
        assert isinstance(own, DTensor)
        if grad.device_mesh != own.device_mesh:
            return MISLAID
        if has_partial(grad.placements):
            return PARTIAL
        if grad.placements != own.placements:
            # A row-wise embedding gets a replicated gradient from torch's tensor parallelism: shards are taken of it.
            pairs = zip(grad.placements, own.placements, strict=True)
            return WHOLE if all(one in (Replicate(), other) for one, other in pairs) else MISLAID
    return FINE


@with_real_tensors()
def _same_ranks(mesh: DeviceMesh, layout: StorageLayout, hidden: int) -> bool:
    """Whether the axes of ``layout`` after the ``hidden`` ones are those of ``mesh``."""
    assert layout.mesh is not None
    if not hidden:
        return mesh == layout.mesh
    here = layout.mesh.get_coordinate()
    assert here is not None
    return torch.equal(layout.mesh.mesh[tuple(here[:hidden])], mesh.mesh)
