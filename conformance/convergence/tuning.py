"""The search of the rate and the momentum of every rule, on log grids that grow until the best is inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from conformance.convergence.training import Run

FACTOR = 2.0
BASE = 0.01
"""Every rate is BASE times a power of FACTOR, so that searches share their runs."""
LARGEST_EXTENSION = 8
DECAYS = (0.0, 0.2, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Where mu and the betas are looked for, wherever the search begins; beyond the last, 1 - beta halves."""
Loss = Callable[[Run], float]


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        run: the best run; its `lr` and `hyper` are the answer.
        tried: every (lr, loss) at the final momentum, by lr.
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
    """Finds the rate and the momentum (mu, or the betas of AdamW and Lion) with the smallest loss.

    One after the other, and both at once, a smaller rate with a larger momentum and the reverse, since the valley of
    the loss lies along that; until nothing changes. All rules get the same search, or the one with more freedom wins.

    Args:
        run: everything but the rate; `mu` or `betas` in its `hyper` is where that search begins.
        loss: trains and returns the held-out loss; infinite if the run diverged.
        start: where the search begins.
    """
    seen: dict[Run, float] = {}

    def value(one: Run) -> float:
        if one not in seen:
            seen[one] = loss(one)
        return seen[one]

    best = _best_rate(replace(run, lr=snapped(start)), value)
    momenta = [
        (name, place) for name, value_ in run.hyper if name in ("mu", "betas") for place in _places(value_)
    ]
    for _ in range(2 if momenta else 0):
        before = best
        for name, place in momenta:
            best = _best_decay(best, value, name, place)
            if place < 1:  # mu, or the first beta
                best = _best_decay(best, value, name, place, slanted=True)
        best = _best_rate(best, value)
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
        if math.isinf(exponents[best]):  # all diverged
            best = min(exponents)
        missing = [k for k in (best - 1, best + 1) if k not in exponents]
        if not missing:
            break
        exponents[missing[0]] = value(replace(run, lr=start * FACTOR ** missing[0]))
    best = min(exponents, key=lambda k: exponents[k])
    return replace(run, lr=start * FACTOR**best)


def _places(value: float | tuple[float, float]) -> tuple[int, ...]:
    """Where the numbers of a hyperparameter stand: the second beta first, as it matters less for the rate."""
    return (1, 0) if isinstance(value, tuple) else (-1,)


def _best_decay(run: Run, value: Loss, name: str, place: int, slanted: bool = False) -> Run:
    """Walks one decay factor along the grid while it gets better; slanted, the rate the other way with it.

    An average over more steps than the run has is refused, since it would stay where it began; AdamW corrects that.
    """
    start = _decay(run, name, place)
    values = sorted({*DECAYS, start})
    best, best_loss = run, value(run)
    for direction in (1, -1):
        decay, lr = start, run.lr
        while True:
            before, decay = decay, _neighbour(values, decay, direction)
            if decay == before:
                break  # there is no smaller one
            lr = lr / FACTOR**direction if slanted else lr
            if run.algorithm != "adamw" and (1 - decay) * run.steps < 1:
                break
            following = _with_decay(replace(run, lr=lr), name, place, decay)
            if value(following) >= best_loss:
                break
            best, best_loss = following, value(following)
        if best != run:
            break
    return best


def _neighbour(values: list[float], current: float, direction: int) -> float:
    index = max(0, values.index(current) + direction)
    if index == len(values):
        values.append(round(1 - (1 - current) / 2, 6))
    return values[index]


def _decay(run: Run, name: str, place: int) -> float:
    found = dict(run.hyper)[name]
    return float(found if place < 0 else found[place])


def _with_decay(run: Run, name: str, place: int, decay: float) -> Run:
    found: float | tuple[float, ...] = decay
    if place >= 0:
        pair = list(dict(run.hyper)[name])
        pair[place] = decay
        found = tuple(pair)
    return replace(run, hyper=tuple(sorted({**dict(run.hyper), name: found}.items())))
