"""Whether all parameters were exchanged for others, as Accelerate exchanges them for shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dion_dtensor.buckets import Bucket
from dion_dtensor.members import Member

__all__ = ["all_exchanged", "names_of"]


def names_of(group: Mapping[str, Any], position: int) -> Sequence[str]:
    """The names of a group's parameters, made up where they have none."""
    return group.get("param_names") or [
        f"group {position} parameter {index}" for index in range(len(group["params"]))
    ]


def all_exchanged(
    groups: Sequence[Mapping[str, Any]], buckets: Sequence[Bucket]
) -> dict[str, tuple[Member, Bucket]] | None:
    """The member and bucket that each parameter had by its name; None if not all are exchanged for their like.

    Args:
        groups: with the parameters of now.
        buckets: with those that the optimizer was made with.

    Raises:
        RuntimeError: hyperparameters of now that the old state cannot follow.
    """
    members = [(one, bucket) for bucket in buckets for one in bucket.members]
    old = {one.name: (one, bucket) for one, bucket in members}
    now = [
        (name, parameter, group)
        for position, group in enumerate(groups)
        for name, parameter in zip(names_of(group, position), group["params"], strict=False)
    ]
    if sorted(name for name, _, _ in now) != sorted(one.name for one, _ in members) or len(old) != len(now):
        return None
    held = {id(one.parameter) for one, _ in members}
    for name, parameter, group in now:
        one, bucket = old[name]
        alike = one.layout.shape == parameter.shape and bucket.rule.name == group["algorithm"]
        if id(parameter) in held or parameter.is_meta or not alike:
            return None
    for name, _, group in now:
        old[name][1].check(group)
    return old
