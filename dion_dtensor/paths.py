"""Which way a bucket's matrices come to be whole: as its group asks, or by predicted cost."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from dion_dtensor.layout import shard_dim, strided_axes
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
    """
    if form is None or form.kind == "whole" or form.entry.mesh is None or "path" not in group:
        return None
    entry = form.entry
    algorithm = "orth_dion" if group.get("right_factor") == "orthonormalize" else rule.name
    if algorithm not in ALIKE or not any(entry.axes_sharding(dim) for dim in (0, 1)):
        return None
    assert entry.mesh is not None
    m, n = entry.shape
    bucket = Bucket(
        shape=(m, n),
        count=count,
        # Ranks of an axis that is apart hold other matrices, and share none.
        sizes=tuple(1 if axis in entry.apart else entry.mesh.size(axis) for axis in range(entry.mesh.ndim)),
        shards=tuple(shard_dim(placement) for placement in entry.placements),
        compute_dtype=compute_dtype,
        state_dtype=state_dtype,
        strided=strided_axes(entry.placements),
    )
    among: tuple[str, ...] = ALIKE[algorithm]
    if group.get("orthonormalize") == "rcqr":
        among = ("rcqr",)
    elif group["path"] != "auto":
        among = (group["path"],)
    fraction = group.get("rank_fraction", group.get("fraction", 1.0))
    return _choose(bucket, algorithm, fraction, among)


@functools.cache
def _choose(bucket: Bucket, algorithm: str, fraction: float, among: tuple[str, ...]) -> Choice:
    return choose(bucket, algorithm, usual_hardware(len(bucket.sizes)), fraction=fraction, among=among)


def path_of(group: Mapping[str, Any], choice: Choice | None) -> Any:
    """The value of ``path`` that the rule gets."""
    asked = group.get("path")
    if asked != "auto" or choice is None:
        return asked
    return "low_rank" if choice.way == "rcqr" else choice.way
