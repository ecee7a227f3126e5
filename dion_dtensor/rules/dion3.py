"""Dion3, also called NorDion2: Dion2 on rows, each divided by the root of its running variance.

Source: Dion3, arXiv 2608.11612; conventions of microsoft/dion, but choice and norms are those of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion_dtensor.assembly import elementwise, transposed
from dion_dtensor.blocks import blocks_of, on_rows_of_blocks
from dion_dtensor.matrices import ROW_BLOCKS, Split, by_rows
from dion_dtensor.orthonormalize.polynomial import Coefficients
from dion_dtensor.rules.dion2 import SELECTION_DEFAULTS, check_selection
from dion_dtensor.rules.normuon import VARIANCE_DEFAULTS
from dion_dtensor.rules.rule import Rule, Scalar, StateSpec, widest
from dion_dtensor.rules.shared import (
    check_variance,
    normalized_rows,
    orthonormalizer,
    polynomial_fields,
    to_dtype,
)
from dion_dtensor.selection import largest_rows, on_rows, row_sums, scaled_rows, slices

__all__ = ["DION3"]


class Hyper(NamedTuple):
    """What Dion3's update reads.

    ``path``: how chosen rows travel; ``split``: of whole parameters, where shard boundaries cut the logical matrices.
    """

    mu: Scalar
    epsilon: Scalar
    beta2: Scalar
    variance_epsilon: Scalar
    fraction: float
    path: str
    split: Split | None
    coefficients: Coefficients
    epsilon_rule: str
    norm_factor: float
    compute_dtype: torch.dtype


class State(NamedTuple):
    """``momentum``: ``[N, m, n]``; ``variance``: ``[N, m, 1]``."""

    momentum: Tensor
    variance: Tensor


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of a stack ``[N, m, n]``; only the chosen rows are assembled, and only their variance changes."""
    wide = widest(state.momentum, grad)
    momentum = elementwise(lambda M, G: M.to(wide) + G.to(wide), state.momentum, grad)
    orthonormalize = orthonormalizer(hyper)

    def normalized(X: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return normalized_rows(orthonormalize(X), variance, hyper.beta2, hyper.variance_epsilon)

    rounded = to_dtype(momentum, hyper.compute_dtype)
    variance = to_dtype(state.variance, widest(state.variance))
    assemble, number = hyper.path == "assemble", partial(slices, hyper.fraction)
    across = False
    if hyper.split is None:
        chosen = largest_rows(row_sums(momentum), number(momentum.shape[1]))
        direction, variance = on_rows(normalized, rounded, chosen, variance, assemble=assemble)
    else:
        across, _ = by_rows(hyper.split)
        if across:
            momentum, rounded = transposed(momentum), transposed(rounded)
        blocks = blocks_of(hyper.split, momentum)
        every = range(len(blocks.pieces))
        (direction, variance), chosen = on_rows_of_blocks(
            normalized, rounded, row_sums(momentum), blocks, every, number, variance, assemble=assemble
        )
    decayed = to_dtype(scaled_rows(momentum, chosen, hyper.mu), state.momentum.dtype)
    if across:
        direction, decayed = transposed(direction), transposed(decayed)
    return direction, State(decayed, to_dtype(variance, state.variance.dtype))


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Momentum of the parameter's shape, and a number for each row."""
    return {"momentum": StateSpec(), "variance": StateSpec(dims=("row", None), sizes=(shape[0], 1))}


def check(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    check_selection(group)
    check_variance(group)


DION3 = Rule(
    name="dion3",
    update=update,
    hyper=Hyper,
    state=State,
    defaults={**SELECTION_DEFAULTS, **VARIANCE_DEFAULTS},
    scalars=("mu", "epsilon", "beta2", "variance_epsilon"),
    states=states,
    cuts=lambda split: isinstance(split, ROW_BLOCKS),
    way="chosen rows alone",
    reads_values="exchange",
    check=check,
    prepare=polynomial_fields,
)
