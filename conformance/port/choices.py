"""One choice of a convention changed at a time, and what the oracle's update becomes: to name what a port does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
DEAD = {"rank-deficient", "nearly-dependent", "zero-gradient"}
"""Flags of the cases with columns that are not independent."""


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
    yield "decay without the learning rate", partial(_decay, _unscaled)
    if any("scale_factor" in case.derived for case in cases):
        yield "decay by the learning rate times the scale", partial(_decay, _scaled)
        yield "its scale without the square root", partial(_decay, _rootless)
    if "polynomial" in known and own["polynomial"] != "exact":
        yield "epsilon inside the root", partial(_inside, False)
        yield "epsilon squared inside the root", partial(_inside, True)
    if algorithm in ("dion", "orth_dion"):
        from conformance.port.low_rank_choices import CHOICES, COMMON, LowRankOracle

        for text, choice in {**COMMON, **CHOICES[algorithm]}.items():
            yield text, partial(_run, adapter=LowRankOracle(choice))
        yield "no rule for dead columns (judged by all other cases)", _but_for_dead_columns


def _run(case: Case, adapter: Any = None) -> Updates | None:
    from conformance.adapters import oracle

    return execute(adapter or oracle.adapter, case, "float64").update


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


def _inside(squared: bool, case: Case) -> Updates | None:
    """The norm that the polynomial's input is divided by is a root over epsilon too."""
    from conformance.mutants.mutant import attribute
    from dion_ref import update
    from dion_ref.linalg import norm

    def wrong(M: Tensor, *, epsilon: float, epsilon_rule: str, norm_factor: float) -> Tensor:
        return M / ((norm_factor * norm(M)).square() + (epsilon**2 if squared else epsilon)).sqrt()

    with attribute(update, "normalize_input", lambda _: wrong):
        return _run(case)


def _but_for_dead_columns(case: Case) -> Updates | None:
    """What dead columns become without a rule is rounding, which nobody can foretell: nothing is said of them."""
    return None if DEAD & set(case.flags) else case.expected["update"]


def _decay(rule: Callable[[Case, int, Updates, Updates], Updates], case: Case) -> Updates | None:
    """The updates without decay do not depend on the weight; `rule` decays otherwise."""
    plain = _run(replace(case, hyper={**case.hyper, "weight_decay": 0.0}))
    if plain is None or case.hyper["cautious"]:
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


def _unscaled(case: Case, step: int, weight: Updates, plain: Updates) -> Updates:
    decay: float = case.hyper_at(step)["weight_decay"]
    return plain - decay * weight


def _scaled(case: Case, step: int, weight: Updates, plain: Updates) -> Updates:
    hyper = case.hyper_at(step)
    decay: float = hyper["lr"] * hyper["weight_decay"]
    return plain - decay * _by_piece(case, weight, case.derived["scale_factor"])


def _rootless(case: Case, step: int, weight: Updates, plain: Updates) -> Updates:
    """Of 0.2 sqrt(max(m, n)) the 0.2 stays."""
    hyper = case.hyper_at(step)
    decay: float = hyper["lr"] * hyper["weight_decay"]
    unit = 0.2 if hyper["scale"] in ("moonlight", "rms_norm") else 1.0
    return _by_piece(case, plain, [factor / unit for factor in case.derived["scale_factor"]]) - decay * weight


def _by_piece(case: Case, array: Updates, factors: Sequence[float]) -> Updates:
    """Each piece of a parameter times its factor."""
    from conformance.adapters.oracle import make_split

    split = make_split(case.split)
    if split is None:
        return array * factors[0]
    pieces = split.split(torch.from_numpy(array))
    scaled = [piece * factor for piece, factor in zip(pieces, factors, strict=True)]
    merged: Updates = split.merge(scaled, case.shape).numpy()
    return merged
