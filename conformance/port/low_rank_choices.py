"""Mistakes in Dion's factors, as steps of the oracle with one thing done otherwise: to name what a port does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.adapters.oracle import OracleAdapter
from dion_ref import ALGORITHMS
from dion_ref.dion import outer, power_iteration
from dion_ref.linalg import norm, normalize_columns
from dion_ref.matrices import each_matrix, step_pieces
from dion_ref.orth_dion import right_factor
from dion_ref.precision import FLOAT64, Precision
from dion_ref.update import apply_update

Right = Callable[[Tensor, float], Tensor]
"""The new right factor, of R and epsilon."""


def by_rows(R: Tensor, epsilon: float) -> Tensor:
    """Each row divided by its norm."""
    return R / (norm(R, dim=1) + epsilon)[:, None]


def by_frobenius(R: Tensor, epsilon: float) -> Tensor:
    """Divided by the norm of all of it."""
    return R / (norm(R) + epsilon)


def inside_the_root(R: Tensor, epsilon: float) -> Tensor:
    """Columns by their norms, with epsilon under the root."""
    return R / (norm(R, dim=0).square() + epsilon).sqrt()


@dataclass(frozen=True)
class LowRankChoice:
    """Dion or Orth-Dion with one thing done otherwise.

    Attributes:
        factor: on what is taken out of the momentum, of mu.
        with_Q: P Q^T is taken out, not P R^T.
        right: another right factor than the algorithm's.
        keeps_Q: the next step starts from the Q that this one started from.
    """

    factor: Callable[[float], float] = lambda mu: 1 - mu
    with_Q: bool = False
    right: Right | None = None
    keeps_Q: bool = False

    def step(
        self,
        W: Tensor,
        G: Tensor,
        state: Any,
        hyper: Any,
        *,
        split: Any = None,
        precision: Precision = FLOAT64,
    ) -> tuple[Tensor, Any]:
        """Arguments and result as `dion_ref.dion.step`."""
        if split is not None:
            return step_pieces(self.step, W, G, state, hyper, split, precision)
        dion = isinstance(hyper, ALGORITHMS["dion"].Hyper)
        transposed = W.shape[-2] < W.shape[-1]

        def one(W: Tensor, G: Tensor, M: Tensor, Q: Tensor) -> tuple[Tensor, ...]:
            B = (M + G).mT if transposed else M + G
            P, R, kept = power_iteration(B, Q)
            left = P
            if self.right is not None:
                new = torch.where(kept, self.right(R, hyper.epsilon), Q)
            elif dion:
                new = normalize_columns(torch.where(kept, R, Q), hyper.epsilon)
            else:
                new, independent = right_factor(R, Q, kept, hyper.epsilon)
                left = torch.where(independent, P, 0)
            B = B - self.factor(hyper.mu) * outer(P, new if self.with_Q else R, precision)
            U = outer(left, new, precision)
            if transposed:
                B, U = B.mT, U.mT
            return apply_update(W, U, hyper), B.contiguous(), Q if self.keeps_Q else new

        W, M, Q = each_matrix(one, W, G, state.momentum, state.Q)
        return W, type(state)(M, Q)


CHOICES: dict[str, dict[str, LowRankChoice]] = {
    "dion": {
        "Q not normalized": LowRankChoice(right=lambda R, _: R),
        "Q normalized by rows": LowRankChoice(right=by_rows),
        "Q normalized by its Frobenius norm": LowRankChoice(right=by_frobenius),
        "Q normalized with epsilon inside the root": LowRankChoice(right=inside_the_root),
    },
    "orth_dion": {"Q normalized by columns, not orthonormalized": LowRankChoice(right=normalize_columns)},
}
"""By algorithm, in words, what is wrong with its right factor."""
COMMON = {
    "error feedback with mu in place of 1 - mu": LowRankChoice(factor=lambda mu: mu),
    "no error feedback": LowRankChoice(factor=lambda _: 0.0),
    "error feedback of all of P R^T": LowRankChoice(factor=lambda _: 1.0),
    "Q in place of R in the error feedback": LowRankChoice(with_Q=True),
    "Q never updated": LowRankChoice(keeps_Q=True),
}
"""What either may have instead."""


class LowRankOracle(OracleAdapter):
    """The oracle with such a step."""

    def __init__(self, choice: LowRankChoice) -> None:
        self.choice = choice

    def rule(self, algorithm: str) -> Callable[..., tuple[Tensor, Any]]:
        """The step, whichever of the two algorithms it is."""
        return self.choice.step
