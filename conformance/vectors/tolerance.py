"""How far a right port may be off: derived from the oracle rerun in the same precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_UP, Decimal

import torch
from torch import Tensor

from conformance.vectors.oracle import Tensors, run
from conformance.vectors.plans import Plan
from dion_ref import Precision, philox

FACTOR = 4.0
RERUNS = 4
UNITS = 16.0  # least number of roundings that a tolerance grants
COMPUTE_UNITS = 4.0
USELESS = 0.5

DERIVATION = (
    "Errors are relative in the Frobenius norm, the largest over the steps; columns of Q are compared up to sign. "
    "float32 and bfloat16: the oracle is rerun with weights, gradients and states in float32 and the products of its "
    "specification's section 1.2 in the compute dtype, once on the inputs and three times on inputs of which every "
    "element is changed by one unit of float32 rounding, up or down; the tolerance is 4 times the largest error. "
    "float64: the tolerance of float32, in units of machine epsilon. Never less than 16 machine epsilons of the storage "
    "dtype, nor, where the rerun shows that the compute dtype reaches a quantity, than 4 of the compute dtype. A "
    "tolerance above 0.5 decides nothing and is null. Rounded up to two digits."
)


def relative(value: Tensor, reference: Tensor) -> float:
    """``||value - reference|| / ||reference||``; 0 where both are zero, inf where only the reference is."""
    size = float(torch.linalg.vector_norm(reference))
    difference = float(torch.linalg.vector_norm(value - reference))
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
    errors = {name: _errors(plan, drawn, expected, p) for name, p in (("float32", single), ("bfloat16", half))}
    eps = {name: torch.finfo(getattr(torch, name)).eps for name in found}
    for quantity in expected:
        units = max(FACTOR * errors["float32"][quantity] / eps["float32"], UNITS)
        found["float64"][quantity] = _rounded(units * eps["float64"])
        found["float32"][quantity] = _rounded(units * eps["float32"])
        low = errors["bfloat16"][quantity]
        touched = low > 4 * errors["float32"][quantity] + UNITS * eps["float32"]
        floor = COMPUTE_UNITS * eps["bfloat16"] if touched else UNITS * eps["float32"]
        found["bfloat16"][quantity] = _rounded(max(FACTOR * low, floor))
    return found


def _errors(
    plan: Plan, drawn: Mapping[str, Tensor], expected: Tensors, precision: Precision
) -> dict[str, float]:
    worst = dict.fromkeys(expected, 0.0)
    for rerun in range(RERUNS):
        again = run(plan, _changed(drawn, rerun), precision)
        for quantity, value in again.items():
            worst[quantity] = max(worst[quantity], error(quantity, value, expected[quantity]))
    return worst


def _changed(drawn: Mapping[str, Tensor], rerun: int) -> Tensors:
    """Each element times 1 ± 2^-24 (rounded to float32 by the run: up or down by at most one unit); none in rerun 0."""
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
        changed[key] = value * (1 + sign * 2.0**-23)
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
