"""Relative errors of a step, and the bounds they are held to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def relative_error(value: Tensor, reference: Tensor) -> float:
    """`||value - reference||_F / ||reference||_F` in float64; 0 where both are zero, inf where only one is."""
    value, reference = value.double(), reference.double()
    size = float(torch.linalg.vector_norm(reference))
    difference = float(torch.linalg.vector_norm(value - reference))
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def align_columns(Q: Tensor, reference: Tensor) -> Tensor:
    """`Q` `[n, r]` with the sign of each column turned to that of `reference`: Dion leaves these signs free."""
    turn = torch.sign((Q.double() * reference.double()).sum(dim=-2, keepdim=True))
    return Q * torch.where(turn == 0, 1.0, turn).to(Q.dtype)


def nearest_lion_update(
    update: Tensor,
    reference: Tensor,
    exp_avg: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta: float,
    epsilon: float,
) -> tuple[Tensor, int]:
    """The right answer nearest to Lion's `update`, and in how many elements it is not `reference` itself.

    Lion takes the sign of `beta m + (1 - beta) g`. Rounding beta and the product once each moves either term by
    `epsilon` of itself (machine epsilon of the dtype under test); where the terms cancel to less than that, the
    dtype does not decide the sign: +1, -1 and 0 are right answers. Everywhere else `reference` is the only one.

    Args:
        update: `W_new - W_old` under test, float64.
        reference: the oracle's, float64, same shape.
        exp_avg, grad: before the step, same shape.
        lr, beta: learning rate and first beta.
        epsilon: machine epsilon of the dtype under test.
    """
    kept, fresh = beta * exp_avg.double(), (1 - beta) * grad.double()
    total = kept + fresh
    undecided = total.abs() <= epsilon * (kept.abs() + fresh.abs())
    sign, nearest = torch.sign(total), reference
    for answer in (reference + lr * sign, reference + 2 * lr * sign):
        closer = undecided & ((update - answer).abs() < (update - nearest).abs())
        nearest = torch.where(closer, answer, nearest)
    return nearest, int((nearest != reference).sum())


@dataclass(frozen=True)
class Series:
    """One quantity of one parameter, step by step.

    Attributes:
        parameter: fully qualified name.
        algorithm: its rule.
        quantity: "update", or the state's key.
        errors: relative error of every step.
        rerun: relative error of the oracle, rerun in the dtype under test (empty in float64).
        bound: what `errors` may reach.
    """

    parameter: str
    algorithm: str
    quantity: str
    errors: tuple[float, ...]
    rerun: tuple[float, ...]
    bound: float

    @property
    def largest(self) -> float:
        """Largest error of all steps; NaN and inf count as inf."""
        return max((error if math.isfinite(error) else math.inf for error in self.errors), default=math.inf)

    @property
    def used(self) -> float:
        """Largest error over bound: above 1 the series fails."""
        if self.bound > 0:
            return self.largest / self.bound
        return 0.0 if self.largest == 0.0 else math.inf

    @property
    def passed(self) -> bool:
        """True when every step is finite and within the bound."""
        return len(self.errors) > 0 and self.largest <= self.bound


def low_precision_bound(rerun: Iterable[float], factor: float) -> float:
    """`factor` times the largest error of the oracle's rerun, for one parameter over all steps."""
    return factor * max(rerun)


def tightest(series: Iterable[Series]) -> Series:
    """The series that uses most of its bound.

    Raises:
        ValueError: no series at all.
    """
    return max(series, key=lambda one: one.used)
