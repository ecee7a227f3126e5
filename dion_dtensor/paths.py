"""Which way a bucket's matrices come to be whole: as its group asks, or by predicted cost."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import Placement

from dion_dtensor.layout import inner_first, move_shard, shard_dim
from dion_dtensor.members import Form
from dion_dtensor.planning import Bucket, Choice, choose, usual_hardware
from dion_dtensor.rules import Rule

__all__ = ["chosen_path", "path_of"]

ALIKE = {
    "muon": ("assemble",),
    "dion": ("low_rank", "assemble"),
    "orth_dion": ("low_rank", "assemble"),
    "dion2": ("exchange", "assemble"),
    "dion3": ("exchange", "assemble"),
}
"""What "auto" may take.  Muon's Gram path is not among them: its last digits depend on the mesh."""


def chosen_path(
    rule: Rule,
    group: Mapping[str, Any],
    form: Form | None,
    count: int,
    state_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> Choice | None:
    """The way that ``path="auto"`` takes for ``count`` entries of ``form``; None where nothing is to be chosen.

    A function of the layout and of fixed figures of an accelerator, never of a measurement: all ranks decide alike.
    Blocks of one parameter are priced as if they were apart.  Together they send up to twice that, more if they are of
    many sizes below the width, since factors along the rows are as long as the parameter for each rank that there is.
    """
    if form is None or form.entry.mesh is None or "path" not in group:
        return None
    entry = form.entry
    algorithm = "orth_dion" if group.get("right_factor") == "orthonormalize" else rule.name
    if algorithm not in ALIKE or not form.travels:
        return None
    # Chosen slices of blocks are exchanged as asked for: nothing foresees yet what assembling them would cost.
    if form.cut is not None and not (rule.name == "dion" and rule.cuts(form.cut)):
        return None
    assert entry.mesh is not None
    # Ranks of an axis that is apart hold other matrices, and share none.
    sizes = tuple(1 if axis in entry.apart else entry.mesh.size(axis) for axis in range(entry.mesh.ndim))
    placements = tuple(map(_turned, entry.placements)) if form.across else entry.placements
    buckets = tuple(
        Bucket(
            shape=(piece.m, piece.n),
            count=count * piece.count,
            sizes=sizes,
            shards=tuple(shard_dim(placement) for placement in placements),
            compute_dtype=compute_dtype,
            state_dtype=state_dtype,
            order=inner_first(sizes, placements),
        )
        for piece in form.entry_pieces
    )
    among: tuple[str, ...] = ALIKE[algorithm]
    if group.get("orthonormalize") == "rcqr" and form.cut is None:
        among = ("rcqr",)
    elif group["path"] != "auto":
        among = (group["path"],)
    fraction = group.get("rank_fraction", group.get("fraction", 1.0))
    return _choose(buckets, algorithm, fraction, among)


def _turned(placement: Placement) -> Placement:
    dim = shard_dim(placement)
    return placement if dim is None else move_shard(placement, 1 - dim)


@functools.cache
def _choose(buckets: tuple[Bucket, ...], algorithm: str, fraction: float, among: tuple[str, ...]) -> Choice:
    return choose(buckets, algorithm, usual_hardware(len(buckets[0].sizes)), fraction=fraction, among=among)


def path_of(group: Mapping[str, Any], choice: Choice | None) -> Any:
    """The value of ``path`` that the rule gets."""
    asked = group.get("path")
    if asked != "auto" or choice is None:
        return asked
    return "low_rank" if choice.way == "rcqr" else choice.way
