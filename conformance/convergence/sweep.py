"""Does the tasks of a plan: tunes, trains the seeds, brackets the target, and keeps every run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from conformance.convergence.drivers import Port
from conformance.convergence.store import Store
from conformance.convergence.studies import Task
from conformance.convergence.training import Outcome, Run, train
from conformance.convergence.tuning import Tuned, tune

BUDGETS = tuple(2 ** (k / 2) for k in range(-4, 4))
"""Step budgets over the study's own: 1/4 to 2.8."""


class OutOfTimeError(Exception):
    """The deadline would pass before the next run ends."""


@dataclass(frozen=True)
class Result:
    """What was measured of a task.

    Attributes:
        task: the task.
        tuned: the search of its rate.
        losses: held-out loss by step budget and seed.
        step_seconds, optimizer_seconds: of one step, and of the matrix rule within: medians over the runs.
        port: what took the steps.
        complete: False if the deadline cut the task off.
    """

    task: Task
    tuned: Tuned
    losses: dict[int, dict[int, float]]
    step_seconds: float
    optimizer_seconds: float
    port: str
    complete: bool = True

    @property
    def final(self) -> dict[int, float]:
        """Held-out loss at the study's own budget, by seed."""
        return self.losses.get(self.task.study.steps, {})


@dataclass
class Sweep:
    """The state of a sweep.

    Attributes:
        store: where runs are kept.
        port: takes the optimizer steps.
        device, dtype: see `training.Trainer`.
        deadline: reading of `now` that no run may pass; None for no limit.
        on_run: told every run that was needed, and whether it was trained now.
        seconds_of: expected time of a run, to stop in time.
        now: the clock, in seconds.
    """

    store: Store
    port: Port
    device: str = "cpu"
    dtype: torch.dtype | None = None
    deadline: float | None = None
    on_run: Callable[[Run, Outcome, bool], None] = lambda run, outcome, fresh: None
    seconds_of: Callable[[Run], float] = lambda run: 0.0
    now: Callable[[], float] = time.monotonic
    results: list[Result] = field(default_factory=list)
    best: dict[tuple[str, ...], Run] = field(default_factory=dict)

    def outcome(self, run: Run) -> Outcome:
        """The run's outcome, from the store or trained now.

        Raises:
            OutOfTimeError: it would end, or is still running, after the deadline.
        """
        found = self.store.get(run)
        fresh = found is None
        if found is None:
            if self.deadline is not None and self.now() + self.seconds_of(run) > self.deadline:
                raise OutOfTimeError
            found = train(run, self.port, device=self.device, dtype=self.dtype, on_step=self._check_time)
            self.store.put(run, found)
        self.on_run(run, found, fresh)
        return found

    def _check_time(self, step: int, loss: float) -> None:
        """Gives a run up where it takes longer than foreseen."""
        if self.deadline is not None and self.now() > self.deadline:
            raise OutOfTimeError

    def do(self, task: Task) -> Result | None:
        """Does a task and keeps its result; None if not even its rate could be found before the deadline."""
        study, entry = task.study, task.entry
        run = study.run(entry, entry.start, 0, study.steps)
        # where the search begins: a study of the same kind, or at least one on such a model, was there before
        places = (entry.label, study.spec.kind, study.kind), (entry.label, study.spec.kind)
        before = next((self.best[place] for place in places if place in self.best), None)
        if before is not None:
            run = replace(run, lr=before.lr, hyper=before.hyper)
        try:
            tuned = tune(run, lambda one: self.outcome(one).held_out, run.lr)
        except OutOfTimeError:
            return None
        self.best |= dict.fromkeys(places, tuned.run)
        outcomes: dict[int, dict[int, Outcome]] = {}
        complete = True
        try:
            self._seeds(tuned.run, task, study.steps, outcomes)
            if study.with_steps:
                self._bracket(tuned.run, task, outcomes)
        except OutOfTimeError:
            complete = False
        result = _result(task, tuned, outcomes, complete)
        self.results.append(result)
        return result

    def _seeds(self, run: Run, task: Task, steps: int, outcomes: dict[int, dict[int, Outcome]]) -> None:
        place: dict[int, Outcome] = {}
        for seed in task.study.report_seeds:
            place[seed] = self.outcome(replace(run, seed=seed, steps=steps))
        outcomes[steps] = place  # all seeds or none: spreads are over the same seeds

    def _bracket(self, run: Run, task: Task, outcomes: dict[int, dict[int, Outcome]]) -> None:
        """Further step budgets, until every seed has one above the target and one at or below it."""
        target = self.target(task, outcomes)
        if target is None:
            return
        own = BUDGETS.index(1.0)
        for direction, reached in ((-1, True), (1, False)):
            place = own
            while 0 <= place + direction < len(BUDGETS):
                found = outcomes[round(task.study.steps * BUDGETS[place])].values()
                if not any((one.held_out <= target) == reached for one in found):
                    break
                place += direction
                self._seeds(run, task, round(task.study.steps * BUDGETS[place]), outcomes)

    def target(self, task: Task, outcomes: dict[int, dict[int, Outcome]]) -> float | None:
        """AdamW's mean loss at the study's own budget."""
        if task.entry.algorithm == "adamw":
            losses = [one.held_out for one in outcomes[task.study.steps].values()]
        else:
            losses = [
                loss
                for result in self.results
                if result.task.study == task.study and result.task.entry.algorithm == "adamw"
                for loss in result.final.values()
            ]
        return sum(losses) / len(losses) if losses and all(map(math.isfinite, losses)) else None


def _result(task: Task, tuned: Tuned, outcomes: dict[int, dict[int, Outcome]], complete: bool) -> Result:
    every = [one for by_seed in outcomes.values() for one in by_seed.values()]
    losses = {
        steps: {seed: one.held_out for seed, one in by_seed.items()}
        for steps, by_seed in sorted(outcomes.items())
    }
    step = _median([one.seconds / max(1, len(one.losses)) for one in every])
    optimizer = _median([one.optimizer_seconds / max(1, len(one.losses)) for one in every])
    return Result(task, tuned, losses, step, optimizer, every[0].port if every else "", complete)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else math.nan
