"""A sweep while it runs: a bar with the time left on a terminal, a line a task elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import TextColumn

from conformance.convergence.planning import Plan
from conformance.convergence.spread import interval
from conformance.convergence.studies import Task
from conformance.convergence.sweep import Result
from conformance.convergence.training import Outcome, Run
from conformance.report.live import live_bar


class Monitor:
    """Shows the tasks of a plan and foresees when they end.

    Attributes:
        slowness: time taken over time expected, so far.
    """

    def __init__(self, console: Console, plan: Plan, now: Callable[[], float] = time.monotonic) -> None:
        """Takes the plan whose tasks will be started and done in order, and the clock."""
        self.console, self.plan, self._now = console, plan, now
        self.slowness = 1.0
        self._began = self._task_began = now()
        self._left = plan.total
        self._spent = self._expected = 0.0
        self._trained = 0
        self._progress = live_bar(console, TextColumn("{task.fields[left]} left"))
        self._bar = self._progress.add_task("starting", total=max(plan.total, 1e-9), left=self.left())

    def __enter__(self) -> Monitor:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def left(self) -> str:
        """Time left in words."""
        seconds = max(0.0, self._left * self.slowness)
        return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"

    def add(self, task: Task) -> None:
        """A task that was not in the plan will be done too."""
        self._left += self.plan.seconds[task.name]

    def start(self, task: Task) -> None:
        """A task begins."""
        self._task_began = self._now()
        self._show(task.name)

    def on_run(self, run: Run, outcome: Outcome, fresh: bool) -> None:
        """A run was needed."""
        if fresh:
            self._trained += 1

    def done(self, task: Task, result: Result | None) -> None:
        """A task has ended."""
        expected = self.plan.seconds[task.name]
        self._left -= expected
        if expected > 0:  # one that was finished before says nothing, whatever is trained for it now
            self._spent += self._now() - self._task_began
            self._expected += expected
            self.slowness = max(0.3, self._spent / self._expected)
        self._progress.advance(self._bar, expected)
        if result is None:
            said = "cut off by the deadline"
        else:
            losses = interval(list(result.final.values()))
            said = f"lr {result.tuned.run.lr:.4g}, loss {losses.mean:.4f}, sd {losses.deviation:.4f}"
        seconds = self._now() - self._began
        self.console.print(
            f"[{seconds:6.0f} s, {self.left()} left] {task.name}: {said}", markup=False, highlight=False
        )

    def _show(self, name: str) -> None:
        self._progress.update(self._bar, description=name, left=self.left())
