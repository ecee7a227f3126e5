"""The certificate as tables on a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from conformance.certify.output import LIMIT
from conformance.certify.runner import Certificate


def _units(value: float) -> str:
    if not math.isfinite(value):
        return "inf"
    return f"{value:.2g}" if value < 1e4 else f"{value:.1e}"


def show(certificate: Certificate, console: Console) -> None:
    """Largest error of every primitive and algorithm, the failures, then the mutants."""
    table = Table(
        title="The oracle against 50 digits", caption=f"unit: eps x condition number; limit {LIMIT:g}"
    )
    for heading in ("what", "worst case", "output"):
        table.add_column(heading, overflow="fold")
    for heading in ("cases", "failures", "largest error"):
        table.add_column(heading, justify="right")
    for group in certificate.groups:
        style = "red" if group.failed else None
        worst = group.worst
        table.add_row(
            group.name,
            worst.id,
            worst.output,
            str(group.cases),
            str(group.failed),
            _units(worst.units),
            style=style,
        )
    console.print(table)
    for case in certificate.cases:
        if case.failed:
            where = case.output or case.problem
            console.print(f"FAILED {case.id}: {_units(case.units)} units in {where}", markup=False)
    if certificate.mutants:
        mutants = Table(title="Wrong oracles")
        for heading in ("mistake", "noticed by", "output"):
            mutants.add_column(heading, overflow="fold")
        for heading in ("tried", "error", "caught"):
            mutants.add_column(heading, justify="right")
        for mutant in certificate.mutants:
            mutants.add_row(
                mutant.name, mutant.case, mutant.output, str(mutant.tried), _units(mutant.units),
                "yes" if mutant.caught else "NO", style=None if mutant.caught else "red",
            )  # fmt: skip
        console.print(mutants)
    failures = sum(case.failed for case in certificate.cases)
    caught = sum(mutant.caught for mutant in certificate.mutants)
    mistakes = f"{caught} of {len(certificate.mutants)} mutants caught; " if certificate.mutants else ""
    console.print(
        f"{len(certificate.cases)} cases, {failures} failures; {mistakes}{certificate.seconds:.0f} s",
        style="bold green" if certificate.passed else "bold red",
    )
