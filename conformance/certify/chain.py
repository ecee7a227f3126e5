"""A case of whole steps: the oracle runs, and every step is recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import dion_ref
from conformance.certify import dion_steps, generator, matrix_steps, scalar_steps
from conformance.certify.cases import Grade, compare
from conformance.certify.output import Output
from conformance.certify.precise import Matrix, from_tensor
from conformance.certify.tables import CONVENTIONS, DEFAULTS

SCALAR = ("adamw", "lion")
"""Algorithms whose entries don't mix."""

LOW_RANK = ("dion", "orth_dion")
"""Algorithms that draw a first Q."""


@dataclass(frozen=True)
class Logical:
    """Where one logical matrix lies.

    Args:
        rows: its rows in the parameter ``[m, n]``, or the index of it in a stack.
        piece: index of its State, None if there is only one.
        place: its index in that State's stack, None if there is no stack.
    """

    rows: Sequence[int] | int | None
    piece: int | None = None
    place: int | None = None

    def of_parameter(self, tensor: Tensor) -> Tensor:
        """The matrix."""
        if self.rows is None:
            return tensor
        return tensor[self.rows] if isinstance(self.rows, int) else tensor[list(self.rows)]

    def of_state(self, state: Any) -> dict[str, Tensor]:
        """The tensors of its state by name."""
        one = state if self.piece is None else state[self.piece]
        tensors = {name: value for name, value in vars(one).items() if isinstance(value, Tensor)}
        return tensors if self.place is None else {name: value[self.place] for name, value in tensors.items()}


@dataclass(eq=False)
class StepCase:
    """Steps of one algorithm on one parameter.

    A matrix rule is judged step by step: each starts from the oracle's own float64 state, so rounding can't grow by
    chaos. AdamW and Lion are judged against the whole history.

    Args:
        id: unique.
        group: the row of the table.
        algorithm: a key of ``ALGORITHMS``.
        param: ``[m, n]`` or ``[N, m, n]``.
        gradients: one a step.
        given: hyperparameters that are not left to the default.
        preset: a convention's name, or None.
        state: fields of the state before the first step, or None to let the oracle make them (seed 0, name = id).
        split: how the oracle is told to cut the parameter, or None.
        logical: the logical matrices that come of it, in order; None for the parameter or its stack as it is.
    """

    id: str
    group: str
    algorithm: str
    param: Tensor
    gradients: Sequence[Tensor]
    given: Mapping[str, Any]
    preset: str | None = None
    state: Mapping[str, Any] | None = None
    split: Any = None
    logical: Sequence[Logical] | None = None
    _known: dict[int, list[list[Output]]] = field(default_factory=dict, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """Every hyperparameter, by our own tables."""
        defaults = DEFAULTS[self.algorithm]
        convention = CONVENTIONS[self.preset] if self.preset else {}
        return {**defaults, **{k: v for k, v in convention.items() if k in defaults}, **self.given}

    def _hyper(self) -> Any:
        if self.preset:
            return dion_ref.PRESETS[self.preset].hyper(self.algorithm, **self.given)
        return dion_ref.ALGORITHMS[self.algorithm].Hyper(**self.given)

    def grades(self, *, first_step_only: bool = False) -> Iterator[Grade]:
        """Compare parameter and state after every step, and the first Q if the oracle drew it."""
        algorithm = dion_ref.ALGORITHMS[self.algorithm]
        hyper, option = self._hyper(), ({} if self.split is None else {"split": self.split})
        param = self.param
        if self.state is None:
            state = algorithm.init(param, hyper, name=self.id, seed=0, **option)
            yield from self._first_factor(state)
        else:
            state = algorithm.State(**self.state)
        start = state
        count = 1 if first_step_only else len(self.gradients)
        for t in range(1, count + 1):
            before, state_before = param, state
            param, state = algorithm.step(param, self.gradients[t - 1], state, hyper, **option)
            # what does not depend on the oracle need not be computed twice
            lasting = self.algorithm in SCALAR or (t == 1 and self.state is not None)
            expected = self._known.get(t) if lasting else None
            if expected is None:
                expected = self._expected(t, before, state_before, start)
                if lasting:
                    self._known[t] = expected
            for index, (logical, outputs) in enumerate(zip(self._matrices, expected, strict=True)):
                label = f"step {t} " + (f"matrix {index} " if len(expected) > 1 else "")
                yield from compare(
                    outputs, {"param": logical.of_parameter(param), **logical.of_state(state)}, label
                )
            yield self._counter(t, start, state)

    @property
    def _matrices(self) -> Sequence[Logical]:
        if self.logical is not None:
            return self.logical
        if self.param.ndim == 3 and self.algorithm not in SCALAR:
            return [Logical(index, place=index) for index in range(self.param.shape[0])]
        return [Logical(None)]

    def _counter(self, t: int, start: Any, state: Any) -> Grade:
        pairs = zip(start, state, strict=True) if isinstance(state, tuple) else [(start, state)]
        right = all(not hasattr(new, "step") or new.step == old.step + t for old, new in pairs)
        return Grade(f"step {t} counter", 0.0 if right else math.inf)

    def _first_factor(self, state: Any) -> Iterator[Grade]:
        if self.algorithm not in LOW_RANK:
            return
        for index, logical in enumerate(self._matrices):
            Q = logical.of_state(state)["Q"]
            rows, columns = logical.of_parameter(self.param).shape
            rank = dion_steps.rank_of(self.settings, rows, columns)
            right = generator.normals(min(rows, columns), rank, 0, self.id, index)
            yield Grade(
                "first Q", right.units(Q) if tuple(Q.shape) == (min(rows, columns), rank) else math.inf
            )

    def _expected(self, t: int, param: Tensor, state: Any, start: Any) -> list[list[Output]]:
        settings = self.settings
        if self.algorithm in SCALAR:
            history = [from_tensor(gradient) for gradient in self.gradients[:t]]
            W, first = from_tensor(self.param), from_tensor(start.exp_avg)
            if self.algorithm == "lion":
                return [scalar_steps.lion(W, history, first, settings)]
            second = from_tensor(start.exp_avg_sq)
            return [scalar_steps.adamw(W, history, first, second, start.step, settings)]
        found = []
        for logical in self._matrices:
            W, G = (
                from_tensor(logical.of_parameter(param)),
                from_tensor(logical.of_parameter(self.gradients[t - 1])),
            )
            tensors = {name: from_tensor(value) for name, value in logical.of_state(state).items()}
            one = state if logical.piece is None else state[logical.piece]
            found.append(self._matrix(W, G, tensors, getattr(one, "step", 0) + 1, settings))
        return found

    def _matrix(
        self, W: Matrix, G: Matrix, state: dict[str, Matrix], t: int, settings: dict[str, Any]
    ) -> list[Output]:
        match self.algorithm:
            case "muon":
                return matrix_steps.muon(W, G, state["momentum"], t, settings)
            case "normuon":
                return matrix_steps.normuon(W, G, state["momentum"], state["variance"], t, settings)
            case "dion2":
                return matrix_steps.dion2(W, G, state["momentum"], settings)
            case "dion3":
                return matrix_steps.dion3(W, G, state["momentum"], state["variance"], settings)
            case "dion":
                return dion_steps.dion(W, G, state["momentum"], state["Q"], settings)
            case "orth_dion":
                return dion_steps.orth_dion(W, G, state["momentum"], state["Q"], settings)
        raise ValueError(f"unknown algorithm {self.algorithm!r}")
