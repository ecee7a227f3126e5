"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), with the betas of microsoft/dion (dion/scalar_opts.py)."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dion_dtensor.rules.rule import Rule, Scalar, StateSpec, widest

__all__ = ["ADAMW", "check_betas"]


class Hyper(NamedTuple):
    """What AdamW's update reads."""

    betas: tuple[Scalar, Scalar]
    epsilon: Scalar


class State(NamedTuple):
    """``exp_avg``, ``exp_avg_sq``: of the gradient's shape; ``step``: 0-d, this step included."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of any number of elements."""
    beta1, beta2 = hyper.betas
    wide = widest(state.exp_avg, grad)
    grad = grad.to(wide)
    exp_avg = beta1 * state.exp_avg.to(wide) + (1 - beta1) * grad
    exp_avg_sq = beta2 * state.exp_avg_sq.to(wide) + (1 - beta2) * grad * grad
    denominator = exp_avg_sq.sqrt() / (1 - beta2**state.step) ** 0.5 + hyper.epsilon
    direction = exp_avg / (1 - beta1**state.step) / denominator
    dtype = state.exp_avg.dtype
    return direction, State(exp_avg.to(dtype), exp_avg_sq.to(dtype), state.step)


def fused(
    weights: list[Tensor],
    grads: list[Tensor],
    states: Mapping[str, list[Tensor]],
    group: Mapping[str, Any],
    step: float,
) -> None:
    """The same step by torch's kernel, which reads and writes everything once."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    # The kernel counts by itself, one 0-d tensor a parameter.
    steps = torch.full((len(weights),), step - 1, dtype=torch.float32, device=weights[0].device).unbind()
    adamw(
        weights,
        grads,
        states["exp_avg"],
        states["exp_avg_sq"],
        [],
        list(steps),
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=float(group["weight_decay"]),
        eps=float(group["epsilon"]),
        maximize=bool(group["maximize"]),
    )


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Two averages of the parameter's shape."""
    return {"exp_avg": StateSpec(), "exp_avg_sq": StateSpec()}


def check_betas(group: Mapping[str, Any]) -> None:
    """Refuse betas outside [0, 1), and one tensor of both."""
    betas = group["betas"]
    if (
        not isinstance(betas, tuple | list)
        or len(betas) != 2
        or not all(isinstance(beta, Real | Tensor) and 0 <= float(beta) < 1 for beta in betas)
    ):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")


ADAMW = Rule(
    name="adamw",
    update=update,
    hyper=Hyper,
    state=State,
    defaults={"betas": (0.9, 0.95), "epsilon": 1e-8},
    scalars=("betas", "epsilon"),
    states=states,
    elementwise=True,
    fused=fused,
    counts_steps=lambda group: True,
    check=check_betas,
)
