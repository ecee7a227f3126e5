"""The gate's teeth: every fault of `faults` must fail, the oracle must pass with any seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conformance.convergence.drivers import OraclePort
from conformance.convergence.faults import FAULTS, UNSEEN, FaultyPort
from conformance.convergence.gate import Check, Gate

INJECTED_PARTS = ("facts", "regression")
"""Enough for every fault, and quick; the GPT sees gross ones only."""


@dataclass(frozen=True)
class Injection:
    """One fault and what the gate said.

    Attributes:
        algorithm, fault: as in `FAULTS`.
        seen_by: the parts that failed.
        first: the first failed check of each of those parts.
    """

    algorithm: str
    fault: str
    seen_by: tuple[str, ...]
    first: tuple[Check, ...]

    @property
    def caught(self) -> bool:
        """True if any part failed."""
        return bool(self.seen_by)


def inject(
    seed: int = 0,
    *,
    algorithms: Sequence[str] = tuple(FAULTS),
    parts: Sequence[str] = INJECTED_PARTS,
    on_row: Callable[[Injection], None] = lambda row: None,
) -> list[Injection]:
    """Runs the gate on the oracle with each fault.

    Args:
        seed: of the gate.
        algorithms: keys of `FAULTS`.
        parts: of the gate; each is run by itself, so that the table tells which of them sees what.
        on_row: told each row when it is done.
    """
    rows = []
    for algorithm in algorithms:
        for fault in FAULTS[algorithm]:
            first = []
            for part in parts:
                found = Gate(parts=(part,), seed=seed).run(FaultyPort(algorithm, fault), stop_at_failure=True)
                first += found.failures[:1]
            rows.append(Injection(algorithm, fault, tuple(check.part for check in first), tuple(first)))
            on_row(rows[-1])
    return rows


def clean_runs(
    seeds: Sequence[int],
    *,
    parts: Sequence[str] = INJECTED_PARTS,
    on_run: Callable[[int, list[Check]], None] = lambda seed, failures: None,
) -> list[int]:
    """Runs the gate on the oracle with fresh seeds; the seeds with a false alarm."""
    alarms = []
    for seed in seeds:
        failures = Gate(parts=parts, seed=seed).run(OraclePort(seed=seed)).failures
        if failures:
            alarms.append(seed)
        on_run(seed, failures)
    return alarms


def unseen() -> list[tuple[str, str, str]]:
    """Faults that rescale the momentum and nothing else: rule, fault, and the level that sees it."""
    return [(algorithm, fault, level) for algorithm, (fault, level) in UNSEEN.items()]
