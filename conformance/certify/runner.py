"""Runs cases and mutants, and keeps what came out."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mpmath
import torch

from conformance.certify.cases import Case
from conformance.certify.mutants import Mutant, replaced
from conformance.certify.output import LIMIT
from conformance.certify.precise import DIGITS, EPS, fifty_digits
from conformance.certify.primitive_cases import primitive_cases
from conformance.certify.primitives import UncleanCaseError
from conformance.certify.step_cases import step_cases


@dataclass(frozen=True)
class CaseResult:
    """The worst output of a case.

    Args:
        id, group: of the case.
        units: its largest error; inf if the oracle raised or returned something that isn't finite.
        output: which output that was.
        seconds: time taken.
        problem: what was raised, or empty.
    """

    id: str
    group: str
    units: float
    output: str
    seconds: float
    problem: str = ""

    @property
    def failed(self) -> bool:
        """Above the limit."""
        return not self.units <= LIMIT


@dataclass(frozen=True)
class MutantResult:
    """The first case that noticed a mutant, or the most it showed anywhere.

    Args:
        name: the mistake.
        caught: some case was above the limit.
        units, case, output: where it showed.
        tried: how many cases were run until then.
    """

    name: str
    caught: bool
    units: float
    case: str
    output: str
    tried: int


@dataclass(frozen=True)
class Group:
    """A row of the table: cases of one primitive or algorithm, with the worst of them."""

    name: str
    cases: int
    failed: int
    worst: CaseResult


@dataclass(frozen=True)
class Certificate:
    """All results of a run."""

    cases: Sequence[CaseResult]
    mutants: Sequence[MutantResult]
    seconds: float

    @property
    def passed(self) -> bool:
        """No case failed and every mutant that was tried was caught."""
        return not any(case.failed for case in self.cases) and all(mutant.caught for mutant in self.mutants)

    @property
    def groups(self) -> list[Group]:
        """The rows of the table, in the order of the cases."""
        rows: dict[str, list[CaseResult]] = {}
        for case in self.cases:
            rows.setdefault(case.group, []).append(case)
        return [
            Group(
                name, len(found), sum(case.failed for case in found), max(found, key=lambda case: case.units)
            )
            for name, found in rows.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain data; an infinite error is null."""
        return {
            "passed": self.passed,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "mpmath": mpmath.__version__,
                "mpmath_backend": mpmath.libmp.BACKEND,
            },
            "digits": DIGITS,
            "eps": EPS,
            "limit": LIMIT,
            "seconds": round(self.seconds, 2),
            "counts": {
                "cases": len(self.cases),
                "failures": sum(case.failed for case in self.cases),
                "mutants": len(self.mutants),
                "caught": sum(mutant.caught for mutant in self.mutants),
            },
            "groups": [
                {
                    "name": group.name,
                    "cases": group.cases,
                    "failures": group.failed,
                    "units": _finite(group.worst.units),
                    "worst_case": group.worst.id,
                    "worst_output": group.worst.output,
                }
                for group in self.groups
            ],
            "cases": [asdict(case) | {"units": _finite(case.units)} for case in self.cases],
            "mutants": [asdict(mutant) | {"units": _finite(mutant.units)} for mutant in self.mutants],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def all_cases() -> list[Case]:
    """Primitives first, then whole steps."""
    return [*primitive_cases(), *step_cases()]


def sample(cases: Sequence[Case], count: int | None) -> list[Case]:
    """At most ``count`` cases, spread evenly over the list; None for all."""
    if count is None or count >= len(cases):
        return list(cases)
    return [cases[index * len(cases) // count] for index in range(count)]


def run_case(case: Case, *, first_step_only: bool = False) -> CaseResult:
    """Judge one case; whatever the oracle raises is an infinite error.

    Raises:
        UncleanCaseError: the case itself is wrong.
    """
    begin, units, output, problem = time.perf_counter(), -1.0, "", ""
    try:
        with fifty_digits():
            for grade in case.grades(first_step_only=first_step_only):
                if grade.units > units:
                    units, output = grade.units, grade.output
    except UncleanCaseError:
        raise
    except Exception as error:
        units, output, problem = math.inf, "", f"{type(error).__name__}: {error}"
    return CaseResult(case.id, case.group, units, output, time.perf_counter() - begin, problem)


def run_mutant(mutant: Mutant, cases: Iterable[Case]) -> MutantResult:
    """Try the mutant on first steps of the cases of its groups until one is above the limit."""
    worst, tried = CaseResult("", "", -1.0, "", 0.0), 0
    with replaced(mutant.original, mutant.wrong(mutant.original)):
        for case in cases:
            if not case.group.startswith(mutant.groups):
                continue
            tried += 1
            result = run_case(case, first_step_only=True)
            if result.units > worst.units:
                worst = result
            if worst.failed:
                break
    return MutantResult(
        mutant.name, worst.failed, worst.units, worst.id, worst.output or worst.problem, tried
    )


def run(
    cases: Sequence[Case],
    mutants: Sequence[Mutant],
    mutant_cases: Sequence[Case],
    progress: Callable[[str], None],
) -> Certificate:
    """Judge the oracle, then see whether wrong ones would have been noticed.

    Args:
        cases: what the oracle is judged by.
        mutants: the wrong oracles.
        mutant_cases: what they are tried on.
        progress: called with the name of what comes next.
    """
    begin = time.perf_counter()
    results, found = [], []
    for case in cases:
        progress(case.id)
        results.append(run_case(case))
    for mutant in mutants:
        progress(f"mutant: {mutant.name}")
        found.append(run_mutant(mutant, mutant_cases))
    return Certificate(results, found, time.perf_counter() - begin)
