"""Facts about one or two updates that any right implementation shows, whatever its first Q and without its state.

The weights start at zero, so the first update is ``U = -W / (lr * scale)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.convergence.drivers import Driver, Port

LR = 0.01
MU = 0.7
"""Far from 1, so that the error feedback is no small correction."""
SHAPES = ((48, 32), (32, 48), (32, 32))
FRACTION = 0.125
POLYNOMIAL_RANGE = (0.84, 1.15)
"""Singular values after Polar Express for inputs above 1e-3 (specification); others are computed."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Relative, by the dtype that the port orthonormalizes in."""


@dataclass(frozen=True)
class Fact:
    """One fact of one rule on one shape.

    Attributes:
        what: in words.
        value: as measured.
        low, high: where it must lie.
    """

    what: str
    value: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.low <= self.value <= self.high


def unit_facts(
    port: Port,
    algorithm: str,
    shape: tuple[int, int],
    *,
    hyper: Mapping[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    compute_dtype: torch.dtype | None = None,
) -> list[Fact]:
    """The facts of a rule on one shape.

    Args:
        port: takes one or two steps.
        algorithm: a matrix rule of `dion_ref.ALGORITHMS`; others have no such facts.
        shape: of the weight.
        hyper: further hyperparameters of the port's convention; the scale must be "spectral_norm".
        seed: of the gradient.
        dtype: of weight and gradient.
        compute_dtype: what the port orthonormalizes in; `dtype` if None.
    """
    run = _Run(port, algorithm, shape, hyper, seed, dtype)
    facts = _FACTS.get(algorithm)
    return [] if facts is None else facts(run, TOLERANCE[compute_dtype or dtype])


class _Run:
    """A port on one weight of zeros, seen by its updates alone."""

    def __init__(
        self,
        port: Port,
        algorithm: str,
        shape: tuple[int, int],
        hyper: Mapping[str, Any],
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self.algorithm, self.shape, self.dtype = algorithm, shape, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = torch.zeros(shape, dtype=dtype)
        extra: dict[str, Any] = {"weight_decay": 0.0, "mu": MU}
        if algorithm in ("dion", "orth_dion"):
            extra["rank_fraction"] = FRACTION
        if algorithm in ("dion2", "dion3"):
            extra["fraction"] = FRACTION
        self.driver: Driver = port.driver(algorithm, {"weight": self.weight}, {**hyper, **extra})

    def update(self, gradient: Tensor) -> Tensor:
        """One step; the update without learning rate and scale, in float64."""
        before = self.weight.to(torch.float64, copy=True)
        self.driver.step({"weight": gradient.to(self.dtype)}, LR)
        scale = (self.shape[0] / self.shape[1]) ** 0.5
        update: Tensor = (before - self.weight.double()) / (LR * scale)
        return update

    def gradient(self) -> Tensor:
        """Orthogonal factors around singular values that fall by 0.75 each, down to 0.03."""
        m, n = self.shape
        k = min(m, n)
        left = torch.linalg.qr(torch.randn(m, k, generator=self.generator, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(n, k, generator=self.generator, dtype=torch.float64)).Q
        values = torch.tensor([max(0.75**j, 0.03) for j in range(k)], dtype=torch.float64)
        made: Tensor = ((left * values) @ right.mT).to(self.dtype).double()
        return made


def _muon(run: _Run, tolerance: float) -> list[Fact]:
    G = run.gradient()
    U = run.update(G)
    product = U @ G.mT
    return [
        *_singular_values(U, min(U.shape), tolerance),
        Fact("U G^T is symmetric: the singular vectors are those of G", _asymmetry(product), 0, tolerance),
    ]


def _normuon(run: _Run, tolerance: float) -> list[Fact]:
    U = run.update(run.gradient())
    return _equal_rows(U, min(U.shape), tolerance)


def _dion(run: _Run, tolerance: float) -> list[Fact]:
    tall = run.shape[0] >= run.shape[1]
    rank = int(FRACTION * min(run.shape))
    G = run.gradient()
    facts = []
    B, P = (G if tall else G.mT), None
    for index, gradient in enumerate((G, G / 64)):
        U = run.update(gradient)
        U = U if tall else U.mT
        if P is not None:
            # what the error feedback leaves of the momentum, and the new gradient
            sketch = B.mT @ P
            B = B - (1 - MU) * P @ (P.mT @ B) + (gradient if tall else gradient.mT)
            expected = torch.linalg.qr(B @ sketch).Q
        # P Q^T with Q = B^T P D is P D P^T B, so this is P D P^T
        S = U @ torch.linalg.pinv(B)
        values, vectors = torch.linalg.eigh((S + S.mT) / 2)
        found, D = vectors[:, -rank:], values[-rank:]
        rest = float(values[:-rank].abs().max() / D.max())
        lengths = D * torch.linalg.vector_norm(B.mT @ found, dim=0)
        step = f"step {index + 1}: "
        facts += [
            Fact(step + "P D P^T is symmetric", _asymmetry(S), 0, tolerance),
            Fact(step + "eigenvalue r + 1 of P D P^T over the first", rest, 0, tolerance),
            Fact(
                step + "shortest column of Q (P^T P = I)", float(lengths.min()), 1 - tolerance, 1 + tolerance
            ),
            Fact(step + "longest column of Q", float(lengths.max()), 1 - tolerance, 1 + tolerance),
        ]
        if P is not None:
            outside = found - expected @ (expected.mT @ found)
            facts.append(Fact(step + "P outside the span of M Q", float(outside.norm()), 0, 3 * tolerance))
        P = found
    return facts


def _orth_dion(run: _Run, tolerance: float) -> list[Fact]:
    U = run.update(run.gradient())
    rank = int(FRACTION * min(run.shape))
    values = torch.linalg.svdvals(U)
    return [
        Fact("largest singular value of U", float(values[0]), 1 - tolerance, 1 + tolerance),
        Fact("singular value r of U", float(values[rank - 1]), 1 - tolerance, 1 + tolerance),
        Fact("singular value r + 1 of U", float(values[rank]), 0, tolerance),
    ]


def _selection(run: _Run, tolerance: float) -> list[Fact]:
    rows = run.algorithm == "dion3" or run.shape[0] <= run.shape[1]
    G = run.gradient()
    slices = G if rows else G.mT
    size = slices.shape[0]
    count = int(FRACTION * size)
    # Sizes such that the next choice tells which slices were decayed, and by how much: of the chosen ones half
    # fall below two others, and none falls below the rest.
    wanted = torch.full((size,), 0.1, dtype=torch.float64)
    half = count // 2
    wanted[:half], wanted[half:count], wanted[count : count + half] = 2.5, 1.2, 1.0
    order = torch.randperm(size, generator=run.generator)
    lengths = torch.empty_like(wanted)
    lengths[order] = wanted
    slices = slices * (lengths / slices.abs().sum(dim=1))[:, None]
    first, second = order[:count], torch.cat((order[:half], order[count : count + half]))
    G = slices if rows else slices.mT
    facts = []
    for step, expected in (("step 1", first), ("step 2", second)):
        U = run.update(G if step == "step 1" else G * 1e-6)
        U = U if rows else U.mT
        taken = torch.linalg.vector_norm(U, dim=1) > 1e-3
        wrong = len(set(torch.nonzero(taken).flatten().tolist()) ^ set(expected.tolist()))
        facts.append(Fact(f"{step}: slices wrongly chosen or left", float(wrong), 0, 0))
        if step == "step 1":
            chosen = U[first]
            own = _equal_rows if run.algorithm == "dion3" else _singular_values
            facts += own(chosen, count, tolerance)
    return facts


def _singular_values(U: Tensor, count: int, tolerance: float) -> list[Fact]:
    values = torch.linalg.svdvals(U)
    low, high = POLYNOMIAL_RANGE
    return [
        Fact("smallest singular value of U", float(values[count - 1]), low - tolerance, high + tolerance),
        Fact("largest singular value of U", float(values[0]), low - tolerance, high + tolerance),
    ]


def _equal_rows(U: Tensor, rank: int, tolerance: float) -> list[Fact]:
    lengths = torch.linalg.vector_norm(U, dim=1)
    low, high = POLYNOMIAL_RANGE
    return [
        Fact("longest row of U over the shortest", float(lengths.max() / lengths.min()), 1, 1 + tolerance),
        Fact(
            "||U||_F over the root of the rank",
            float(U.norm() / rank**0.5),
            low - tolerance,
            high + tolerance,
        ),
    ]


def _asymmetry(X: Tensor) -> float:
    return float((X - X.mT).norm() / X.norm())


_FACTS: Mapping[str, Callable[[_Run, float], list[Fact]]] = {
    "muon": _muon,
    "normuon": _normuon,
    "dion": _dion,
    "orth_dion": _orth_dion,
    "dion2": _selection,
    "dion3": _selection,
}
