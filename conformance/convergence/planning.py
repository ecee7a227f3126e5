"""Which tasks fit into a budget, by step times measured here."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from conformance.convergence.drivers import Port
from conformance.convergence.studies import Task
from conformance.convergence.training import Run, Trainer

TUNING_RUNS = {"adamw": 15, "lion": 15}
OTHER_TUNING_RUNS = 11
EXTRA_BUDGETS = {"adamw": 2.12}
OTHER_EXTRA_BUDGETS = 1.0
"""Steps of the further budgets that bracket the target, over the study's own."""
USUAL_BATCH = 16
RESERVE = 0.06
"""Share of the budget that is left for figures and for what takes longer than foreseen."""


@dataclass(frozen=True)
class Plan:
    """What will be done and what will not.

    Attributes:
        taken: tasks, in the order in which they are done.
        dropped: tasks that do not fit.
        seconds: expected time by task name.
        budget: in seconds; None for no limit.
    """

    taken: tuple[Task, ...]
    dropped: tuple[Task, ...]
    seconds: Mapping[str, float]
    budget: float | None

    @property
    def total(self) -> float:
        """Expected seconds of what is taken."""
        return sum(self.seconds[task.name] for task in self.taken)


@dataclass
class Clock:
    """Measures how long a step takes; remembers it.

    Attributes:
        port: steps the matrices.
        device: of the models.
        known: seconds by what was measured; given to resume.
    """

    port: Port
    device: str = "cpu"
    known: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def model_key(run: Run) -> str:
        """What the time of forward and backward depends on."""
        return f"model {run.spec} batch {run.batch} micro {run.micro}"

    @staticmethod
    def rule_key(run: Run) -> str:
        """What the time of the rule depends on."""
        hyper = {name: value for name, value in run.hyper if name not in ("betas", "mu")}
        return f"rule {run.spec} {run.algorithm} {hyper}"

    def step(self, task: Task) -> float:
        """Seconds of one training step."""
        study, entry = task.study, task.entry
        run = study.run(entry, 1e-4, 0, 1000)
        model, rule = self.model_key(run), self.rule_key(run)
        if model not in self.known or rule not in self.known:
            # the rule costs the same at every batch size, but more where few tokens leave the gradient rank-deficient
            batch = study.batch if model not in self.known else min(study.batch, USUAL_BATCH)
            trainer = Trainer(replace(run, batch=batch), self.port, self.device)
            trainer.step(0)
            trainer.optimizer_seconds, count, began = 0.0, 0, time.perf_counter()
            while count < 2 or (count < 8 and time.perf_counter() - began < 0.25):
                count += 1
                trainer.step(count)
            whole = (time.perf_counter() - began) / count
            self.known[rule] = trainer.optimizer_seconds / count
            self.known.setdefault(model, whole - self.known[rule])
        return self.known[model] + self.known[rule]

    def seconds(self, task: Task) -> float:
        """Expected seconds of a task."""
        rule = task.entry.algorithm
        extra = EXTRA_BUDGETS.get(rule, OTHER_EXTRA_BUDGETS) if task.study.with_steps else 0.0
        runs = TUNING_RUNS.get(rule, OTHER_TUNING_RUNS) + task.study.seeds * (1 + extra)
        return runs * task.study.steps * self.step(task)


def make_plan(
    tasks: Sequence[Task],
    seconds: Callable[[Task], float],
    budget: float | None,
    clock: Callable[[], float] = time.monotonic,
    *,
    together: bool = False,
) -> Plan:
    """Takes tasks in their order while they fit; a later, smaller one may still fit where a larger one did not.

    Args:
        tasks: the most telling first.
        seconds: expected time of one.
        budget: seconds for all, measuring included; None for no limit.
        clock: what the time spent on measuring is read from.
        together: take all tasks of a study or none.

    Returns:
        The plan; a study's rules are kept together with the study's reference, AdamW: without it none is taken.
    """
    began = clock()
    taken: list[Task] = []
    dropped: list[Task] = []
    expected: dict[str, float] = {}
    total = 0.0
    groups = [[task] for task in tasks]
    if together:
        groups = [list(some) for _, some in itertools.groupby(tasks, lambda task: task.study)]
    for group in groups:
        study = group[0].study
        references = [task for task in (*taken, *group) if task.entry.algorithm == "adamw"]
        without_reference = study.with_steps and not any(task.study == study for task in references)
        limit = None if budget is None else budget * (1 - RESERVE) - (clock() - began)
        # nothing is measured for which there is no time at all
        if without_reference or (limit is not None and limit - total < 0.01 * (budget or 0)):
            dropped += group
            continue
        expected |= {task.name: seconds(task) for task in group}
        needed = sum(expected[task.name] for task in group)
        if limit is not None and total + needed > limit:
            dropped += group
            continue
        taken += group
        total += needed
    return Plan(tuple(taken), tuple(dropped), expected, budget)
