"""Which parameters are stepped together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dion_dtensor.buckets import Bucket
from dion_dtensor.captured import Memory, recorder_on
from dion_dtensor.fake import is_fake
from dion_dtensor.layout import StorageLayout
from dion_dtensor.members import Member
from dion_dtensor.rules import Rule

__all__ = ["CPU_BUCKET_BYTES", "make_buckets", "runs_of"]

# Of whole matrices on a CPU, beyond which batches gain nothing and leave its caches (measured, AVX2).
CPU_BUCKET_BYTES = 8 << 20


def make_buckets(
    rule: Rule,
    group: Mapping[str, Any],
    members: Sequence[Member],
    options: Mapping[str, Any],
    memory: dict[torch.device, Memory] | None = None,
) -> list[Bucket]:
    """Sort ``members`` into buckets, in the order of first appearance, which all ranks share.

    Args:
        rule: the algorithm of ``group``.
        group: the param group.
        members: its parameters.
        options: ``seed``, ``momentum_dtype``, ``compute_dtype``, ``compile``, ``max_bucket_bytes`` of the optimizer.
        memory: of CUDA graphs, by device; None to record none.
    """
    sorted_: dict[Hashable, list[Member]] = {}
    for member in members:
        layout, form = member.layout, member.form
        key: Hashable = (layout.dtype, layout.device)
        if form is not None:
            key = (form.kind, form.entry, form.pieces if form.kind == "whole" else None, layout.mesh)
        sorted_.setdefault(key, []).append(member)
    return [
        Bucket(
            rule,
            group,
            some,
            seed=options["seed"],
            momentum_dtype=options["momentum_dtype"],
            compute_dtype=_compute_dtype(some[0].layout, options["compute_dtype"]),
            compile=options["compile"],
            recorder=None
            if is_fake(some[0].parameter)
            else recorder_on(some[0].layout.device, memory, sum(map(_bytes, some))),
        )
        for same in sorted_.values()
        for some in _chunks(same, options["max_bucket_bytes"])
    ]


def _chunks(members: list[Member], most: int | None) -> Iterator[list[Member]]:
    """Runs of members whose local shards take at most ``most`` bytes, one member at least.

    Runs of one length share a graph: up to twice as many as needed are made where that makes all of them equal, as for
    the layers of most models; elsewhere lengths differ by one.
    """
    first = members[0]
    if (
        most is None
        and first.form is not None
        and first.layout.mesh is None
        and first.layout.device.type == "cpu"
    ):
        most = CPU_BUCKET_BYTES
    count = len(members)
    runs = runs_of(count, max(map(_bytes, members)), most)
    for index in range(runs):
        yield members[count * index // runs : count * (index + 1) // runs]


def runs_of(count: int, size: int, most: int | None) -> int:
    """How many runs ``count`` shards of ``size`` bytes make, ``most`` bytes in each."""
    length = count if most is None else max(1, most // max(size, 1))
    needed = -(-count // length)
    return next((runs for runs in range(needed, 2 * needed + 1) if count % runs == 0), needed)


def _bytes(member: Member) -> int:
    """Of the largest shard on any rank."""
    return int(member.layout.largest_shard() * member.local.element_size())


def _compute_dtype(layout: StorageLayout, asked: torch.dtype | None) -> torch.dtype:
    """float64 parameters are computed in float64 throughout; else as asked, else bfloat16 where it is fast."""
    if layout.dtype == torch.float64:
        return torch.float64
    return asked or (torch.bfloat16 if layout.device.type == "cuda" else torch.float32)
