"""Runs a plan on the oracle: inputs, expected results, and how far the oracle itself comes in a lower precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from conformance.vectors import inputs
from conformance.vectors.plans import Plan
from dion_ref import ALGORITHMS, FLOAT64, POLYNOMIALS, Precision
from dion_ref.update import orthonormalize, scale_factor

Tensors = dict[str, Tensor]
SIZE = {"tiny": 2.0**-40, "huge": 2.0**40, "overflow": 2.0**66}


@dataclass(frozen=True)
class Result:
    """What a run gives: "update" ``[steps, *shape]`` and "state/<key>"."""

    tensors: Tensors


def draw(plan: Plan, attempt: int = 0) -> Tensors:
    """The inputs of a plan; they depend on shape, kind and attempt only, so dialects share them."""
    shape, name = plan.shape, "x".join(map(str, plan.shape)) + (f":{attempt}" if attempt else "")
    grads = torch.stack([_gradient(plan, f"{name}:gradient:{step}") for step in range(plan.steps)])
    if plan.level == "L0":
        return {"matrix": grads[0]}
    drawn = {"weight": inputs.normal(shape, f"{name}:weight"), "grads": grads}
    for key, value in _start(plan, name).items():
        drawn[f"state/{key}"] = value
    return drawn


def _gradient(plan: Plan, name: str) -> Tensor:
    if plan.gradient == "zero":
        return torch.zeros(plan.shape, dtype=torch.float64)
    if plan.gradient == "low-rank":
        return inputs.low_rank(plan.shape, 2, name)
    if plan.gradient == "nearly-low-rank":
        return inputs.low_rank(plan.shape, 2, name) + inputs.normal(plan.shape, name) * 2.0**-30
    if plan.gradient == "tied":
        return inputs.tied_rows(plan.shape, name)
    values = inputs.normal(plan.shape, name) * SIZE.get(plan.gradient, 1.0)
    if plan.gradient == "nan":
        values[1, 2] = torch.nan
    return values


def _start(plan: Plan, name: str) -> Tensors:
    """The canonical state before the first step: momentum in the parameter's shape, the rest by piece."""
    rule = ALGORITHMS[plan.algorithm]
    weight = torch.zeros(plan.shape, dtype=torch.float64)
    state = rule.init(weight, plan.hyper, name=f"vectors:{name}", split=plan.split)
    start = canonical(state, plan)
    for key in start:
        base = key.split("/")[0]
        if base == "Q":
            start[key] = inputs.on_grid(start[key])
        elif plan.warm and base in ("momentum", "exp_avg"):
            start[key] = inputs.normal(plan.shape, f"{name}:{base}")
        elif plan.warm and base in ("variance", "exp_avg_sq"):
            start[key] = inputs.positive(tuple(start[key].shape), f"{name}:{base}")
        elif plan.warm and base == "step":
            start[key] = torch.tensor(3.0, dtype=torch.float64)
    return start


def canonical(state: Any, plan: Plan) -> Tensors:
    """A state of the oracle by key: of the parameter's shape where it has that, else "<key>/<piece>"."""
    pieces = state if isinstance(state, tuple) else (state,)
    result: Tensors = {}
    for one in fields(pieces[0]):
        values = [getattr(piece, one.name) for piece in pieces]
        if one.name == "step":
            result["step"] = torch.tensor(float(values[0]), dtype=torch.float64)
        elif plan.split is None:
            result[one.name] = values[0]
        elif one.name in ("momentum", "exp_avg", "exp_avg_sq"):
            result[one.name] = plan.split.merge(values, plan.shape)
        else:
            result |= {f"{one.name}/{index}": value for index, value in enumerate(values)}
    return result


def _state_of(start: Mapping[str, Tensor], plan: Plan) -> Any:
    """The inverse of `canonical`."""
    kind = ALGORITHMS[plan.algorithm].State
    count = 1 if plan.split is None else len(plan.split.split(torch.zeros(plan.shape)))
    states = []
    for index in range(count):
        values: dict[str, Any] = {}
        for one in fields(kind):
            if one.name == "step":
                values["step"] = int(start["step"])
            elif f"{one.name}/{index}" in start:
                values[one.name] = start[f"{one.name}/{index}"]
            elif plan.split is not None:
                values[one.name] = plan.split.split(start[one.name])[index].contiguous()
            else:
                values[one.name] = start[one.name]
        states.append(kind(**values))
    return states[0] if plan.split is None else tuple(states)


