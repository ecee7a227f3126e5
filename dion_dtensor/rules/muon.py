"""Muon: momentum, orthonormalized (Jordan et al. 2024; conventions of microsoft/dion by default)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion_dtensor.assembly import elementwise
from dion_dtensor.matrices import Split, each_piece
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

__all__ = ["MOMENTUM_DEFAULTS", "MUON", "accumulated", "check_momentum", "corrects_bias"]

MOMENTUM_DEFAULTS: dict[str, Any] = {
    "mu": 0.95,
    "nesterov": False,
    "momentum": "sum",
    "bias_correction": False,
}


class Hyper(NamedTuple):
    """What Muon's update reads; ``split``: of whole parameters, where shard boundaries cut the logical matrices."""

    mu: Scalar
    epsilon: Scalar
    momentum: str
    nesterov: bool
    bias_correction: bool
    path: str
    coefficients: Coefficients
    epsilon_rule: str
    norm_factor: float
    compute_dtype: torch.dtype
    split: Split | None


class State(NamedTuple):
    """``momentum``: ``[N, m, n]``; ``step``: 0-d, this step included, None without bias correction."""

    momentum: Tensor
    step: Tensor | None = None


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of a stack ``[N, m, n]``, or of whole parameters ``[N, *shape]``."""
    momentum, direction = accumulated(grad, state, hyper)
    stored = State(to_dtype(momentum, state.momentum.dtype))
    if hyper.path == "gram" and hyper.split is None and gram_applies(direction):
        return by_gram(direction, hyper), stored
    rounded = to_dtype(direction, hyper.compute_dtype)
    return on_whole_matrices(each_piece(orthonormalizer(hyper), hyper.split), rounded), stored


def accumulated(grad: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Tensor]:
    """The new momentum, and what is to be orthonormalized."""
    mu, t = hyper.mu, state.step
    share = 1 - mu if hyper.momentum == "ema" else 1.0
    wide = widest(state.momentum, grad)

    def accumulate(momentum: Tensor, grad: Tensor) -> Tensor:
        total: Tensor = mu * momentum.to(wide) + share * grad.to(wide)
        return total

    def corrected(momentum: Tensor, grad: Tensor) -> Tensor:
        if not hyper.nesterov:
            average: Tensor = momentum / (1 - mu**t)
            return average
        return accumulate(momentum / (1 - mu ** (t + 1)), grad / (1 - mu**t))

    momentum = elementwise(accumulate, state.momentum, grad)
    if hyper.bias_correction:
        return momentum, elementwise(corrected, momentum, grad)
    return momentum, elementwise(accumulate, momentum, grad) if hyper.nesterov else momentum


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Muon keeps the momentum alone."""
    return {"momentum": StateSpec()}


def corrects_bias(group: Mapping[str, Any]) -> bool:
    """Whether the number of steps is read."""
    return bool(group["bias_correction"])


def check_momentum(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    check_polynomial(group)
    if group["momentum"] not in ("sum", "ema"):
        raise ValueError(f"momentum={group['momentum']!r} must be 'sum' or 'ema'; its factor is mu")
    if group["bias_correction"] and group["momentum"] != "ema":
        raise ValueError("bias_correction=True needs momentum='ema': a sum has no weights that add up to 1")


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
    defaults={**MOMENTUM_DEFAULTS, "path": "auto", **POLYNOMIAL_DEFAULTS},
    scalars=("mu", "epsilon"),
    states=states,
    counts_steps=corrects_bias,
    cuts=lambda split: True,
    check=check,
    prepare=polynomial_fields,
)
