"""Lion: the sign of an interpolated momentum (Chen et al., arXiv 2302.06675; betas of microsoft/dion)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dion_dtensor.rules.adamw import check_betas
from dion_dtensor.rules.rule import Rule, Scalar, StateSpec, widest

__all__ = ["LION"]


class Hyper(NamedTuple):
    """What Lion's update reads."""

    betas: tuple[Scalar, Scalar]


class State(NamedTuple):
    """``exp_avg``: of the gradient's shape."""

    exp_avg: Tensor


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of any number of elements."""
    beta1, beta2 = hyper.betas
    wide = widest(state.exp_avg, grad)
    exp_avg, grad = state.exp_avg.to(wide), grad.to(wide)
    direction = (beta1 * exp_avg + (1 - beta1) * grad).sign()
    return direction, State((beta2 * exp_avg + (1 - beta2) * grad).to(state.exp_avg.dtype))


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """One average of the parameter's shape."""
    return {"exp_avg": StateSpec()}


LION = Rule(
    name="lion",
    update=update,
    hyper=Hyper,
    state=State,
    defaults={"betas": (0.9, 0.95)},
    scalars=("betas",),
    states=states,
    elementwise=True,
    check=check_betas,
)
