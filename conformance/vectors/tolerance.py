"""How far a right port may be off: derived from the oracle rerun in the same precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import ROUND_UP, Decimal
from typing import Any

import torch
from torch import Tensor

from conformance.vectors.oracle import Tensors, run
from conformance.vectors.plans import Plan
from dion_ref import POLYNOMIALS, Precision, philox

FACTOR = {"float32": 4.0, "bfloat16": 2.0}
RERUNS = 4
SMALL = 16  # elements; so few may all be near by luck, so they get more reruns
UNITS = 16.0  # least number of roundings that a tolerance grants
COMPUTE_UNITS = 4.0
USELESS = 0.5

DERIVATION = (
    "Errors are relative in the Frobenius norm, the largest over the steps; columns of Q are compared up to sign."
    " float32 and bfloat16: the oracle is rerun with weights, gradients and states in float32 and the products of"
    " its specification's section 1.2 in the compute dtype: once as it is, and three times (fifteen for at most "
    "16 elements) with every element of the inputs changed by one unit of float32 rounding, and every coefficient"
    " of the polynomial by half a unit, up or down, as other orders of operation would. In bfloat16, where there "
    "is a polynomial, as often again with gradient, momentum and coefficients changed by half a unit of bfloat16 "
    "rounding, for what lies behind the polynomial: a port may round its input first, or its terms later. The "
    "tolerance is 4 times the largest error in float32 and twice in bfloat16. float64: the tolerance of float32, "
    "in units of machine epsilon. Never less than 16 machine epsilons of the storage dtype, nor, where the rerun "
    "shows that the compute dtype reaches a quantity, than 4 of the compute dtype. Where float32 decides nothing "
    "by design, float64 is rerun likewise. A tolerance above 0.5 decides nothing and is null. Rounded up to two "
    "digits."
)


def relative(value: Tensor, reference: Tensor) -> float:
    """``||value - reference|| / ||reference||``; 0 where both are zero, inf where only the reference is or at a NaN."""
    size = float(torch.linalg.vector_norm(reference))
    difference = float(torch.linalg.vector_norm(value - reference))
    if math.isnan(difference):  # no comparison is true of a NaN: it would count as no error at all
        return math.inf
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def error(quantity: str, value: Tensor, reference: Tensor) -> float:
    """The error of a quantity: by step for updates, up to the signs of columns for Q."""
    if quantity == "update":
        return max(relative(one, other) for one, other in zip(value, reference, strict=True))
    if quantity.startswith("state/Q"):
        turn = torch.sign((value * reference).sum(dim=-2, keepdim=True))
        value = value * torch.where(turn == 0, 1.0, turn)
    return relative(value, reference)


def tolerances(
    plan: Plan, drawn: Mapping[str, Tensor], expected: Tensors
) -> dict[str, dict[str, float | None]]:
    """By compute dtype and quantity; None where that dtype decides nothing."""
    single, half = (
        Precision(torch.float32, torch.float32),
        Precision(torch.float32, torch.bfloat16),
    )
    found: dict[str, dict[str, float | None]] = {"float64": {}, "float32": {}, "bfloat16": {}}
    errors = {
        name: _errors(plan, drawn, expected, p) for name, p in (("float32", single), ("bfloat16", half))
    }
    none: dict[str, float | None] = dict.fromkeys(expected)
    eps = {name: torch.finfo(getattr(torch, name)).eps for name in found}
    if plan.gradient == "nearly-low-rank":
        return {"float64": _double(plan, drawn, expected), "float32": none, "bfloat16": none}
    for quantity in expected:
        units = max(FACTOR["float32"] * errors["float32"][quantity] / eps["float32"], UNITS)
        found["float64"][quantity] = _rounded(units * eps["float64"])
        found["float32"][quantity] = _rounded(units * eps["float32"])
        low = errors["bfloat16"][quantity]
        touched = low > 4 * errors["float32"][quantity] + UNITS * eps["float32"]
        floor = COMPUTE_UNITS * eps["bfloat16"] if touched else UNITS * eps["float32"]
        found["bfloat16"][quantity] = _rounded(max(FACTOR["bfloat16"] * low, floor))
    return found


def _double(plan: Plan, drawn: Mapping[str, Tensor], expected: Tensors) -> dict[str, float | None]:
    """Where float32 decides nothing: as in float32, with the units of float64."""
    worst, eps = dict.fromkeys(expected, 0.0), torch.finfo(torch.float64).eps
    for rerun in range(1, 2 * RERUNS):
        _keep_worst(worst, run(plan, _changed(drawn, rerun, 2.0**-52)), expected)
    return {key: _rounded(max(FACTOR["float32"] * error, UNITS * eps)) for key, error in worst.items()}


def _errors(
    plan: Plan, drawn: Mapping[str, Tensor], expected: Tensors, precision: Precision
) -> dict[str, float]:
    worst = dict.fromkeys(expected, 0.0)
    reruns = RERUNS * (4 if torch.Size(plan.shape).numel() <= SMALL else 1)
    for rerun in range(reruns):
        again = _changed(drawn, rerun, 2.0**-23)
        _keep_worst(worst, _rerun(_rounded_plan(plan, rerun, 2.0**-24), again, precision, expected), expected)
    if precision.compute == torch.bfloat16 and _coefficients(plan.hyper):
        before = ("grads", "matrix", "state/momentum")
        for rerun in range(1, reruns):
            large = _changed(drawn, rerun, 2.0**-9)
            again = {key: large[key] if key in before else value for key, value in drawn.items()}
            found = _rerun(_rounded_plan(plan, rerun, 2.0**-9), again, precision, expected)
            found.pop("state/momentum", None)
            _keep_worst(worst, found, expected)
    return worst


def _rerun(plan: Plan, drawn: Mapping[str, Tensor], precision: Precision, expected: Tensors) -> Tensors:
    """As `run`; all of it infinitely wrong where the oracle refuses a step that overflows in this precision."""
    try:
        return run(plan, drawn, precision)
    except OverflowError:
        return {key: torch.full_like(value, math.inf) for key, value in expected.items()}


def _coefficients(hyper: Any) -> Sequence[tuple[float, float, float]]:
    """The triples of the rule's polynomial; none where it has no polynomial."""
    polynomial = getattr(hyper, "polynomial", "exact")
    if isinstance(polynomial, str):
        return POLYNOMIALS[polynomial].coefficients if polynomial != "exact" else ()
    triples: Sequence[tuple[float, float, float]] = polynomial
    return triples


