"""``conformance certify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from conformance.certify.mutants import mutants as all_mutants
from conformance.certify.report import show
from conformance.certify.runner import all_cases, run, sample
from conformance.report.live import live_bar


def certify(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
    cases: Annotated[
        int | None, typer.Option("--cases", min=1, help="Only this many cases, spread over all groups.")
    ] = None,
    mutants: Annotated[
        bool, typer.Option("--mutants/--no-mutants", help="Also see whether wrong oracles are caught.")
    ] = True,
) -> None:
    """Recompute the oracle with mpmath at 50 digits, by other methods, and show that mistakes would be seen.

    Errors are in units of float64 eps times the condition number that theory allows; more than 32 is a failure.
    Exit status 0 only if no case failed and every mutant was caught.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    everything = all_cases()
    chosen = sample(everything, cases)
    wrong = all_mutants() if mutants else []
    with live_bar(console) as progress:
        task = progress.add_task("", total=len(chosen) + len(wrong), completed=-1)

        def following(name: str) -> None:
            progress.update(task, description=name[:48].ljust(48), advance=1)

        certificate = run(chosen, wrong, everything, following)
    show(certificate, console)
    if json_file is not None:
        json_file.write_text(
            json.dumps(certificate.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    if not certificate.passed:
        raise typer.Exit(1)


def main() -> None:
    """``python -m conformance.certify``."""
    typer.run(certify)
