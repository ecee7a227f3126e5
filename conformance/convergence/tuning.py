"""The search of the learning rate, and of AdamW's betas, on log grids that grow until the best is inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from conformance.convergence.training import Run

FACTOR = 2.0
BASE = 0.01
"""Every rate is BASE times a power of FACTOR, so that searches share their runs."""
LARGEST_EXTENSION = 8
BETAS1 = (0.8, 0.9, 0.95)
BETAS2 = (0.9, 0.95, 0.98, 0.99)
Loss = Callable[[Run], float]


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        run: the best run; its `lr` (and betas) are the answer.
        tried: every (lr, loss) of the final betas, by lr.
        at_edge: the best rate is the first or last tried: the search was stopped.
        runs: how many runs it took.
    """

    run: Run
    tried: tuple[tuple[float, float], ...]
    at_edge: bool
    runs: int


def snapped(lr: float) -> float:
    """The nearest rate of the grid."""
    return float(BASE * FACTOR ** round(math.log(lr / BASE, FACTOR)))


def tune(run: Run, loss: Loss, start: float) -> Tuned:
    """Finds the rate (and the betas, if the rule is AdamW) with the smallest loss.

    Args:
        run: everything but the rate; AdamW's `hyper` must have betas, where their search begins.
        loss: trains and returns the held-out loss; infinite if the run diverged.
        start: where the search begins.
    """
    seen: dict[Run, float] = {}

    def value(one: Run) -> float:
        if one not in seen:
            seen[one] = loss(one)
        return seen[one]

    best = _best_rate(replace(run, lr=snapped(start)), value)
    if run.algorithm == "adamw":
        for _ in range(2):
            before = best
            best = _best_beta(best, value, 1, BETAS2)
            best = _best_rate(_best_beta(best, value, 0, BETAS1), value)
            if best == before:
                break
    tried = sorted((one.lr, found) for one, found in seen.items() if one.hyper == best.hyper)
    at_edge = best.lr in (tried[0][0], tried[-1][0])
    return Tuned(best, tuple(tried), at_edge, len(seen))


def _best_rate(run: Run, value: Loss) -> Run:
    """Walks until both neighbours of the best rate are worse."""
    start = run.lr
    exponents = {k: value(replace(run, lr=start * FACTOR**k)) for k in (0, -1, 1)}
    for _ in range(LARGEST_EXTENSION):
        best = min(exponents, key=lambda k: exponents[k])
        missing = [k for k in (best - 1, best + 1) if k not in exponents]
        if not missing:
            break
        exponents[missing[0]] = value(replace(run, lr=start * FACTOR ** missing[0]))
    best = min(exponents, key=lambda k: exponents[k])
    return replace(run, lr=start * FACTOR**best)


def _best_beta(run: Run, value: Loss, index: int, grid: Sequence[float]) -> Run:
    """Walks one beta along the grid while it gets better; beyond its ends the grid goes on by halving 1 - beta."""
    start = dict(run.hyper)["betas"][index]
    values = sorted({*grid, start})
    best, best_loss = run, value(run)
    for direction in (1, -1):
        beta = start
        while best_loss > 0:
            beta = _neighbour(values, beta, direction)
            following = _with_beta(run, index, beta)
            if value(following) >= best_loss:
                break
            best, best_loss = following, value(following)
        if best != run:
            break
    return best


def _neighbour(values: list[float], current: float, direction: int) -> float:
    index = values.index(current) + direction
    if 0 <= index < len(values):
        return values[index]
    rest = (1 - current) * (0.5 if direction > 0 else 2.0)
    following = round(1 - rest, 6) if rest < 1 else 0.0
    values.insert(max(index, 0) if direction < 0 else len(values), following)
    return following


def _with_beta(run: Run, index: int, beta: float) -> Run:
    betas = list(dict(run.hyper)["betas"])
    betas[index] = beta
    return replace(run, hyper=tuple(sorted({**dict(run.hyper), "betas": tuple(betas)}.items())))