def _rounded_plan(plan: Plan, rerun: int, unit: float) -> Plan:
    """The plan with every coefficient of its polynomial times 1 + unit or 1 - unit; as it is in rerun 0."""
    triples = _coefficients(plan.hyper)
    if rerun == 0 or not triples:
        return plan
    words = philox.philox4x32(_counter(len(triples), 3, rerun), philox.key_of(0, "tolerance:polynomial"))
    signs = ((words[0] & 1) * 2 - 1).tolist()
    changed = tuple(
        (a * (1 + s * unit), b * (1 + t * unit), c * (1 + u * unit))
        for (a, b, c), (s, t, u) in zip(triples, signs, strict=True)
    )
    factor = plan.hyper.norm_factor
    if factor is None and isinstance(plan.hyper.polynomial, str):
        factor = POLYNOMIALS[plan.hyper.polynomial].norm_factor
    return replace(plan, hyper=replace(plan.hyper, polynomial=changed, norm_factor=factor))


def _keep_worst(worst: dict[str, float], found: Tensors, expected: Tensors) -> None:
    for quantity, value in found.items():
        worst[quantity] = max(worst[quantity], error(quantity, value, expected[quantity]))


def _changed(drawn: Mapping[str, Tensor], rerun: int, unit: float) -> Tensors:
    """Each element times 1 + unit or 1 - unit; none in rerun 0."""
    if rerun == 0:
        return dict(drawn)
    changed = {}
    for key, value in drawn.items():
        if key == "state/step":
            changed[key] = value
            continue
        rows = value.shape[0]
        columns = max(1, value.numel() // rows)
        words = philox.philox4x32(_counter(rows, columns, rerun), philox.key_of(0, f"tolerance:{key}"))
        sign = ((words[0] & 1) * 2 - 1).to(torch.float64).reshape(value.shape)
        changed[key] = value * (1 + sign * unit)
    return changed


def _counter(rows: int, columns: int, rerun: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = torch.arange(rows, dtype=torch.int64)[:, None].expand(rows, columns)
    column = torch.arange(columns, dtype=torch.int64)[None, :].expand(rows, columns)
    return row, column, torch.full_like(row, rerun), torch.zeros_like(row)


def _rounded(value: float) -> float | None:
    """Up to two significant digits; None above USELESS or where the rerun failed."""
    if not math.isfinite(value) or value > USELESS:
        return None
    exact = Decimal(value)
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 1), rounding=ROUND_UP))
