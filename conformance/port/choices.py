"""One choice of a convention changed at a time, and what the oracle's update becomes: to name what a port does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance.port.execute import execute
from conformance.vectors import Case

Updates = NDArray[np.float64]
Change = Callable[[Case], Updates | None]

VALUES: Mapping[str, tuple[Any, ...]] = {
    "momentum": ("sum", "ema"),
    "nesterov": (True, False),
    "bias_correction": (True, False),
    "scale": ("spectral_norm", "keller", "moonlight", "rms_norm", "nvidia", None),
    "weight_storage": ("in_out", "out_in"),
    "epsilon": (1e-15, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "epsilon_rule": ("add", "clamp"),
    "norm_factor": (1.0, 1.01, 1.02),
    "weight_decay": (0.0,),
    "cautious": (False, True),
    "mu": (0.0, 0.9, 0.95, 0.98, 0.99),
    "beta2": (0.9, 0.95, 0.98, 0.99, 0.999),
    "betas": ((0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.999), (0.95, 0.98)),
}
"""By hyperparameter, what ports are known to have instead."""


def changes(algorithm: str, cases: Sequence[Case]) -> Iterator[tuple[str, Change]]:
    """In words, and as a function of a case: every change that changes some case."""
    from dion_ref import ALGORITHMS, POLYNOMIALS

    if algorithm not in ALGORITHMS:
        return
    known = {one.name for one in fields(ALGORITHMS[algorithm].Hyper)}
    own = cases[0].hyper
    for name, values in VALUES.items():
        for value in values:
            if name in known and any(case.hyper.get(name) != value for case in cases):
                yield f"{name}={value!r}", partial(_with, {name: value})
    if "polynomial" in known and not isinstance(own["polynomial"], str):
        steps = own["polynomial"]
        for name in POLYNOMIALS:
            if name != own["polynomial_name"]:
                yield f"polynomial={name!r}", partial(_with, {"polynomial": name, "norm_factor": None})
                yield (
                    f"the steps of {name!r}, normalized as before",
                    partial(_with, {"polynomial": name}),
                )
        for count in (len(steps) - 2, len(steps) - 1, len(steps) + 1):
            other = (*steps, steps[-1])[:count]
            yield f"{count} steps of the polynomial", partial(_with, {"polynomial": other})
    if any(case.schedule for case in cases):
        for name in dict.fromkeys(name for case in cases for name in case.schedule):
            yield f"{name} as it was when the optimizer was made", partial(_unscheduled, name)
    yield "no momentum to start from, whatever is given", _from_nothing
    yield "decay after the update", partial(_decay, _after)
    yield "decay by the learning rate times the scale", partial(_decay, _scaled)


def _run(case: Case) -> Updates | None:
    from conformance.adapters.oracle import adapter

    return execute(adapter, case, "float64").update


def _with(values: Mapping[str, Any], case: Case) -> Updates | None:
    """None where the algorithm refuses such a combination."""
    return _run(replace(case, hyper={**case.hyper, **values}))


def _unscheduled(name: str, case: Case) -> Updates | None:
    kept = {key: values for key, values in case.schedule.items() if key != name}
    return _run(replace(case, schedule=kept, hyper=case.hyper_at(0)))


def _from_nothing(case: Case) -> Updates | None:
    empty = {
        name: np.zeros_like(value) if name.startswith("state/") and "/Q" not in name else value
        for name, value in case.inputs.items()
    }
    return _run(replace(case, inputs=empty))


def _decay(rule: Callable[[Case, int, Updates, Updates], Updates], case: Case) -> Updates | None:
    """The updates without decay do not depend on the weight; `rule` decays otherwise."""
    plain = _run(replace(case, hyper={**case.hyper, "weight_decay": 0.0}))
    if plain is None or case.hyper["cautious"] or "scale_factor" not in case.derived:
        return None
    weight, updates = case.inputs["weight"].astype(np.float64), []
    for step in range(case.steps):
        updates.append(rule(case, step, weight, plain[step]))
        weight = weight + updates[-1]
    return np.stack(updates)


def _after(case: Case, step: int, weight: Updates, plain: Updates) -> Updates:
    hyper = case.hyper_at(step)
    decay: float = hyper["lr"] * hyper["weight_decay"]
    return plain - decay * (weight + plain)


def _scaled(case: Case, step: int, weight: Updates, plain: Updates) -> Updates:
    hyper = case.hyper_at(step)
    decay: float = hyper["lr"] * case.derived["scale_factor"][0] * hyper["weight_decay"]
    return plain - decay * weight
