"""Muon: momentum, orthonormalized (Jordan et al. 2024; conventions of microsoft/dion by default)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion_dtensor.assembly import elementwise, on_whole_matrices
from dion_dtensor.orthonormalize import newton_schulz, resolve_polynomial
from dion_dtensor.orthonormalize.polynomial import Coefficients, norm_factor_of
from dion_dtensor.rules.rule import Rule, Scalar, StateSpec, widest

__all__ = ["MUON"]


class Hyper(NamedTuple):
    """What Muon's update reads."""

    mu: Scalar
    epsilon: Scalar
    momentum: str
    nesterov: bool
    coefficients: Coefficients
    epsilon_rule: str
    norm_factor: float
    compute_dtype: torch.dtype


class State(NamedTuple):
    """``momentum``: ``[N, m, n]``."""

    momentum: Tensor


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of a stack ``[N, m, n]``."""
    share = 1 - hyper.mu if hyper.momentum == "ema" else 1.0

    wide = widest(state.momentum, grad)

    def accumulate(momentum: Tensor, grad: Tensor) -> Tensor:
        return hyper.mu * momentum.to(wide) + share * grad.to(wide)

    momentum = elementwise(accumulate, state.momentum, grad)
    direction = elementwise(accumulate, momentum, grad) if hyper.nesterov else momentum
    orthonormalize = partial(
        newton_schulz,
        coefficients=hyper.coefficients,
        epsilon=hyper.epsilon,
        epsilon_rule=hyper.epsilon_rule,
        norm_factor=hyper.norm_factor,
    )
    rounded = elementwise(lambda values: values.to(hyper.compute_dtype), direction)
    stored = elementwise(lambda values: values.to(state.momentum.dtype), momentum)
    return on_whole_matrices(orthonormalize, rounded), State(stored)


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Muon keeps the momentum alone."""
    return {"momentum": StateSpec()}


def check(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    if not 0 <= float(group["mu"]) < 1:
        raise ValueError(f"mu={group['mu']} must be in [0, 1)")
    if group["momentum"] not in ("sum", "ema"):
        raise ValueError(f"momentum={group['momentum']!r} must be 'sum' or 'ema'")
    if group["epsilon_rule"] not in ("add", "clamp"):
        raise ValueError(f"epsilon_rule={group['epsilon_rule']!r} must be 'add' or 'clamp'")
    resolve_polynomial(group["polynomial"])


def prepare(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, Any]:
    """The polynomial by its coefficients."""
    factor = group["norm_factor"]
    return {
        "coefficients": resolve_polynomial(group["polynomial"]),
        "norm_factor": norm_factor_of(group["polynomial"]) if factor is None else float(factor),
    }


MUON = Rule(
    name="muon",
    update=update,
    hyper=Hyper,
    state=State,
    defaults={
        "mu": 0.95,
        "nesterov": False,
        "momentum": "sum",
        "polynomial": "polar_express",
        "epsilon": 1e-8,
        "epsilon_rule": "add",
        "norm_factor": None,
        "scale": "spectral_norm",
    },
    scalars=("mu", "epsilon"),
    states=states,
    check=check,
    prepare=prepare,
)
