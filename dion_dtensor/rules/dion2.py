"""Dion2: Muon on the rows (or columns) of largest L1 norm, whose momentum alone decays.

Source: Dion2, arXiv 2512.16928; conventions of microsoft/dion, but the choice is always that of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion_dtensor.assembly import elementwise, transposed
from dion_dtensor.blocks import blocks_of, on_columns_of_blocks, on_rows_of_blocks, scaled_where
from dion_dtensor.matrices import ROW_BLOCKS, Split, by_rows
from dion_dtensor.orthonormalize.polynomial import Coefficients
from dion_dtensor.rules.rule import Rule, Scalar, StateSpec, widest
from dion_dtensor.rules.shared import (
    POLYNOMIAL_DEFAULTS,
    check_fraction,
    check_polynomial,
    orthonormalizer,
    polynomial_fields,
    to_dtype,
)
from dion_dtensor.selection import largest_rows, on_rows, row_sums, scaled_rows, slices

__all__ = ["DION2", "SELECTION_DEFAULTS", "check_selection"]

SELECTION_DEFAULTS: dict[str, Any] = {"mu": 0.95, "fraction": 0.25, "path": "auto", **POLYNOMIAL_DEFAULTS}


class Hyper(NamedTuple):
    """What Dion2's update reads.

    ``path``: how chosen slices travel; ``split``: of whole parameters, where shard boundaries cut the logical matrices.
    """

    mu: Scalar
    epsilon: Scalar
    fraction: float
    path: str
    split: Split | None
    coefficients: Coefficients
    epsilon_rule: str
    norm_factor: float
    compute_dtype: torch.dtype


class State(NamedTuple):
    """``momentum``: ``[N, m, n]``."""

    momentum: Tensor


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of a stack ``[N, m, n]``; only the chosen slices are assembled."""
    wide = widest(state.momentum, grad)
    momentum = elementwise(lambda M, G: M.to(wide) + G.to(wide), state.momentum, grad)
    if hyper.split is not None:
        across, _ = by_rows(hyper.split)
        direction, decayed = _on_blocks(transposed(momentum) if across else momentum, hyper.split, hyper)
    else:
        # Slices lie along the shorter side of the full shape.
        across = momentum.shape[1] > momentum.shape[2]
        rows = transposed(momentum) if across else momentum
        chosen = largest_rows(row_sums(rows), slices(hyper.fraction, rows.shape[1]))
        rounded = to_dtype(rows, hyper.compute_dtype)
        direction = on_rows(orthonormalizer(hyper), rounded, chosen, assemble=hyper.path == "assemble")
        decayed = scaled_rows(rows, chosen, hyper.mu)
    if across:
        direction, decayed = transposed(direction), transposed(decayed)
    return direction, State(to_dtype(decayed, state.momentum.dtype))


def _on_blocks(momentum: Tensor, split: Split, hyper: Hyper) -> tuple[Tensor, Tensor]:
    """The direction of parameters of several logical matrices, and their momentum with the chosen slices decayed."""
    blocks = blocks_of(split, momentum)
    number, orthonormalize = partial(slices, hyper.fraction), orthonormalizer(hyper)
    rounded = to_dtype(momentum, hyper.compute_dtype)
    tall = [index for index, piece in enumerate(blocks.pieces) if piece.m > piece.n]
    wide = [index for index, piece in enumerate(blocks.pieces) if piece.m <= piece.n]
    assemble = hyper.path == "assemble"
    directions, decayed = [], momentum
    # First, so that all collectives before the slices travel have an order.
    sums = row_sums(momentum) if wide else None
    chain = [] if sums is None else [sums]
    if tall:
        direction, mask = on_columns_of_blocks(
            *(orthonormalize, rounded, momentum, blocks, tall, number),
            assemble=assemble,
            chain=chain,
        )
        directions.append(direction)
        decayed = scaled_where(decayed, mask, hyper.mu)
    if sums is not None:
        direction, chosen = on_rows_of_blocks(
            *(orthonormalize, rounded, sums, blocks, wide, number),
            assemble=assemble,
            chain=[*chain, *directions],
        )
        directions = [*directions, direction]
        decayed = scaled_rows(decayed, chosen, hyper.mu)
    both = len(directions) == 2
    return elementwise(torch.add, *directions) if both else directions[0], decayed


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Dion2 keeps the momentum alone."""
    return {"momentum": StateSpec()}


def check_selection(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    check_polynomial(group)
    check_fraction("fraction", group)
    if group["path"] not in ("auto", "exchange", "assemble"):
        raise ValueError(f"path={group['path']!r} must be 'auto', 'exchange' or 'assemble'")


DION2 = Rule(
    name="dion2",
    update=update,
    hyper=Hyper,
    state=State,
    defaults=SELECTION_DEFAULTS,
    scalars=("mu", "epsilon"),
    states=states,
    cuts=lambda split: isinstance(split, ROW_BLOCKS),
    way="chosen slices alone",
    reads_values="exchange",
    check=check_selection,
    prepare=polynomial_fields,
)
