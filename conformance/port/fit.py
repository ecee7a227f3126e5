"""What a failing port seems to do: another preset, one choice otherwise than the convention it claims, or rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from conformance.port.choices import changes
from conformance.port.execute import Outcome
from conformance.port.grading import acceptable, error_of
from conformance.vectors import Case, VectorSet

SHOWN = 3
NAMED = 4
"""So many of the cases that an explanation does not match are named."""
ENOUGH = Fraction(9, 10)
"""Share of the cases that an explanation has to match; exact, so that 18 of 20 are enough."""
SEVERAL = 3
"""Fewer cases tell no convention: too many agree on them."""
ROUNDING = {"float32": 2.0**-26, "bfloat16": 2.0**-11}
"""What a computation in the dtype is off by at least, in half of the cases: a quarter of its unit roundoff or so."""
COARSER = {"float64": ("float32", "bfloat16"), "float32": ("bfloat16",), "bfloat16": ()}

Done = Sequence[tuple[Case, Outcome]]
Expected = tuple[NDArray[np.float64], float, Case]
"""An update, its tolerance, and the case of which it may be acceptable too."""


@dataclass(frozen=True)
class Fit:
    """How well something explains what a port did on cases of the dialect that it claims.

    Attributes:
        algorithm, claimed, dtype: of the cases.
        explanation: a dialect, or the claimed one "with" another choice; the claimed one itself where the updates are
            its own; empty if nothing explains it.
        matching, compared: cases within tolerance, and all; what is merely acceptable is no case of either.
        error: the largest update error of those within tolerance.
        enough: the cases suffice to tell conventions from each other.
        misses: ids of the cases that do not match.
    """

    algorithm: str
    claimed: str
    dtype: str
    explanation: str
    matching: int
    compared: int
    error: float
    enough: bool = True
    misses: tuple[str, ...] = ()

    @property
    def share(self) -> Fraction:
        """Of the cases, those that match."""
        return Fraction(self.matching, self.compared) if self.compared else Fraction(0)

    def __str__(self) -> str:
        if not self.enough:
            cases = "case" if self.compared == 1 else "cases"
            return (
                f"{self.compared} {cases} cannot tell what it follows: run all of its L1 and L2, and claim the "
                "features 'state', 'schedule:lr' and 'schedule:mu' if it has them"
            )
        cases = f"{self.matching or 'none'} of {self.compared} cases{self._but()}"
        if not self.explanation:
            return (
                f"nothing that was tried explains it, no other convention and not {self.claimed} with one choice "
                f"changed; {self.claimed} itself fits {cases}"
            )
        which = f"all {self.compared} cases" if self.matching == self.compared else cases
        found = f"within tolerance in {which} (largest error {self.error:.0e})"
        if self.explanation == self.claimed:
            return f"the updates follow it, {found}"
        return f"matches {self.explanation} {found}"

    def _but(self) -> str:
        """The cases that do not match, where that is not all of them."""
        if not self.matching or not self.misses:
            return ""
        more = f" and {len(self.misses) - NAMED} more" if len(self.misses) > NAMED else ""
        return f", not {', '.join(self.misses[:NAMED])}{more}"


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
            settled: bool = True,
        ) -> Fit:
            cases, errors = _compared(done, expected, group[2], settled)
            misses = tuple(case.id for case in cases if case.id not in errors)
            error = max(errors.values(), default=0.0)
            enough = _telling(cases, given)
            return Fit(*group, explanation, len(errors), len(cases), error, enough, misses)

        own = fit(claimed, _own(dtype), settled=False)
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
        found += better or [replace(own, explanation="", enough=True)]
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
    """The best of what matches enough cases, and more than the claimed convention does."""
    kept = [fit for fit in tried if fit.enough and fit.share >= ENOUGH and fit.share > own.share]
    whole = [fit for fit in kept if fit.share == 1]  # beside these, one that misses a case explains nothing
    return sorted(whole or kept, key=lambda fit: (-fit.matching, fit.error))[:SHOWN]


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


def _compared(
    done: Done, expected: Callable[[Case], Expected | None], dtype: str, settled: bool
) -> tuple[list[Case], dict[str, float]]:
    """The cases compared, and by id the errors of those that match; if `settled`, no more than settle it."""
    within: dict[str, float] = {}
    compared: list[Case] = []
    for case, outcome in done:
        if settled and len(compared) - len(within) > (1 - ENOUGH) * len(done):
            break
        wanted = expected(case)
        if wanted is None or outcome.update is None:
            continue
        update, allowed, of = wanted
        error = error_of("update", outcome.update, update)
        if error <= allowed:
            within[case.id] = error
        elif acceptable(of, dtype, outcome.update, allowed) is not None:
            continue
        compared.append(case)
    return compared, within


def _allowed(case: Case, dtype: str) -> float | None:
    return (case.tolerance[dtype] or {}).get("update")


def _own(dtype: str, tolerance: str | None = None) -> Callable[[Case], Expected | None]:
    """What the case expects, within the tolerance of a dtype."""

    def expected(case: Case) -> Expected | None:
        allowed = _allowed(case, tolerance or dtype)
        return None if allowed is None else (case.expected["update"], allowed, case)

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
        return None if update is None or allowed is None else (update, allowed, case)

    return expected
