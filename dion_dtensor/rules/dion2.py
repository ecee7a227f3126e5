"""Dion2: Muon on the rows (or columns) of largest L1 norm, whose momentum alone decays.

Source: Dion2, arXiv 2512.16928; conventions of microsoft/dion, but the choice is always that of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion_dtensor.assembly import elementwise, transposed
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
from dion_dtensor.selection import largest_rows, on_rows, row_sums, scaled_rows

__all__ = ["DION2", "SELECTION_DEFAULTS", "check_selection", "count"]

SELECTION_DEFAULTS: dict[str, Any] = {"mu": 0.95, "fraction": 0.25, "path": "auto", **POLYNOMIAL_DEFAULTS}


class Hyper(NamedTuple):
    """What Dion2's update reads.

    ``chosen``: slices chosen; ``columns``: of columns, not of rows; ``path``: how they travel.
    """

    mu: Scalar
    epsilon: Scalar
    chosen: int
    columns: bool
    path: str
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
    rows = transposed(momentum) if hyper.columns else momentum
    chosen = largest_rows(row_sums(rows), hyper.chosen)
    rounded = to_dtype(rows, hyper.compute_dtype)
    direction = on_rows(orthonormalizer(hyper), rounded, chosen, assemble=hyper.path == "assemble")
    rows = to_dtype(scaled_rows(rows, chosen, hyper.mu), state.momentum.dtype)
    if hyper.columns:
        rows, direction = transposed(rows), transposed(direction)
    return direction, State(rows)


def count(fraction: float, size: int) -> int:
    """``ceil(fraction * size)`` in exact arithmetic of the decimal that the user wrote, one at least."""
    exact = Fraction(str(fraction)) * size
    return max(1, -(-exact.numerator // exact.denominator))


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Dion2 keeps the momentum alone."""
    return {"momentum": StateSpec()}


def check_selection(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    check_polynomial(group)
    check_fraction("fraction", group)
    if group["path"] not in ("auto", "exchange", "assemble"):
        raise ValueError(f"path={group['path']!r} must be 'auto', 'exchange' or 'assemble'")


def prepare(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, Any]:
    """Slices lie along the shorter side of the full shape."""
    columns = shape[0] > shape[1]
    number = count(group["fraction"], shape[1] if columns else shape[0])
    return {"chosen": number, "columns": columns, **polynomial_fields(group)}


DION2 = Rule(
    name="dion2",
    update=update,
    hyper=Hyper,
    state=State,
    defaults=SELECTION_DEFAULTS,
    scalars=("mu", "epsilon"),
    states=states,
    way="chosen slices alone",
    check=check_selection,
    prepare=prepare,
)
