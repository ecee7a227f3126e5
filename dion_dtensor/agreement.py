"""What all ranks learn of each other before a step: whether all of them are about to take the same one."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dion_dtensor.assembly import agreed_maximum
from dion_dtensor.buckets import Bucket
from dion_dtensor.common import DECAY
from dion_dtensor.fake import is_fake
from dion_dtensor.members import Member
from dion_dtensor.rules import RULES

__all__ = ["agreed", "differing", "fingerprints"]

BLOCK = 256
"""Numbers."""


def agreed(own: Sequence[int], members: Sequence[Member]) -> list[int]:
    """The elementwise maximum of ``own`` over the ranks of all of ``members``, the same on each.

    Without other ranks, as of fake parameters, it is ``own``.

    Raises:
        RuntimeError: a rank did not take part.
    """
    # Fake tensors come all or none.
    meshes = [] if members and is_fake(members[0].parameter) else _meshes(members)
    if not meshes:
        return list(own)
    # To whole blocks, so that ranks that hold different parameters still send as many numbers, and can say so.
    values = torch.tensor([*own, *[0] * (-len(own) % BLOCK)], device="cpu")
    # Parameters may lie on several meshes: what one of them learns is carried to the ranks of the next.
    for mesh in meshes * len(meshes):
        values = agreed_maximum(values.to(mesh.device_type), mesh)
    found: list[int] = values[: len(own)].tolist()
    return found


def _meshes(members: Sequence[Member]) -> list[DeviceMesh]:
    """The meshes of the parameters, in an order that all ranks share; one alone if it has the ranks of all."""
    meshes = list(dict.fromkeys(member.layout.mesh for member in members if member.layout.mesh is not None))
    ranks = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
    for mesh, own in zip(meshes, ranks, strict=True):
        if all(other <= own for other in ranks):
            return [mesh]
    return meshes


def fingerprints(buckets: Sequence[Bucket], groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """The same on ranks that are alike: a number for all parameters, and one for the values of each group."""
    kinds = [group["algorithm"] for group in groups]
    held = [bucket.fingerprint for bucket in buckets]
    values = ([(name, _comparable(value)) for name, value in _values(group)] for group in groups)
    return [_digest((held, kinds)), *map(_digest, values)]


def differing(
    found: Sequence[tuple[int, int]], members: Sequence[Member], groups: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What is to be said of fingerprints, of which the largest and the smallest of all ranks were found."""
    apart = [most != least for most, least in found]
    if apart[0]:
        return [
            f"  the ranks hold different parameters, this one {len(members)} in {len(groups)} param groups; make the "
            "optimizer, and add groups, on all of them alike"
        ]
    return [
        f"  param group {position} ({group['algorithm']}): its hyperparameters differ between ranks, here they are "
        + ", ".join(f"{name}={value}" for name, value in _values(group))
        for position, (group, differs) in enumerate(zip(groups, apart[1:], strict=True))
        if differs
    ]


def _values(group: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Hyperparameters; those on a GPU are left out, since the host would wait for them."""
    values = {name: group[name] for name in ("lr", *DECAY, "maximize", *RULES[group["algorithm"]].defaults)}
    return [
        (name, value.item() if isinstance(value, Tensor) else value)
        for name, value in values.items()
        if not (isinstance(value, Tensor) and value.device.type != "cpu")
    ]


def _comparable(value: object) -> object:
    """What has the same text on all ranks if it is the same: functions have addresses in theirs."""
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, tuple | list):
        return [_comparable(one) for one in value]
    return value if isinstance(value, str) else type(value).__name__


def _digest(value: object) -> int:
    return zlib.crc32(repr(value).encode())
