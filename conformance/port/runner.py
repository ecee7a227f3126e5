"""Runs the cases that a port claims, and keeps a verdict for each, those not claimed included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from conformance.adapters import Adapter, Capabilities
from conformance.port.execute import Outcome, execute
from conformance.port.fit import Fit, fits, needs_momentum
from conformance.port.grading import (
    ACCEPTABLE,
    BAD,
    ERROR,
    FAIL,
    PASS,
    SKIP,
    UNCLAIMED,
    UNDECIDED,
    XFAIL,
    XPASS,
    Verdict,
    blank,
    grade,
)
from conformance.port.selection import Known, matches, reason
from conformance.port.worker import Worker
from conformance.vectors import Case, VectorSet


@dataclass(frozen=True)
class Selection:
    """What is to be run.

    Attributes:
        levels: of those that the port claims.
        dtypes: likewise; empty for all.
        only: patterns, of which a case has to match one; empty for all.
        skip, xfail: known failures.
    """

    levels: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    skip: tuple[Known, ...] = ()
    xfail: tuple[Known, ...] = ()

    def wants(self, case: str, level: str, dtype: str) -> bool:
        """True where level, dtype and patterns agree."""
        return (
            level in self.levels
            and (not self.dtypes or dtype in self.dtypes)
            and (not self.only or any(matches(case, dtype, pattern) for pattern in self.only))
        )

    def judged(self, verdict: Verdict) -> Verdict:
        """A verdict in the light of the xfail file: strict, so what was to fail and passed is bad."""
        why = reason(self.xfail, verdict.case, verdict.dtype)
        if why is None:
            return verdict
        if verdict.status in (FAIL, ERROR):
            return verdict.with_status(XFAIL, f"{why} ({verdict.message})")
        if verdict.status in (PASS, ACCEPTABLE):
            return verdict.with_status(
                XPASS, f"expected to fail ({why}), and did not: remove it from the file"
            )
        return verdict


@dataclass
class Run:
    """All verdicts on a port.

    Attributes:
        port: what it claims.
        verdicts: in the order of the cases.
        outcomes: by (case, dtype), of what was run on one device.
        fits: conventions that explain failures.
        levels, only: levels and patterns that were asked for.
        without_momentum: what was run on cases alone to which momentum makes no difference.
        command, options: what runs a case again as it was run: "port" or "meshes", and its further options.
        xfail: the option that names the file of known failures, for the cases that passed in spite of it.
    """

    port: Capabilities
    verdicts: list[Verdict] = field(default_factory=list)
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    fits: list[Fit] = field(default_factory=list)
    without_momentum: list[str] = field(default_factory=list)
    levels: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    command: str = "port"
    options: tuple[str, ...] = ()
    xfail: tuple[str, ...] = ()

    def count(self, *statuses: str) -> int:
        """Number of verdicts with one of these statuses."""
        return sum(verdict.status in statuses for verdict in self.verdicts)

    @property
    def passed(self) -> bool:
        """True when something passed, is acceptable or failed as it was to, and nothing is bad."""
        return self.count(PASS, ACCEPTABLE, XFAIL) > 0 and self.count(*BAD) == 0

    @property
    def exit_status(self) -> int:
        """0: passed; 1: something is bad; 2: nothing was run, or nothing that decides."""
        if self.count(SKIP, UNCLAIMED, UNDECIDED) == len(self.verdicts):
            return 2
        return 0 if self.passed else 1


def jobs(
    port: Capabilities, vectors: VectorSet, selection: Selection
) -> list[tuple[Case, str, Verdict | None]]:
    """Every selected (case, dtype), with the verdict where it is known without running it."""
    found: list[tuple[Case, str, Verdict | None]] = []
    for case in vectors:
        if case.deprecated is not None:
            continue
        dtypes = selection.dtypes or port.dtypes
        for dtype in dtypes:
            if not selection.wants(case.id, case.level, dtype):
                continue
            refusal, skipped = port.refusal(case, dtype), reason(selection.skip, case.id, dtype)
            verdict = None
            if refusal is not None:
                verdict = blank(case, dtype, UNCLAIMED, refusal)
            elif skipped is not None:
                verdict = blank(case, dtype, SKIP, skipped)
            found.append((case, dtype, verdict))
    return found


def run_vectors(
    adapter: str | Adapter,
    port: Capabilities,
    vectors: VectorSet,
    selection: Selection,
    *,
    timeout: float = 60.0,
    device: str = "cpu",
    on_verdict: Callable[[Verdict], None] = lambda _: None,
) -> Run:
    """L0 to L2 of a port.

    Args:
        adapter: its path, to run it in a process of its own, or the object, to run it in this one.
        port: what it claims.
        vectors: the cases.
        selection: which of them.
        timeout: seconds a case, when it has its own process.
        device: "cpu" or "cuda", likewise, for adapters that can be told.
        on_verdict: called with each.
    """
    run = Run(port, levels=selection.levels, only=selection.only)
    worker = Worker(adapter, timeout, device) if isinstance(adapter, str) else None
    try:
        for case, dtype, known in jobs(port, vectors, selection):
            verdict = known
            if verdict is None:
                outcome = worker.run(case, dtype) if worker is not None else execute(adapter, case, dtype)
                run.outcomes[case.id, dtype] = outcome
                verdict = selection.judged(grade(case, dtype, outcome, port.states))
            run.verdicts.append(verdict)
            on_verdict(verdict)
    finally:
        if worker is not None:
            worker.close()
    failed: Sequence[tuple[str, str]] = [
        (one.case, one.dtype)
        for one in run.verdicts
        if one.status == FAIL and one.level in ("L1", "L2") and vectors[one.case].result == "valid"
    ]
    if not selection.only:
        run.without_momentum = _without_momentum(run, vectors)
    run.fits = fits(vectors, run.outcomes, failed, given="state" in port.features)
    return run


def _without_momentum(run: Run, vectors: VectorSet) -> list[str]:
    """Algorithms and dialects of which L1 or L2 was run, but no case that a port without momentum would fail."""
    ran = [
        vectors[case]
        for case, _ in run.outcomes
        if vectors[case].level != "L0" and vectors[case].result == "valid"
    ]
    kinds = dict.fromkeys((case.algorithm, case.dialect) for case in ran)
    told = {(case.algorithm, case.dialect) for case in ran if needs_momentum(case)}
    return [f"{algorithm} ({dialect})" for algorithm, dialect in kinds if (algorithm, dialect) not in told]
