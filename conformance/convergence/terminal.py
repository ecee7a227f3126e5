"""The gate on the terminal: a line for each check that failed, a table, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.convergence.drivers import Port
from conformance.convergence.gate import Check, Gate, GateResult
from conformance.convergence.injections import Injection, clean_runs, inject, unseen


def make_console() -> Console:
    """Wide enough for the tables where no terminal tells its width."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


def show_gate(gate: Gate, port: Port) -> GateResult:
    """Runs the gate and prints its table."""
    console = make_console()
    with console.status("starting") as status:
        result = gate.run(
            port, on_check=lambda one: status.update(f"{one.part}: {one.algorithm}, {one.what}")
        )
    table = Table(title=f"Convergence gate (L5): {result.port}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("part", "algorithm", "checks", "verdict", "closest to its bound"):
        table.add_column(column)
    for part, algorithm in dict.fromkeys((check.part, check.algorithm) for check in result.checks):
        some = [check for check in result.checks if (check.part, check.algorithm) == (part, algorithm)]
        failed = [check for check in some if not check.passed]
        worst = (failed or sorted(some, key=_slack))[0]
        verdict = Text("FAIL", style="bold red") if failed else Text("pass", style="green")
        table.add_row(part, algorithm, str(len(some)), verdict, worst.why().removeprefix(f"{algorithm}, "))
    console.print(table)
    if result.not_claimed:
        console.print(f"not claimed by this port: {', '.join(result.not_claimed)}", highlight=False)
    passed = len(result.checks) - len(result.failures)
    console.print(
        f"{passed} of {len(result.checks)} checks passed in {result.seconds:.0f} s", highlight=False
    )
    return result


def _slack(check: Check) -> float:
    """Distance to the nearer bound, over the width."""
    width = check.high - check.low
    return min(check.value - check.low, check.high - check.value) / width if width and check.low else 1.0


def show_injections(seed: int) -> list[dict[str, Any]]:
    """Runs every injected bug through the gate and prints which part sees it."""
    console = make_console()
    table = Table(title="Injected bugs", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("algorithm", "bug", "facts", "regression", "first failed check"):
        table.add_column(column)

    def add(row: Injection) -> None:
        marks = [
            Text("caught", style="green") if part in row.seen_by else "-" for part in ("facts", "regression")
        ]
        why = row.first[-1].why().removeprefix(f"{row.algorithm}, ") if row.first else "NOT CAUGHT"
        table.add_row(row.algorithm, row.fault, *marks, why)
        status.update(f"{row.algorithm}: {row.fault}")

    with console.status("starting") as status:
        rows = inject(seed, on_row=add)
    console.print(table)
    console.print(f"{sum(row.caught for row in rows)} of {len(rows)} caught", highlight=False)
    for algorithm, fault, level in unseen():
        console.print(f"not detectable by training: {algorithm}, {fault}: {level} sees it", highlight=False)
    return [
        {"algorithm": row.algorithm, "bug": row.fault, "seen_by": list(row.seen_by),
         "why": [check.why() for check in row.first]}
        for row in rows
    ]  # fmt: skip


def show_clean_runs(seeds: Sequence[int], parts: tuple[str, ...]) -> list[int]:
    """Runs the oracle through the gate with fresh seeds and prints every false alarm."""
    console = make_console()

    def tell(seed: int, failures: list[Check]) -> None:
        said = "; ".join(check.why() for check in failures) or "passed"
        console.print(f"seed {seed}: {said}", highlight=False, soft_wrap=True)

    alarms = clean_runs(seeds, parts=parts, on_run=tell)
    console.print(f"{len(alarms)} false alarms in {len(seeds)} clean runs", highlight=False)
    return alarms
