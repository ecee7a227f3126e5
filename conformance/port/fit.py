"""Which convention a port seems to follow, by comparing what it did with what each preset would have done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from conformance.port.execute import Outcome
from conformance.port.grading import error_of
from conformance.vectors import Case, VectorSet


@dataclass(frozen=True)
class Fit:
    """How well a dialect explains what a port did on cases of the dialect that it claims.

    Attributes:
        algorithm, claimed, dtype: of the cases.
        dialect: the one that is tried.
        matching, compared: cases within tolerance, and all.
        error: the largest update error of those within tolerance, or of all where none is.
    """

    algorithm: str
    claimed: str
    dtype: str
    dialect: str
    matching: int
    compared: int
    error: float

    def __str__(self) -> str:
        if self.matching == self.compared:
            return f"matches {self.dialect} to {self.error:.0e} in all {self.compared} cases"
        if self.matching:
            return f"matches {self.dialect} to {self.error:.0e} in {self.matching} of {self.compared} cases"
        return f"nearest to {self.dialect}, off by {self.error:.2g} at most"


def fits(
    vectors: VectorSet, outcomes: Mapping[tuple[str, str], Outcome], failed: Iterable[tuple[str, str]]
) -> list[Fit]:
    """For every (algorithm, dialect, dtype) with a failure, the dialects that explain most of its cases.

    Args:
        vectors: all cases; the siblings of a case have the same inputs in another dialect.
        outcomes: by (case, dtype), what the port did on one device.
        failed: (case, dtype) that failed.
    """
    groups = {(vectors[case].algorithm, vectors[case].dialect, dtype) for case, dtype in failed}
    found = []
    for algorithm, claimed, dtype in sorted(groups):
        done = [
            (vectors[case], outcome)
            for (case, of), outcome in outcomes.items()
            if of == dtype and (vectors[case].algorithm, vectors[case].dialect) == (algorithm, claimed)
        ]
        dialects = dict.fromkeys(case.dialect for case in vectors if case.algorithm == algorithm)
        tried = [fit for name in dialects if (fit := _fit(vectors, done, claimed, name, dtype)) is not None]
        found += sorted(tried, key=lambda fit: (-fit.matching / fit.compared, fit.error))[:3]
    return found


def _fit(
    vectors: VectorSet, done: list[tuple[Case, Outcome]], claimed: str, dialect: str, dtype: str
) -> Fit | None:
    within: list[float] = []
    beyond: list[float] = []
    for case, outcome in done:
        sibling = vectors.cases.get(case.id.replace(f"/{claimed}/", f"/{dialect}/", 1))
        if sibling is None or sibling.result != "valid" or outcome.update is None:
            continue
        allowed = (sibling.tolerance[dtype] or {}).get("update")
        if allowed is None:
            continue
        error = error_of("update", outcome.update, sibling.expected["update"])
        (within if error <= allowed else beyond).append(error)
    compared = len(within) + len(beyond)
    if not compared:
        return None
    error = max(within) if within else max(beyond)
    algorithm = done[0][0].algorithm
    return Fit(algorithm, claimed, dtype, dialect, len(within), compared, error)
