"""Dion: one power iteration towards the momentum's leading singular directions, with error feedback.

Source: Ahn et al., arXiv 2504.05295; conventions of microsoft/dion (dion/dion_reference.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion_dtensor.assembly import (
    elementwise,
    norm,
    on_whole_matrices,
    product,
    reduced,
    transposed,
    whole_dim,
)
from dion_dtensor.orthonormalize import orthonormal_basis
from dion_dtensor.rules.rule import Rule, Scalar, StateSpec, widest

__all__ = ["DION"]


class Hyper(NamedTuple):
    """What Dion's update reads.  ``transposed``: P lies on the longer side, so B is M^T when m < n."""

    mu: Scalar
    epsilon: Scalar
    transposed: bool
    compute_dtype: torch.dtype


class State(NamedTuple):
    """``momentum``: ``[N, m, n]``; ``Q``: ``[N, min(m, n), r]``."""

    momentum: Tensor
    Q: Tensor


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of a stack ``[N, m, n]``; only ``m x r`` is ever assembled."""
    wide = widest(state.momentum, grad)
    momentum = elementwise(lambda M, G: M.to(wide) + G.to(wide), state.momentum, grad)
    B = transposed(momentum) if hyper.transposed else momentum
    Q = elementwise(lambda Q: Q.to(wide), whole_dim(state.Q, -1))

    roundings = elementwise(torch.mul, norm(Q, (-2,)), norm(B, (-2, -1)))
    P = on_whole_matrices(orthonormal_basis, product(B, Q), roundings)
    R = reduced(product(transposed(B), P))
    feedback = _outer(P, R, hyper.compute_dtype)
    B = elementwise(lambda B, PR: B - (1 - hyper.mu) * PR, B, feedback)

    # A dead column of P is zero, and keeps its old column of Q.
    Q = elementwise(lambda Q, R, length: torch.where(length > 0.5, R, Q), Q, R, norm(P, (-2,)))
    Q = elementwise(lambda Q, length: Q / (length + hyper.epsilon), Q, norm(Q, (-2,)))
    direction = _outer(P, Q, hyper.compute_dtype)

    if hyper.transposed:
        B, direction = transposed(B), transposed(direction)
    new = State(
        momentum=elementwise(lambda B: B.to(state.momentum.dtype), B),
        Q=elementwise(lambda Q: Q.to(state.Q.dtype), Q),
    )
    return direction, new


def _outer(P: Tensor, Q: Tensor, dtype: torch.dtype) -> Tensor:
    """``P Q^T``, multiplied in ``dtype``, returned in that of ``P``."""
    rounded = (elementwise(lambda values: values.to(dtype), factor) for factor in (P, transposed(Q)))
    return elementwise(lambda values: values.to(P.dtype), product(*rounded))


def rank(shape: tuple[int, ...], group: Mapping[str, Any]) -> int:
    """``multiple * ceil(rank_fraction * min(m, n) / multiple)``, at most min(m, n), in exact arithmetic."""
    multiple = int(group["rank_multiple"])
    # The decimal that the user wrote: ceil(0.07 * 100) is 8 in floats.
    exact = Fraction(str(group["rank_fraction"])) * min(shape) / multiple
    return min(multiple * -(-exact.numerator // exact.denominator), *shape)


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Momentum of the parameter's shape, Q on its shorter side."""
    m, n = shape
    side = "row" if m < n else "column"
    Q = StateSpec(dims=(side, "rank"), sizes=(min(m, n), rank(shape, group)), normal=True)
    return {"momentum": StateSpec(), "Q": Q}


def check(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    if not 0 <= float(group["mu"]) < 1:
        raise ValueError(f"mu={group['mu']} must be in [0, 1)")
    if not 0 < group["rank_fraction"] <= 1:
        raise ValueError(f"rank_fraction={group['rank_fraction']} must be in (0, 1]")
    if int(group["rank_multiple"]) < 1:
        raise ValueError(f"rank_multiple={group['rank_multiple']} must be at least 1")


def prepare(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, Any]:
    """Which side P lies on: a function of the full shape, never of the sharding."""
    return {"transposed": shape[0] < shape[1]}


DION = Rule(
    name="dion",
    update=update,
    hyper=Hyper,
    state=State,
    defaults={
        "mu": 0.95,
        "rank_fraction": 1.0,
        "rank_multiple": 1,
        "epsilon": 1e-8,
        "scale": "spectral_norm",
    },
    scalars=("mu", "epsilon"),
    states=states,
    check=check,
    prepare=prepare,
)
