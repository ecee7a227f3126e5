"""One case on one adapter, in this process: what came out, or what was raised."""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance.adapters import spec_of
from conformance.vectors import Case

CALLS = ("step", "orthonormalize")
"""Phases in which nothing but the port's own call runs."""


@dataclass
class Outcome:
    """What an adapter did with a case.

    Attributes:
        update: ``[steps, *shape]`` in float64, or None when nothing came out.
        states: by the oracle's key, after the last step.
        raised: "Type: message" of what was raised, or of what was wrong with the result.
        phase: where it was raised: "init", "step", "orthonormalize", "canonical_state" or "result".
        refused: the port's own call of step or orthonormalize raised, and not that it isn't implemented.
        details: the traceback.
        seconds: wall time.
    """

    update: NDArray[Any] | None = None
    states: dict[str, NDArray[Any]] = field(default_factory=dict)
    raised: str | None = None
    phase: str = ""
    refused: bool = False
    details: str = ""
    seconds: float = 0.0


def execute(adapter: Any, case: Case, compute_dtype: str) -> Outcome:
    """Runs a case of L0 to L2; whatever the adapter raises is kept in the outcome."""
    began = time.perf_counter()
    outcome = Outcome()
    try:
        if case.level == "L0":
            _orthonormalize(adapter, case, compute_dtype, outcome)
        else:
            _steps(adapter, case, compute_dtype, outcome)
    except Exception as error:
        outcome.update = None
        outcome.refused = outcome.phase in CALLS and not isinstance(error, NotImplementedError)
        outcome.raised = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        outcome.details = traceback.format_exc()
    outcome.seconds = time.perf_counter() - began
    return outcome


def _orthonormalize(adapter: Any, case: Case, compute_dtype: str, outcome: Outcome) -> None:
    outcome.phase = "result"
    matrix = case.cast(compute_dtype)["matrix"]
    result = _call(adapter.orthonormalize, outcome, "orthonormalize", matrix, case.hyper, compute_dtype)
    outcome.update = _checked(result, case.shape, "result")[None]


def _steps(adapter: Any, case: Case, compute_dtype: str, outcome: Outcome) -> None:
    inputs, spec = case.cast(compute_dtype), spec_of(case, compute_dtype)
    weight, updates = inputs["weight"], []
    outcome.phase = "init"
    state = adapter.init(spec, {spec.name: weight.copy()})
    for step in range(case.steps):
        grads, hyper = {spec.name: inputs["grads"][step].copy()}, case.hyper_at(step)
        result = _call(adapter.step, outcome, "step", {spec.name: weight.copy()}, grads, state, hyper)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise TypeError(f"step must return (weights, state), not {type(result).__name__}")
        new, state = result
        if not isinstance(new, Mapping) or spec.name not in new:
            raise TypeError(f"step must return weights by name; there is no {spec.name!r}")
        after = _checked(new[spec.name], case.shape, "weight")
        if np.asarray(new[spec.name]).dtype != weight.dtype:
            raise TypeError(
                f"the new weight is {np.asarray(new[spec.name]).dtype}, the old one {weight.dtype}"
            )
        updates.append(after - weight.astype(np.float64))
        weight = np.array(new[spec.name])  # a copy: it may be the port's own buffer
    outcome.update = np.stack(updates)
    if hasattr(adapter, "canonical_state"):
        outcome.phase = "canonical_state"
        outcome.states = {
            key: np.array(value, dtype=np.float64) for key, value in adapter.canonical_state(state).items()
        }


def _call(function: Any, outcome: Outcome, phase: str, *arguments: Any) -> Any:
    """Calls the port. Arguments that it does not take are no refusal: nothing of the port has run then.

    Raises:
        TypeError: `function` cannot be called with these arguments; else whatever it raises.
    """
    outcome.phase = f"calling {phase}"
    with suppress(ValueError):  # no signature to be had
        inspect.signature(function).bind(*arguments)
    outcome.phase = phase
    result = function(*arguments)
    outcome.phase = "result"
    return result


def _checked(value: Any, shape: tuple[int, ...], what: str) -> NDArray[Any]:
    array = np.asarray(value)
    if array.shape != tuple(shape):
        raise ValueError(f"the {what} has shape {list(array.shape)}, not {list(shape)}")
    return array.astype(np.float64)
