"""A noisy linear regression whose result depends on every part of a rule: error feedback, selection, scale.

The gradient is ``(W - W*) C + noise``.  C, the covariance of the inputs, has a few strong features and many weak
ones, and the noise is proportional to the feature's variance.  A rule that only follows what is large at each step
never learns the weak features; what is left of their loss tells rules, and bugs, apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.convergence.drivers import Port


@dataclass(frozen=True)
class Regression:
    """One problem.

    Attributes:
        rows, columns: shape of W; the columns are the input features.
        strong: number of features of variance 1.
        weak_deviation: standard deviation of the others.
        noise: standard deviation of the gradient's noise, relative to the variance of its feature.
        target: standard deviation of ``W*`` times the root of `columns`.
        steps: number of steps; the rate decays linearly to zero over them.
        lr: first learning rate.
    """

    rows: int
    columns: int
    strong: int = 4
    weak_deviation: float = 0.3
    noise: float = 0.2
    target: float = 0.3
    steps: int = 300
    lr: float = 0.02

    @property
    def shape(self) -> str:
        """As reports print it."""
        return f"{self.rows}x{self.columns}"


PROBLEMS = (Regression(64, 64), Regression(128, 32), Regression(32, 128))


def score(
    port: Port,
    algorithm: str,
    hyper: Mapping[str, Any],
    problem: Regression,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> float:
    """What is left of the weak features' excess loss, relative to the start (1 means that nothing was learned).

    Args:
        port: takes the steps.
        algorithm: the rule.
        hyper: its hyperparameters without `lr`.
        problem: the problem.
        seed: of ``W*``, of the noise, and of the parameter's name, which keys Dion's first Q.
        dtype: of parameters and gradients.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    m, n = problem.rows, problem.columns
    deviation = torch.full((n,), problem.weak_deviation, dtype=torch.float64)
    # strong features lie at random places: a rule that takes the first columns gains nothing
    deviation[torch.randperm(n, generator=generator)[: problem.strong]] = 1.0
    goal = normal(m, n) * problem.target / n**0.5
    weight = torch.zeros(m, n, dtype=dtype)
    driver = port.driver(algorithm, {f"weight{seed}": weight}, hyper)
    for step in range(problem.steps):
        gradient = (weight.double() - goal) * deviation**2 + problem.noise * normal(m, n) * deviation**2
        driver.step({f"weight{seed}": gradient.to(dtype)}, problem.lr * (1 - step / problem.steps))
    weak = deviation < 1
    left = ((weight.double() - goal)[:, weak]).square().sum()
    return float(left / goal[:, weak].square().sum())
