"""The steps of the oracle with one plausible bug each, to show what the gate sees.

The steps are put together from the oracle's own pieces; with ``fault=None`` each is the oracle's step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from conformance.convergence.drivers import Driver, FunctionalDriver
from dion_ref import ALGORITHMS, FLOAT64, dion, dion2, dion3, muon, normuon
from dion_ref.linalg import norm, normalize_columns, top_slices
from dion_ref.update import apply_update, orthonormalize

Step = Callable[..., tuple[Tensor, Any]]


def dion_step(
    W: Tensor, G: Tensor, state: dion.State, hyper: dion.Hyper, fault: str | None = None
) -> tuple[Tensor, dion.State]:
    """Dion on one matrix ``[m, n]`` with one of the faults of `FAULTS`."""
    transposed = W.shape[0] < W.shape[1]
    M = state.momentum + G
    B, Q = (M.mT if transposed else M), state.Q
    if fault == "no QR":
        P, kept = normalize_columns(B @ Q, hyper.epsilon), torch.ones(Q.shape[1], dtype=torch.bool)
        R = B.mT @ P
    else:
        P, R, kept = dion.power_iteration(B, Q)
    match fault:
        case "no error feedback":
            B = hyper.mu * B
        case "momentum never decays":
            pass
        case "error feedback without its factor":
            B = B - P @ R.mT
        case "error feedback with mu for 1 - mu":
            B = B - hyper.mu * (P @ R.mT)
        case _:
            B = B - (1 - hyper.mu) * (P @ R.mT)
    new = torch.where(kept, R, Q)
    match fault:
        case "Q not normalized":
            Q = new
        case "Q divided by its Frobenius norm":
            Q = new * (new.shape[1] ** 0.5 / (norm(new) + hyper.epsilon))
        case "rows of Q normalized":
            Q = normalize_columns(new.mT, hyper.epsilon).mT
        case _:
            Q = normalize_columns(new, hyper.epsilon)
    U = P @ Q.mT
    if transposed:
        B, U = B.mT, U.mT
    return apply_update(W, U, hyper), dion.State(B.contiguous(), state.Q if fault == "Q frozen" else Q)


def selection_step(
    W: Tensor, G: Tensor, state: Any, hyper: Any, fault: str | None = None
) -> tuple[Tensor, Any]:
    """Dion2 or Dion3, by the type of `state`, on one matrix ``[m, n]`` with one of the faults of `FAULTS`."""
    with_variance = isinstance(state, dion3.State)
    dim = 0 if with_variance or W.shape[0] <= W.shape[1] else 1
    if fault == "slices of the other dim":
        dim = 1 - dim
    M = state.momentum + G
    size = M.shape[dim]
    count = hyper.count(size)
    match fault:
        case "random slices":
            # drawn from the data, so that a run can be repeated
            generator = torch.Generator().manual_seed(int(G.sum().view(torch.int64)) % 2**62)
            K = torch.randperm(size, generator=generator)[:count].sort().values
        case "the first slices":
            K = torch.arange(count)
        case "the smallest slices":
            order = M.abs().sum(dim=1 - dim).sort(stable=True).indices
            K = order[:count].sort().values
        case _:
            K = top_slices(M, count, dim)
    selected = M.index_select(dim, K)
    rows = orthonormalize(selected, hyper, FLOAT64)
    if with_variance:
        rows, v = _normalized(rows, state.variance[K], hyper, fault)
    U = torch.zeros_like(M).index_copy(dim, K, rows)
    match fault:
        case "all slices decayed":
            M = hyper.mu * M
        case "the other slices decayed":
            M = (hyper.mu * M).index_copy(dim, K, selected)
        case "no slice decayed":
            pass
        case "chosen slices cleared":
            M = M.index_fill(dim, K, 0.0)
        case _:
            M = M.index_copy(dim, K, hyper.mu * selected)
    new = dion3.State(M, state.variance.index_copy(0, K, v)) if with_variance else dion2.State(M)
    return apply_update(W, U, hyper), new


def muon_step(W: Tensor, G: Tensor, state: Any, hyper: Any, fault: str | None = None) -> tuple[Tensor, Any]:
    """Muon or NorMuon, by the type of `state`, on one matrix ``[m, n]`` with one of the faults of `FAULTS`."""
    t = state.step + 1
    match fault:
        case "no momentum":
            M, direction = G, G
        case "momentum never decays":
            M = direction = state.momentum + G
        case _:
            M, direction = muon.accumulate(state.momentum, G, hyper, t)
    if fault == "no orthonormalization":
        # of the same Frobenius norm as an orthonormal matrix
        U = direction * (min(direction.shape) ** 0.5 / (norm(direction) + hyper.epsilon))
    else:
        U = orthonormalize(direction, hyper, FLOAT64)
    if isinstance(state, normuon.State):
        U, v = _normalized(U, state.variance, hyper, fault)
        return apply_update(W, U, hyper), normuon.State(M, v, t)
    return apply_update(W, U, hyper), muon.State(M, t)


def _normalized(U: Tensor, v: Tensor, hyper: Any, fault: str | None) -> tuple[Tensor, Tensor]:
    match fault:
        case "rows not normalized":
            return U, v
        case "norm not restored":
            v = hyper.beta2 * v + (1 - hyper.beta2) * U.square().mean(dim=1, keepdim=True)
            return U / (v.sqrt() + hyper.variance_epsilon), v
        case _:
            return normuon.normalize_rows(U, v, hyper.beta2, hyper.variance_epsilon)


STEPS: Mapping[str, Step] = {
    "muon": muon_step,
    "normuon": muon_step,
    "dion": dion_step,
    "dion2": selection_step,
    "dion3": selection_step,
}
RESCALED: Mapping[str, Callable[[int, int], float]] = {
    "transposed scale": lambda m, n: n / m,
    "missing scale": lambda m, n: (n / m) ** 0.5,
    "updates of half the size": lambda m, n: 0.5,
}
"""What the update is multiplied by; the scale of every rule here is sqrt(m / n)."""

_SCALES = tuple(RESCALED)
_MUON = ("no orthonormalization", "no momentum", "momentum never decays")
_SELECTION = (
    "the other slices decayed",
    "all slices decayed",
    "no slice decayed",
    "chosen slices cleared",
    "random slices",
    "the first slices",
    "the smallest slices",
)
FAULTS: Mapping[str, tuple[str, ...]] = {
    "muon": (*_MUON, *_SCALES),
    "normuon": ("rows not normalized", "norm not restored", *_SCALES),
    "dion": (
        "no error feedback",
        "momentum never decays",
        "error feedback without its factor",
        "error feedback with mu for 1 - mu",
        "Q not normalized",
        "Q divided by its Frobenius norm",
        "rows of Q normalized",
        "no QR",
        "Q frozen",
        *_SCALES,
    ),
    "dion2": (*_SELECTION, "slices of the other dim", *_SCALES),
    "dion3": (*_SELECTION, "rows not normalized", "norm not restored", *_SCALES),
}
"""The bugs that the gate must catch, by algorithm."""

UNSEEN: Mapping[str, tuple[str, str]] = {
    "muon": ("EMA for sum, without Nesterov", "L1 step vectors (state) and L2 under a momentum warm-up"),
    "dion": ("(1 - mu) G for G", "L1 step vectors (state)"),
}
"""Bugs that rescale the momentum and nothing else: no training sees them; the level that does."""


def unseen_step(algorithm: str, W: Tensor, G: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Any]:
    """The bug of `UNSEEN` of `algorithm`, "muon" or "dion"."""
    return STEPS[algorithm](W, (1 - hyper.mu) * G, state, hyper)


@dataclasses.dataclass(frozen=True)
class FaultyPort:
    """The oracle in float64 with one bug in one algorithm.

    Attributes:
        algorithm: a key of `FAULTS`; the others are not claimed.
        fault: one of `FAULTS[algorithm]`, the name in `UNSEEN[algorithm]`, or None for no bug.
        seed: of Dion's first Q.
    """

    algorithm: str
    fault: str | None
    seed: int = 0

    @property
    def name(self) -> str:
        """As reports print it."""
        return f"{self.algorithm}: {self.fault}"

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The one algorithm."""
        return (self.algorithm,)

    def driver(self, algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Driver:
        """See `drivers.Port`."""
        one = ALGORITHMS[algorithm]
        return FunctionalDriver(
            lambda p, h, name: one.init(p.double(), h, name=name, seed=self.seed),
            self.step,
            parameters,
            lambda lr: one.Hyper(lr=lr, **hyper),
        )

    def step(self, W: Tensor, G: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Any]:
        """One faulty step in float64."""
        W, G = W.double(), G.double()
        if self.algorithm in UNSEEN and self.fault == UNSEEN[self.algorithm][0]:
            return unseen_step(self.algorithm, W, G, state, hyper)
        rescale = RESCALED.get(self.fault or "")
        new, state = STEPS[self.algorithm](W, G, state, hyper, None if rescale else self.fault)
        if rescale is not None:
            new = W + rescale(W.shape[0], W.shape[1]) * (new - W)
        return new, state
