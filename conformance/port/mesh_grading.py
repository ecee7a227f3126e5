"""What the parameters of a case of L3 or L4 are given, and the verdict on what came out."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from conformance.adapters.oracle import make_hyper
from conformance.port.grading import Spectrum, spectrum
from conformance.port.mesh_cases import SHAPES, STEPS, MeshCase
from conformance.vectors import oracle, tolerance
from conformance.vectors.plans import Plan
from dion_ref import ALGORITHMS

Values = dict[str, Tensor]
"""By "<parameter>/update" or "<parameter>/<state key>"."""
SHOWN = 4
"""Parameters that a message names."""


@dataclass(frozen=True)
class Problem:
    """One parameter: its plan and inputs."""

    plan: Plan
    drawn: Mapping[str, Tensor]


def name_of(index: int) -> str:
    """Of a parameter, by its place in SHAPES."""
    return f"blocks_{index}_weight"


def problems_of(case: MeshCase) -> dict[str, Problem]:
    """By parameter, what it is given."""
    every = _cached_problems(case.algorithm, case.dialect, make_hyper(case.algorithm, case.hyper))
    return {name_of(index): every[name_of(index)] for index in case.shapes}


@functools.cache
def _cached_problems(algorithm: str, dialect: str, hyper: Any) -> dict[str, Problem]:
    found = {}
    for index, shape in enumerate(SHAPES):
        plan = Plan("L2", algorithm, dialect, f"mesh-{index}", shape, hyper, "", (), steps=STEPS)
        drawn = oracle.draw(plan)
        for key in ("weight", "grads"):  # parameters of one shape get values of their own
            drawn[key] = drawn[key] * (1 + index / 4)
        if index == 1:
            drawn["grads"][:, -4:] = 0  # at the end of the rows, so that a rank has nothing but zeros
        weight = drawn["weight"]
        initial = oracle.canonical(ALGORITHMS[algorithm].init(weight, hyper, name=name_of(index)), plan)
        drawn |= {f"state/{key}": value for key, value in initial.items()}
        found[name_of(index)] = Problem(plan, drawn)
    return found


@functools.cache
def _expected(algorithm: str, dialect: str, hyper: Any) -> dict[str, tuple[Values, dict[str, Any]]]:
    """By parameter: what the oracle gives, and the tolerances by dtype and quantity."""
    found = {}
    for name, problem in _cached_problems(algorithm, dialect, hyper).items():
        each = oracle.run(problem.plan, problem.drawn)
        allowed = tolerance.tolerances(problem.plan, problem.drawn, each)
        each["update"] = each["update"].sum(0, keepdim=True)
        found[name] = each, allowed
    return found


def grade(case: MeshCase, dtype: str, values: Values) -> dict[str, tuple[float, float | None]]:
    """By quantity, error and tolerance of the parameter that uses most of its tolerance."""
    worst: dict[str, _Measured] = {}
    for one in _measured(case, dtype, values):
        if one.quantity not in worst or _share(one.pair) > _share(worst[one.quantity].pair):
            worst[one.quantity] = one
    return {quantity: one.pair for quantity, one in worst.items()}


def beyond(case: MeshCase, dtype: str, values: Values) -> dict[str, str]:
    """By quantity, how many parameters are beyond their tolerance, and which, with their shapes.

    And the shapes of those that are right: they tell what the mistake leaves alone.
    """
    shapes = {name: list(problem.plan.shape) for name, problem in problems_of(case).items()}
    right, wrong = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for one in _measured(case, dtype, values):
        shape = str(shapes[one.parameter])
        if _share(one.pair) > 1:
            wrong[one.quantity].append(f"{one.parameter} {shape}")
        else:
            right[one.quantity].append(shape)
    return {
        quantity: f"in {len(names)} of {len(names) + len(right[quantity])} parameters: {_some(names)}"
        + (f"; right: {_some(list(dict.fromkeys(right[quantity])))}" if right[quantity] else "")
        for quantity, names in wrong.items()
    }


def _some(names: list[str]) -> str:
    """The first few."""
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def worst_spectrum(case: MeshCase, dtype: str, values: Values) -> Spectrum:
    """The spectrum of the update that uses most of its tolerance; empty if that is no matrix."""
    updates = [one for one in _measured(case, dtype, values) if one.quantity == "update"]
    worst = max(updates, key=lambda one: _share(one.pair), default=None)
    if worst is None or worst.found.ndim != 3:  # the first dim is that of steps
        return ()
    return spectrum(worst.found.numpy(), worst.expected.numpy())


@dataclass(frozen=True)
class _Measured:
    """One quantity of one parameter: what was found and expected, and its error and tolerance."""

    parameter: str
    quantity: str
    found: Tensor
    expected: Tensor
    pair: tuple[float, float | None]


def _measured(case: MeshCase, dtype: str, values: Values) -> Iterator[_Measured]:
    reference = _expected(case.algorithm, case.dialect, make_hyper(case.algorithm, case.hyper))
    for name, value in values.items():
        parameter, _, key = name.partition("/")
        quantity = key if key == "update" else f"state/{key}"
        expected, allowed = reference[parameter]
        found = value.double().cpu()
        found = found.unsqueeze(0) if key == "update" else found
        pair = (tolerance.error(quantity, found, expected[quantity]), allowed[dtype][quantity])
        yield _Measured(parameter, quantity, found, expected[quantity], pair)


def _share(pair: tuple[float, float | None]) -> float:
    error, allowed = pair
    if allowed and not math.isfinite(error):
        return math.inf  # NaN, too, comes before every number
    return error / allowed if allowed else 0.0
