"""Other ways to the same numbers: these share no method with the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dion_ref import ALGORITHMS

ALL = tuple(ALGORITHMS)
SCALAR = ("adamw", "lion")
MATRIX = tuple(name for name in ALL if name not in SCALAR)
NEWTON_SCHULZ = ("muon", "normuon", "dion2", "dion3")
LOW_RANK = ("dion", "orth_dion")


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def relative(given: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(given - wanted) / torch.linalg.vector_norm(wanted))


def low_rank(rows: int, columns: int, rank: int, seed: int = 0) -> Tensor:
    return gaussian(rows, rank, seed=seed) @ gaussian(rank, columns, seed=seed + 1)


def on_singular_values(
    M: Tensor, coefficients: Sequence[tuple[float, float, float]], divisor: float
) -> Tensor:
    """The polynomial applied to each singular value of M / divisor: Newton-Schulz without iterating on a matrix."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    S = S / divisor
    for a, b, c in coefficients:
        S = a * S + b * S**3 + c * S**5
    return U @ torch.diag(S) @ Vh


def gram_schmidt(A: Tensor, negligible: Tensor) -> tuple[Tensor, list[bool]]:
    """Column by column, each projected twice; skips what is not new beside the rounding of what it is made of."""
    basis, kept = torch.zeros_like(A), []
    for j in range(A.shape[1]):
        column = A[:, j].clone()
        for _ in range(2):
            for i in range(j):
                column = column - basis[:, i] * (basis[:, i] @ column)
        size = math.sqrt(float(column @ column))
        earlier = [k for k, alive in enumerate(kept) if alive]
        c = (
            torch.linalg.lstsq(A[:, earlier], A[:, j : j + 1]).solution.flatten()
            if earlier
            else A.new_zeros(0)
        )
        kept.append(size > math.hypot(float(negligible[j]), *(c * negligible[earlier]).tolist()))
        if kept[-1]:
            basis[:, j] = column / size
    return basis, kept


def run(name: str, W: Tensor, grads: Sequence[Tensor], hyper: object, **options: object):
    """Weights and state after a step for each gradient."""
    algorithm = ALGORITHMS[name]
    state = algorithm.init(W, hyper, name="weight", **options)
    for grad in grads:
        W, state = algorithm.step(W, grad, state, hyper, **options)
    return W, state


def tensors_of(state: object) -> dict[str, Tensor]:
    return {key: value for key, value in vars(state).items() if isinstance(value, Tensor)}
