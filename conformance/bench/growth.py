"""How the step of ours grows: its time with N, m, n and the rank, the bytes that it sends with the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from conformance.bench.contenders import OURS, Case
from conformance.bench.measure import measure
from conformance.bench.products import flops
from conformance.bench.traffic import traffic
from dion_dtensor.planning import Bucket, choose, usual_hardware

__all__ = ["RANKS", "Line", "lines", "sent_lines", "slope"]

RANKS = "ranks"
"""The quantity of lines of bytes."""
PROCESSES = (2, 4, 8)


@dataclass(frozen=True)
class Line:
    """What was measured along one quantity, and what theory says.

    Attributes:
        algorithm: its name.
        quantity: "N", "m", "n" or "r", or RANKS.
        values: of the quantity.
        measured: median seconds of a step; bytes that a rank sends where the quantity is RANKS.
        expected: FLOPs of the textbook's products; bytes in closed form, of the way that is chosen.
    """

    algorithm: str
    quantity: str
    values: tuple[float, ...]
    measured: tuple[float, ...]
    expected: tuple[float, ...]

    @property
    def slope(self) -> float:
        """Exponent of the measured growth."""
        return slope(self.values, self.measured)

    @property
    def theory(self) -> float:
        """Exponent of the expected growth over the same values."""
        return slope(self.values, self.expected)


def slope(values: Sequence[float], sizes: Sequence[float]) -> float:
    """Least squares of log size against log value."""
    x, y = [math.log(value) for value in values], [math.log(size) for size in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def lines(
    base: Case, algorithms: Sequence[str], rounds: int, told: Callable[[str], None] = lambda _: None
) -> Iterator[Line]:
    """Each quantity from half of that of ``base`` to four times, the others fixed, as soon as it is measured.

    Args:
        base: size, dtype and device.
        algorithms: names; only dion, dion2 and dion3 have a rank.
        rounds: steps a point.
        told: is called with what is going on.

    Raises:
        RuntimeError: ours failed.
    """
    for algorithm in algorithms:
        case = replace(base, algorithm=algorithm)
        m, n = case.shape
        series: dict[str, list[tuple[float, Case]]] = {
            "N": [(c, replace(case, count=c)) for c in _doubled(case.count)],
            "m": [(k, replace(case, shape=(k, n))) for k in _doubled(m)],
            "n": [(k, replace(case, shape=(m, k))) for k in _doubled(n)],
        }
        if algorithm in ("dion", "dion2", "dion3"):
            parts = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
            series["r"] = [(part * m, replace(case, fraction=part)) for part in parts]
        for quantity, points in series.items():
            seconds = []
            for _, point in points:
                (entry,) = measure(point, rounds, names=[OURS], memory=False, told=told)
                if entry.failure:
                    raise RuntimeError(entry.failure)
                seconds.append(entry.median)
            yield Line(
                algorithm,
                quantity,
                tuple(value for value, _ in points),
                tuple(seconds),
                tuple(flops(p.algorithm, p.count, p.shape, p.part) for _, p in points),
            )


def _doubled(size: int) -> list[int]:
    return [max(1, size // 2), size, 2 * size, 4 * size]


def sent_lines(
    base: Case, algorithms: Sequence[str], told: Callable[[str], None] = lambda _: None
) -> Iterator[Line]:
    """The bytes that a rank sends, with as many matrices of the shape of ``base`` as there are ranks at most.

    Args:
        base: size and dtype.
        algorithms: names.
        told: is called with what is going on.

    Raises:
        RuntimeError: ours failed.
    """
    for algorithm in algorithms:
        case = replace(base, algorithm=algorithm, count=PROCESSES[-1])
        found, closed = [], []
        for ranks in PROCESSES:
            (row,) = traffic(case, ranks, told, names=(OURS,))
            if row.failure:
                raise RuntimeError(row.failure)
            found.append(row.bytes)
            bucket = Bucket(case.shape, case.count, (ranks,), (0,), compute_dtype=case.dtype)
            closed.append(choose(bucket, algorithm, usual_hardware(1), fraction=case.part).cost.bytes())
        yield Line(algorithm, RANKS, PROCESSES, tuple(found), tuple(closed))
