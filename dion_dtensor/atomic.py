"""A step that is undone where it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dion_dtensor.agreement import agreed
from dion_dtensor.buckets import Bucket
from dion_dtensor.exchange import forget

__all__ = ["undone_on_failure"]


@contextmanager
def undone_on_failure(buckets: Sequence[Bucket]) -> Iterator[None]:
    """Within it, all that ``buckets`` hold is as before when anything raises.

    At the end all ranks agree that they are done, so that nobody keeps a step that a lost rank did not finish.  Only
    one that is lost while they agree can still part them.  A rank that raises takes no part: it must end, since the
    others would take its next collective for this one.

    Raises:
        RuntimeError: the ranks could not agree; the step was undone.
    """
    members = [member for bucket in buckets for member in bucket.members]
    held = [member.local for member in members]
    held += [stack for bucket in buckets for stack in bucket.stacks.values()]
    held += [member.views["step"] for member in members if "step" in member.views]
    before = [tensor.detach().clone() for tensor in held]
    pending = [bucket.pending for bucket in buckets]
    try:
        yield
        try:
            agreed([0], members)
        except RuntimeError as error:
            raise RuntimeError(
                f"this step was undone: the ranks could not agree that it is done; has a rank died? ({error})"
            ) from error
    except BaseException:
        forget()
        for tensor, old in zip(held, before, strict=True):
            tensor.copy_(old)
        for bucket, axes in zip(buckets, pending, strict=True):
            bucket.pending = axes
        raise
