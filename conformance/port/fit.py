"""What a failing port seems to do: another preset, one choice otherwise than the convention it claims, or rounding."""

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
SEVERAL = 3
"""Fewer cases tell no convention: too many agree on them."""
ROUNDING = {"float32": 2.0**-26, "bfloat16": 2.0**-11}
"""What a computation in the dtype is off by at least, in half of the cases: a quarter of its unit roundoff or so."""
COARSER = {"float64": ("float32", "bfloat16"), "float32": ("bfloat16",), "bfloat16": ()}

Done = Sequence[tuple[Case, Outcome]]
Expected = tuple[NDArray[np.float64], float]
"""An update and its tolerance."""


@dataclass(frozen=True)
class Fit:
    """How well something explains what a port did on cases of the dialect that it claims.

    Attributes:
        algorithm, claimed, dtype: of the cases.
        explanation: a dialect, or the claimed one "with" another choice; the claimed one itself where the updates are
            its own; empty if nothing explains it.
        matching, compared: cases within tolerance, and all.
        error: the largest update error of those within tolerance.
        enough: the cases suffice to tell conventions from each other.
    """

    algorithm: str
    claimed: str
    dtype: str
    explanation: str
    matching: int
    compared: int
    error: float
    enough: bool = True

    @property
    def share(self) -> float:
        """Of the cases, those that match."""
        return self.matching / self.compared if self.compared else 0.0

    def __str__(self) -> str:
        if not self.enough:
            cases = "case" if self.compared == 1 else "cases"
            return (
                f"{self.compared} {cases} cannot tell what it follows: run all of its L1 and L2, and claim the "
                "features 'state', 'schedule:lr' and 'schedule:mu' if it has them"
            )
        if not self.explanation:
            return "no known convention matches, nor this one with one choice changed"
        which = "all" if self.matching == self.compared else f"{self.matching} of"
        if self.explanation == self.claimed:
            return f"the updates follow it, to {self.error:.0e} in {which} {self.compared} cases"
        return f"matches {self.explanation} to {self.error:.0e} in {which} {self.compared} cases"


def fits(
    vectors: VectorSet,
    outcomes: Mapping[tuple[str, str], Outcome],
    failed: Iterable[tuple[str, str]],
    given: bool = True,
) -> list[Fit]:
    """For every (algorithm, dialect, dtype) with a failure, what explains its cases better than what is claimed.

    Args:
        vectors: all cases; the siblings of a case have the same inputs in another dialect.
        outcomes: by (case, dtype), what the port did on one device.
        failed: (case, dtype) that failed.
        given: the port starts from given states.
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
        decided = [case for case, _ in done if _allowed(case, dtype) is not None]
        if not _telling(decided, given):
            found.append(Fit(algorithm, claimed, dtype, "", 0, len(decided), 0.0, enough=False))
            continue

        def fit(
            explanation: str,
            expected: Callable[[Case], Expected | None],
            group: tuple[str, str, str] = (algorithm, claimed, dtype),
            done: Done = done,
        ) -> Fit:
            cases, errors = _compared(done, expected)
            error = max(errors, default=0.0)
            return Fit(*group, explanation, len(errors), len(cases), error, _telling(cases, given))

        own = fit(claimed, _own(dtype))
        tried = [
            fit(name, _sibling(vectors, claimed, name, dtype))
            for name in dict.fromkeys(case.dialect for case in vectors if case.algorithm == algorithm)
            if name != claimed
        ]
        better = _better(tried, own)
        if not better:
            tried = [
                fit(f"{claimed} with {text}", _changed(change, dtype))
                for text, change in changes(algorithm, [case for case, _ in done])
            ]
            better = _better(tried, own)
        for coarser in COARSER[dtype] if not better else ():
            if not better and _rounded(done, coarser):
                text = f"{claimed} but for the rounding of {coarser}, or for a mistake of that size,"
                better = _better([fit(text, _own(dtype, coarser))], own)
        if not better and own.share >= ENOUGH:
            better = [own]
        found += better or [Fit(algorithm, claimed, dtype, "", 0, own.compared, 0.0)]
    return found


def _rounded(done: Done, dtype: str) -> bool:
    """Whether the updates are off by as much as a computation in the dtype leaves them."""
    errors = [
        error_of("update", one.update, case.expected["update"])
        for case, one in done
        if one.update is not None
    ]
    return bool(np.median(errors) >= ROUNDING[dtype])


def _better(tried: Sequence[Fit], own: Fit) -> list[Fit]:
    kept = [fit for fit in tried if fit.enough and fit.share >= ENOUGH and fit.share > own.share]
    return sorted(kept, key=lambda fit: (-fit.matching, fit.error))[:SHOWN]


def _telling(cases: Sequence[Case], given: bool) -> bool:
    """True for several cases, one of them from a given state or, where ports take none, of several steps.

    From zero, in one step, conventions of momentum give the same update.
    """
    return len(cases) >= SEVERAL and any(_warm(case) if given else case.steps > 1 for case in cases)


def needs_momentum(case: Case) -> bool:
    """True where a port without momentum gives another update: from a given state, or in several steps."""
    return case.steps > 1 or _warm(case)


def _warm(case: Case) -> bool:
    return any(
        name.startswith("state/") and name != "state/step" and "/Q" not in name and value.any()
        for name, value in case.inputs.items()
    )


def _compared(done: Done, expected: Callable[[Case], Expected | None]) -> tuple[list[Case], list[float]]:
    """The cases compared, and the errors of those that match; no more than settle it."""
    within: list[float] = []
    compared: list[Case] = []
    for case, outcome in done:
        if len(compared) - len(within) > (1 - ENOUGH) * len(done):
            break
        wanted = expected(case)
        if wanted is None or outcome.update is None:
            continue
        error = error_of("update", outcome.update, wanted[0])
        compared.append(case)
        if error <= wanted[1]:
            within.append(error)
    return compared, within


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
