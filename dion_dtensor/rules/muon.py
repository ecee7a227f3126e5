"""Muon: momentum, orthonormalized (Jordan et al. 2024; conventions of microsoft/dion by default)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion_dtensor.assembly import elementwise
from dion_dtensor.matrices import SPLITS, Split, each_piece
from dion_dtensor.orthonormalize.polynomial import Coefficients
from dion_dtensor.rules.by_gram import by_gram, gram_applies
from dion_dtensor.rules.rule import Rule, Scalar, StateSpec, widest
from dion_dtensor.rules.shared import (
    POLYNOMIAL_DEFAULTS,
    check_polynomial,
    orthonormalizer,
    polynomial_fields,
    to_dtype,
)
from dion_dtensor.whole_matrices import on_whole_matrices

__all__ = ["MUON", "accumulated", "check_momentum"]


class Hyper(NamedTuple):
    """What Muon's update reads; ``split``: of whole parameters, where shard boundaries cut the logical matrices."""

    mu: Scalar
    epsilon: Scalar
    momentum: str
    nesterov: bool
    path: str
    coefficients: Coefficients
    epsilon_rule: str
    norm_factor: float
    compute_dtype: torch.dtype
    split: Split | None


class State(NamedTuple):
    """``momentum``: ``[N, m, n]``."""

    momentum: Tensor


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of a stack ``[N, m, n]``, or of whole parameters ``[N, *shape]``."""
    momentum, direction = accumulated(grad, state.momentum, hyper)
    stored = State(to_dtype(momentum, state.momentum.dtype))
    if hyper.path == "gram" and hyper.split is None and gram_applies(direction):
        return by_gram(direction, hyper), stored
    rounded = to_dtype(direction, hyper.compute_dtype)
    return on_whole_matrices(each_piece(orthonormalizer(hyper), hyper.split), rounded), stored


def accumulated(grad: Tensor, momentum: Tensor, hyper: Any) -> tuple[Tensor, Tensor]:
    """The new momentum, and what is to be orthonormalized."""
    share = 1 - hyper.mu if hyper.momentum == "ema" else 1.0
    wide = widest(momentum, grad)

    def accumulate(momentum: Tensor, grad: Tensor) -> Tensor:
        total: Tensor = hyper.mu * momentum.to(wide) + share * grad.to(wide)
        return total

    momentum = elementwise(accumulate, momentum, grad)
    return momentum, elementwise(accumulate, momentum, grad) if hyper.nesterov else momentum


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Muon keeps the momentum alone."""
    return {"momentum": StateSpec()}


def check_momentum(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    check_polynomial(group)
    if group["momentum"] not in ("sum", "ema"):
        raise ValueError(f"momentum={group['momentum']!r} must be 'sum' or 'ema'")


def check(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    check_momentum(group)
    if group["path"] not in ("auto", "assemble", "gram"):
        raise ValueError(f"path={group['path']!r} must be 'auto', 'assemble' or 'gram'")


MUON = Rule(
    name="muon",
    update=update,
    hyper=Hyper,
    state=State,
    defaults={"mu": 0.95, "nesterov": False, "momentum": "sum", "path": "auto", **POLYNOMIAL_DEFAULTS},
    scalars=("mu", "epsilon"),
    states=states,
    cuts=SPLITS,
    check=check,
    prepare=polynomial_fields,
)