def run(plan: Plan, drawn: Mapping[str, Tensor], precision: Precision = FLOAT64) -> Tensors:
    """The oracle on a plan.

    Args:
        plan: what to run.
        drawn: its inputs.
        precision: dtypes of the run.

    Returns:
        float64: "update" ``[steps, *shape]`` and "state/<key>" after the last step (without "step").
    """
    cast = {key: value.to(precision.storage) for key, value in drawn.items()}
    if plan.level == "L0":
        return {"update": orthonormalize(cast["matrix"], plan.hyper, precision).double().unsqueeze(0)}
    start = {key.removeprefix("state/"): value for key, value in cast.items() if key.startswith("state/")}
    state, weight, updates = _state_of(start, plan), cast["weight"], []
    for step in range(plan.steps):
        hyper = replace(plan.hyper, **{name: values[step] for name, values in plan.schedule.items()})
        new, state = ALGORITHMS[plan.algorithm].step(
            weight, cast["grads"][step].contiguous(), state, hyper, split=plan.split, precision=precision
        )
        updates.append(new.double() - weight.double())
        weight = new
    found = {"update": torch.stack(updates)}
    for key, value in canonical(state, plan).items():
        if key != "step":
            found[f"state/{key}"] = value.double()
    return found


def least_gap(plan: Plan, drawn: Mapping[str, Tensor]) -> float:
    """How clear the choices of Dion2 and Dion3 are, over all steps and pieces.

    Returns:
        The least gap between the L1 norms of the last slice selected and of the first that is not, over the former; inf
        where there is nothing to choose.
    """
    start = {key.removeprefix("state/"): value for key, value in drawn.items() if key.startswith("state/")}
    state, weight, least = _state_of(start, plan), drawn["weight"], math.inf
    for step in range(plan.steps):
        grad = drawn["grads"][step].contiguous()
        states = state if isinstance(state, tuple) else (state,)
        grads = (grad,) if plan.split is None else plan.split.split(grad)
        for own, piece in zip(states, grads, strict=True):
            moved = own.momentum + piece
            for M in moved if moved.ndim == 3 else (moved,):
                dim = 0 if plan.algorithm == "dion3" or M.shape[0] <= M.shape[1] else 1
                norms = torch.sort(M.abs().sum(1 - dim), descending=True).values.tolist()
                count = plan.hyper.count(len(norms))
                if count < len(norms) and norms[count - 1] > 0:
                    least = min(least, (norms[count - 1] - norms[count]) / norms[count - 1])
        hyper = replace(plan.hyper, **{name: values[step] for name, values in plan.schedule.items()})
        weight, state = ALGORITHMS[plan.algorithm].step(weight, grad, state, hyper, split=plan.split)
    return least


def hyper_as_data(plan: Plan) -> dict[str, Any]:
    """All hyperparameters as JSON, the polynomial by its coefficients and the factor on the norm by its value."""
    data = {one.name: getattr(plan.hyper, one.name) for one in fields(plan.hyper)}
    name = data.get("polynomial")
    if isinstance(name, str) and name != "exact":
        data["polynomial_name"] = name
        data["polynomial"] = [list(triple) for triple in POLYNOMIALS[name].coefficients]
        if data["norm_factor"] is None:
            data["norm_factor"] = POLYNOMIALS[name].norm_factor
    if isinstance(data.get("betas"), tuple):
        data["betas"] = list(data["betas"])
    if plan.level == "L0":
        kept = ("polynomial", "polynomial_name", "epsilon", "epsilon_rule", "norm_factor")
        data = {key: data[key] for key in kept if key in data}
    return data


def derived(plan: Plan) -> dict[str, Any]:
    """What follows from the hyperparameters for each piece: factor on lr, rank, number of slices."""
    if plan.level == "L0" or not hasattr(plan.hyper, "scale"):
        return {}
    whole = torch.zeros(plan.shape)
    shapes = [tuple(p.shape[-2:]) for p in (plan.split.split(whole) if plan.split else (whole,))]
    hyper = plan.hyper
    found: dict[str, Any] = {
        "matrices": [list(shape) for shape in shapes],
        "scale_factor": [scale_factor(hyper.scale, m, n, hyper.weight_storage) for m, n in shapes],
    }
    if hasattr(hyper, "rank"):
        found["rank"] = [hyper.rank(*shape) for shape in shapes]
    if hasattr(hyper, "count"):
        side = min if plan.algorithm == "dion2" else (lambda shape: shape[0])
        found["count"] = [hyper.count(side(shape)) for shape in shapes]
    return found


def split_as_data(split: Any) -> dict[str, Any] | None:
    """A split as JSON: its kind and its fields."""
    if split is None:
        return None
    values = {one.name: getattr(split, one.name) for one in fields(split)}
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if value is not None
    }
    return {"kind": type(split).__name__, **plain}
