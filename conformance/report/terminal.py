"""The job on the terminal: progress while it runs, one line a verdict, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.job.events import Started, Stepped
from conformance.job.results import SIMULATED, Row
from conformance.report.live import live_bar


def make_console(*, quiet: bool = False) -> Console:
    """The job's console; where no terminal tells its width, wide enough for the table."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(quiet=quiet, width=100)


class Monitor:
    """Shows the job's events: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, runs: int, steps: int, simulated: int) -> None:
        self.console = console
        self.began = time.monotonic()
        self.rows: list[Row] = []
        self._progress = live_bar(console)
        self._task = self._progress.add_task("starting the ranks", total=runs * steps + simulated)

    def __enter__(self) -> Monitor:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, rank: int, event: object) -> None:
        """Takes an event of the job; keeps the rows."""
        if isinstance(event, Row):
            self.rows.append(event)
            self._line(event)
            if event.kind == SIMULATED:
                self._advance()
        elif isinstance(event, Started):
            self._describe(f"{event.optimizer} {event.dtype} {event.mesh}")
        elif isinstance(event, Stepped):
            self._advance()

    def in_order(self) -> list[Row]:
        """The rows: trained ones as they came, then simulated ones by mesh."""
        trained = [row for row in self.rows if row.kind != SIMULATED]
        simulated = [row for row in self.rows if row.kind == SIMULATED]
        names = list(dict.fromkeys(row.optimizer for row in [*trained, *simulated]))
        return trained + sorted(simulated, key=lambda row: (names.index(row.optimizer), row.mesh))

    def _advance(self) -> None:
        self._progress.advance(self._task)

    def _describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def _line(self, row: Row) -> None:
        seconds = time.monotonic() - self.began
        self.console.print(
            f"[{seconds:6.1f} s] {verdict(row)} {row.optimizer} {row.dtype} on {row.mesh}: "
            f"largest update error {row.own.largest:.1e}, bound {row.own.bound:.1e}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if not row.passed:
            self.console.print(f"           {row.why()}", markup=False, highlight=False, soft_wrap=True)


def verdict(row: Row) -> str:
    """Either "pass" or "FAIL"."""
    return "pass" if row.passed else "FAIL"


def table(rows: Sequence[Row]) -> Table:
    """One line a row of the job."""
    made = Table(title="Optimizers against the float64 oracle", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("optimizer", "dtype", "mesh"):
        made.add_column(name)
    for name in ("update\nerror", "bound", "of\nbound", "loss"):
        made.add_column(name, justify="right")
    made.add_column("verdict")
    made.add_column("time", justify="right")
    for row in rows:
        loss = f"{row.losses[0]:.2f} > {row.losses[-1]:.2f}" if row.losses else "-"
        made.add_row(
            row.optimizer,
            row.dtype,
            row.mesh,
            f"{row.own.largest:.1e}",
            f"{row.own.bound:.1e}",
            f"{100 * row.tightest.used:.0f} %",
            loss,
            Text(verdict(row), style="green" if row.passed else "bold red"),
            f"{row.seconds:.1f} s",
        )
    return made


CAPTION = (
    "update error: ||dW - dW_oracle|| / ||dW_oracle||, the largest of all steps and of the parameters on the "
    "optimizer's own rule; of bound: the closest that any parameter's update or state (AdamW's included) came to "
    "its bound. Bounds: float64 1e-12 (Dion 1e-10); float32 and bf16 twice the error of the oracle's own rerun."
)


def summary(rows: Sequence[Row], expected: int, seconds: float) -> str:
    """The last line."""
    passed = sum(row.passed for row in rows)
    return f"{passed} of {expected} passed in {seconds:.0f} s"
