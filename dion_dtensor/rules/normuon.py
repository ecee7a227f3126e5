"""NorMuon: Muon with each row divided by the root of its running variance (Li et al., arXiv 2510.05491)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion_dtensor.matrices import Split, each_piece
from dion_dtensor.orthonormalize.polynomial import Coefficients
from dion_dtensor.rules.muon import MOMENTUM_DEFAULTS, accumulated, check_momentum, corrects_bias
from dion_dtensor.rules.rule import Rule, Scalar, StateSpec, widest
from dion_dtensor.rules.shared import (
    POLYNOMIAL_DEFAULTS,
    check_variance,
    normalized_rows,
    orthonormalizer,
    polynomial_fields,
    to_dtype,
)
from dion_dtensor.whole_matrices import on_whole_matrices

__all__ = ["NORMUON", "VARIANCE_DEFAULTS"]

VARIANCE_DEFAULTS: dict[str, Any] = {"beta2": 0.95, "variance_epsilon": 1e-8}


class Hyper(NamedTuple):
    """What NorMuon's update reads; ``split``: of whole parameters, where shard boundaries cut the logical matrices."""

    mu: Scalar
    epsilon: Scalar
    beta2: Scalar
    momentum: str
    nesterov: bool
    bias_correction: bool
    variance_epsilon: Scalar
    coefficients: Coefficients
    epsilon_rule: str
    norm_factor: float
    compute_dtype: torch.dtype
    split: Split | None


class State(NamedTuple):
    """``momentum``: ``[N, m, n]``; ``variance``: ``[N, m, 1]``; ``step`` as Muon's."""

    momentum: Tensor
    variance: Tensor
    step: Tensor | None = None


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of a stack ``[N, m, n]``, or of whole parameters ``[N, *shape]``.

    Rows are normalized where their matrix is whole.
    """
    momentum, direction = accumulated(grad, state, hyper)
    orthonormalize = orthonormalizer(hyper)

    def normalized(X: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return normalized_rows(orthonormalize(X), variance, hyper.beta2, hyper.variance_epsilon)

    rounded = to_dtype(direction, hyper.compute_dtype)
    wide = to_dtype(state.variance, widest(state.variance))
    direction, variance = on_whole_matrices(each_piece(normalized, hyper.split), rounded, wide)
    return direction, State(
        to_dtype(momentum, state.momentum.dtype), to_dtype(variance, state.variance.dtype)
    )


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Momentum of the parameter's shape, and a number for each row."""
    return {"momentum": StateSpec(), "variance": StateSpec(dims=("row", None), sizes=(shape[0], 1))}


def check(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    check_momentum(group)
    check_variance(group)


NORMUON = Rule(
    name="normuon",
    update=update,
    hyper=Hyper,
    state=State,
    defaults={
        **MOMENTUM_DEFAULTS,
        **VARIANCE_DEFAULTS,
        **POLYNOMIAL_DEFAULTS,
    },
    scalars=("mu", "epsilon", "beta2", "variance_epsilon"),
    states=states,
    counts_steps=corrects_bias,
    cuts=lambda split: True,
    check=check,
    prepare=polynomial_fields,
)
