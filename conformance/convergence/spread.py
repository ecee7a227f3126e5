"""Means with their intervals, and steps to a target."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95% quantiles by degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval by Student's t.

    Attributes:
        mean, low, high: of the mean.
        deviation: standard deviation of the values.
        count: how many values.
    """

    mean: float
    low: float
    high: float
    deviation: float
    count: int

    def overlaps(self, other: Interval) -> bool:
        """True if a number lies in both."""
        return self.low <= other.high and other.low <= self.high


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of `values`; of infinite width for fewer than two, or where one is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return Interval(math.nan, -math.inf, math.inf, math.nan, len(values))
    mean = statistics.mean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf, math.nan, 1)
    deviation = statistics.stdev(values)
    half = STUDENT_95.get(len(values) - 1, 2.262) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, deviation, len(values))


def within_seeds(sides: Sequence[Mapping[int, float]]) -> list[Interval]:
    """The interval of each mean, without what a seed does to all sides alike.

    Each value less its seed's mean over the sides, plus the mean of all; deviations corrected by the root of
    ``k / (k - 1)`` for k sides (Morey 2008, "Confidence intervals from normalized data").  With two sides, the
    intervals overlap unless the mean difference is 1.4 times the half width of its own paired interval.

    Args:
        sides: values by seed, all of the same seeds.
    """
    count = len(sides)
    everything = [value for side in sides for value in side.values()]
    if count < 2 or not everything or not all(map(math.isfinite, everything)):
        return [interval(list(side.values())) for side in sides]
    mean = statistics.mean(everything)
    shift = {seed: mean - statistics.mean([side[seed] for side in sides]) for seed in sides[0]}
    made = []
    for side in sides:
        one = interval([value + shift[seed] for seed, value in side.items()])
        half = (one.high - one.mean) * math.sqrt(count / (count - 1))
        made.append(Interval(one.mean, one.mean - half, one.mean + half, one.deviation, one.count))
    return made


def steps_to(target: float, losses: Mapping[int, float]) -> float | None:
    """The step budget at which the loss reaches `target`, linear in the logarithm of the budget.

    Args:
        target: the loss.
        losses: final loss by step budget, of one seed.

    Returns:
        Infinity if no budget reaches the target; the smallest budget, a bound, if that one is below it already; None
        with fewer than two budgets.
    """
    points = sorted(losses.items())
    if len(points) < 2:
        return None
    if points[0][1] <= target:
        return float(points[0][0])
    for (before, above), (after, below) in itertools.pairwise(points):
        if above > target >= below:
            share = (above - target) / (above - below)
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return math.inf
