"""Asks the oracle for the step that an optimizer should have taken, and measures how far off it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from conformance.job.grading import (
    Series,
    align_columns,
    low_precision_bound,
    nearest_lion_update,
    relative_error,
)
from conformance.job.model import is_matrix
from conformance.job.settings import LOW_PRECISION_FACTOR, DtypeSetting, OptimizerSetting
from dion_ref import ALGORITHMS, FLOAT64, Precision

StateTensors = Mapping[str, Tensor]
"""The state tensors of one parameter, whole, by key."""


@dataclass(frozen=True)
class Step:
    """What one parameter looked like around one optimizer step, all whole and in the storage dtype.

    Attributes:
        weight, grad, state: before the step.
        new_weight, new_state: after it.
        count: steps taken before it.
    """

    weight: Tensor
    grad: Tensor
    state: StateTensors
    new_weight: Tensor
    new_state: StateTensors
    count: int


class Judge:
    """Grades one parameter's steps at a time and keeps the errors until they are asked for."""

    def __init__(self, optimizer: OptimizerSetting, dtype: DtypeSetting, *, seed: int = 0) -> None:
        self.optimizer = optimizer
        self.dtype = dtype
        self.seed = seed
        self.undecided = 0
        self._errors: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._rerun: dict[tuple[str, str], list[float]] = defaultdict(list)
        matrix = ALGORITHMS[optimizer.algorithm].Hyper(lr=optimizer.lr, **optimizer.hyper)
        scalar = ALGORITHMS[optimizer.scalar].Hyper(lr=optimizer.scalar_lr)
        self._hyper = {True: matrix, False: scalar}

    def algorithm(self, name: str) -> str:
        """The rule that parameter `name` has to follow."""
        return self.optimizer.algorithm if is_matrix(name) else self.optimizer.scalar

    def hyper(self, name: str) -> Any:
        """The oracle's hyperparameters for parameter `name`."""
        return self._hyper[is_matrix(name)]

    def fresh_state(self, name: str, weight: Tensor) -> Any:
        """The oracle's state before the first step, float64."""
        rule = ALGORITHMS[self.algorithm(name)]
        return rule.init(weight.double(), self.hyper(name), name=name, seed=self.seed)

    def initial_state(self, name: str, weight: Tensor, state: StateTensors) -> None:
        """Grades the state that `name` starts from: zeros, and Dion's first Q by its seed and name."""
        reference = self.fresh_state(name, weight)
        for key, value in state.items():
            expected = getattr(reference, key)
            self._errors[name, f"initial {key}"].append(relative_error(value, expected))
            if not self.dtype.exact:
                rounded = expected.to(self.dtype.storage)
                self._rerun[name, f"initial {key}"].append(relative_error(rounded, expected))

    def step(self, name: str, step: Step) -> None:
        """Grades one step of one parameter: its update, and each state tensor apart.

        Raises:
            ValueError: NaN or inf in what goes into the step.
        """
        reference = self._oracle(name, step, FLOAT64)
        self._grade(name, step, (step.new_weight, step.new_state), reference, self._errors)
        if not self.dtype.exact:
            again = self._oracle(name, step, self.dtype.precision)
            self._grade(name, step, again, reference, self._rerun)

    def series(self) -> list[Series]:
        """All that was graded, with its bounds."""
        found = []
        for (name, quantity), errors in self._errors.items():
            rerun = self._rerun[name, quantity] if not self.dtype.exact else []
            algorithm = self.algorithm(name)
            if not self.dtype.exact:
                bound = low_precision_bound(rerun, LOW_PRECISION_FACTOR)
            elif is_matrix(name):
                bound = self.optimizer.float64_bound
            else:
                bound = 1e-12
            found.append(Series(name, algorithm, quantity, tuple(errors), tuple(rerun), bound))
        return found

    def _oracle(self, name: str, step: Step, precision: Precision) -> tuple[Tensor, StateTensors]:
        rule, hyper = ALGORITHMS[self.algorithm(name)], self.hyper(name)
        kept: dict[str, Any] = {
            key: value.to(precision.storage) for key, value in step.state.items() if key != "step"
        }
        if any(field.name == "step" for field in fields(rule.State)):
            kept["step"] = step.count
        weight, state = rule.step(
            step.weight.to(precision.storage),
            step.grad.to(precision.storage),
            rule.State(**kept),
            hyper,
            precision=precision,
        )
        return weight, {key: getattr(state, key) for key in step.state}

    def _grade(
        self,
        name: str,
        step: Step,
        taken: tuple[Tensor, StateTensors],
        reference: tuple[Tensor, StateTensors],
        into: dict[tuple[str, str], list[float]],
    ) -> None:
        old = step.weight.double()
        update, expected = taken[0].double() - old, reference[0] - old
        if self.algorithm(name) == "lion":
            hyper = self.hyper(name)
            expected, others = nearest_lion_update(
                update,
                expected,
                step.state["exp_avg"],
                step.grad,
                lr=hyper.lr,
                beta=hyper.betas[0],
                epsilon=torch.finfo(self.dtype.storage).eps,
            )
            self.undecided += others if into is self._errors else 0
        into[name, "update"].append(relative_error(update, expected))
        for key, value in taken[1].items():
            wanted = reference[1][key]
            into[name, key].append(
                relative_error(align_columns(value, wanted) if key == "Q" else value, wanted)
            )


def shares(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Names dealt to ranks, largest first, each to the rank that has least so far."""
    loads = [0] * ranks
    dealt: list[list[str]] = [[] for _ in range(ranks)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        dealt[rank].append(name)
        loads[rank] += sizes[name]
    return dealt


def merge(series: Iterable[Iterable[Series]]) -> list[Series]:
    """The series of all ranks in one list, by parameter and quantity."""
    return sorted((one for part in series for one in part), key=lambda one: (one.parameter, one.quantity))
