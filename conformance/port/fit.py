"""What a failing port seems to do: another preset, one choice otherwise than the convention it claims, or bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conformance.port.choices import changes
from conformance.port.execute import Outcome
from conformance.port.grading import error_of
from conformance.vectors import Case, VectorSet

SHOWN = 3
ENOUGH = 0.9
"""Share of the cases that an explanation has to match."""

Done = Sequence[tuple[Case, Outcome]]
Expected = tuple[NDArray[np.float64], float]
"""An update and its tolerance."""


@dataclass(frozen=True)
class Fit:
    """How well something explains what a port did on cases of the dialect that it claims.

    Attributes:
        algorithm, claimed, dtype: of the cases.
        explanation: a dialect, or the claimed one "with" another choice; empty if nothing explains it.
        matching, compared: cases within tolerance, and all.
        error: the largest update error of those within tolerance.
    """

    algorithm: str
    claimed: str
    dtype: str
    explanation: str
    matching: int
    compared: int
    error: float

    @property
    def share(self) -> float:
        """Of the cases, those that match."""
        return self.matching / self.compared if self.compared else 0.0

    def __str__(self) -> str:
        if not self.explanation:
            return "no known convention matches, nor this one with one choice changed"
        which = "all" if self.matching == self.compared else f"{self.matching} of"
        return f"matches {self.explanation} to {self.error:.0e} in {which} {self.compared} cases"


def fits(
    vectors: VectorSet, outcomes: Mapping[tuple[str, str], Outcome], failed: Iterable[tuple[str, str]]
) -> list[Fit]:
    """For every (algorithm, dialect, dtype) with a failure, what explains its cases better than what is claimed.

    Args:
        vectors: all cases; the siblings of a case have the same inputs in another dialect.
        outcomes: by (case, dtype), what the port did on one device.
        failed: (case, dtype) that failed.
    """
    found = []
    for algorithm, claimed, dtype in sorted(
        {(vectors[case].algorithm, vectors[case].dialect, dtype) for case, dtype in failed}
    ):
        done = [
            (vectors[case], outcome)
            for (case, of), outcome in outcomes.items()
            if of == dtype
            and (vectors[case].algorithm, vectors[case].dialect) == (algorithm, claimed)
            and vectors[case].result == "valid"
            and outcome.update is not None
        ]

        def fit(
            explanation: str,
            expected: Callable[[Case], Expected | None],
            group: tuple[str, str, str] = (algorithm, claimed, dtype),
            done: Done = done,
        ) -> Fit:
            return Fit(*group, explanation, *_compared(done, expected))

        own = fit(claimed, _own(dtype))
        tried = [
            fit(name, _sibling(vectors, claimed, name, dtype))
            for name in dict.fromkeys(case.dialect for case in vectors if case.algorithm == algorithm)
            if name != claimed
        ]
        better = _better(tried, own)
        if not better and done:
            cases = [case for case, _ in done]
            tried = [
                fit(f"{claimed} with {text}", _changed(change, dtype))
                for text, change in changes(algorithm, cases)
            ]
            better = _better(tried, own)
        if not better and dtype != "bfloat16":
            better = _better([fit(f"{claimed} computed in bfloat16", _own(dtype, "bfloat16"))], own)
        found += better or [Fit(algorithm, claimed, dtype, "", 0, own.compared, 0.0)]
    return found


def _better(tried: Sequence[Fit], own: Fit) -> list[Fit]:
    kept = [fit for fit in tried if fit.share >= ENOUGH and fit.share > own.share]
    return sorted(kept, key=lambda fit: (-fit.matching, fit.error))[:SHOWN]


def _compared(done: Done, expected: Callable[[Case], Expected | None]) -> tuple[int, int, float]:
    """Cases that match, cases compared, and the largest error of those that match; no more than settle it."""
    within: list[float] = []
    compared = 0
    for case, outcome in done:
        if compared - len(within) > (1 - ENOUGH) * len(done):
            break
        wanted = expected(case)
        if wanted is None or outcome.update is None:
            continue
        error = error_of("update", outcome.update, wanted[0])
        compared += 1
        if error <= wanted[1]:
            within.append(error)
    return len(within), compared, max(within, default=0.0)


def _allowed(case: Case, dtype: str) -> float | None:
    return (case.tolerance[dtype] or {}).get("update")


def _own(dtype: str, tolerance: str | None = None) -> Callable[[Case], Expected | None]:
    """What the case expects, within the tolerance of a dtype."""

    def expected(case: Case) -> Expected | None:
        allowed = _allowed(case, tolerance or dtype)
        return None if allowed is None else (case.expected["update"], allowed)

    return expected


def _sibling(vectors: VectorSet, claimed: str, dialect: str, dtype: str) -> Callable[[Case], Expected | None]:
    """What the case of the same name expects in another dialect."""

    def expected(case: Case) -> Expected | None:
        sibling = vectors.cases.get(case.id.replace(f"/{claimed}/", f"/{dialect}/", 1))
        if sibling is None or sibling.result != "valid":
            return None
        return _own(dtype)(sibling)

    return expected


def _changed(
    change: Callable[[Case], NDArray[np.float64] | None], dtype: str
) -> Callable[[Case], Expected | None]:
    """What the oracle does with one choice changed."""

    def expected(case: Case) -> Expected | None:
        allowed = _allowed(case, dtype)
        update = change(case) if allowed is not None else None
        return None if update is None or allowed is None else (update, allowed)

    return expected
