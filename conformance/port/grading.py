"""From what an adapter did to a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance.adapters import STATES
from conformance.port.execute import Outcome
from conformance.vectors import Case
from conformance.vectors.loader import STORAGE

ROUNDINGS = 16.0
"""Of a weight, that any update may be off by: the least that tolerances grant as well."""
PASS, FAIL, ERROR, ACCEPTABLE = "pass", "fail", "error", "acceptable"
SKIP, XFAIL, XPASS, UNCLAIMED, UNDECIDED = "skip", "xfail", "xpass", "not claimed", "undecided"
BAD = (FAIL, ERROR, XPASS)
"""Statuses that make the run fail."""

Spectrum = tuple[tuple[float, float], ...]
"""By singular direction: its length, and the error over it."""


@dataclass(frozen=True)
class Verdict:
    """What is said of one case in one dtype.

    Attributes:
        case: id of the vector or of the mesh case.
        dtype: compute dtype.
        layout: "one device", or how the parameters lay.
        status: one of the constants above.
        message: what is wrong, or why there is no verdict; empty on a plain pass.
        errors: by quantity, the relative error and what is allowed.
        seconds: wall time.
        spectrum: by singular direction of the expected update, longest first: its length, and the error over it.
        details: a traceback.
        about: what the case is for.
        ungraded: keys of the state that the port could be held to, and gave nothing for.
    """

    case: str
    level: str
    algorithm: str
    dialect: str
    dtype: str
    status: str
    layout: str = "one device"
    message: str = ""
    errors: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    seconds: float = 0.0
    spectrum: Spectrum = ()
    details: str = ""
    about: str = ""
    ungraded: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Case and dtype: what skip files and pytest call it."""
        return f"{self.case}@{self.dtype}"

    @property
    def used(self) -> float:
        """The largest error over what is allowed."""
        return max((e / a for e, a in self.errors.values() if a), default=0.0)

    def with_status(self, status: str, message: str = "") -> Verdict:
        """The same, judged otherwise."""
        return replace(self, status=status, message=message or self.message)


def relative_error(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """``||value - reference|| / ||reference||``; 0 where both are zero, inf where only one is or on NaN."""
    size = float(np.linalg.norm(reference))
    difference = float(np.linalg.norm(value - reference))
    if not math.isfinite(difference):
        return math.inf
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def error_of(quantity: str, value: NDArray[Any], reference: NDArray[Any]) -> float:
    """The error of a quantity: the largest step's for updates, up to the signs of columns for Q."""
    if value.shape != reference.shape:
        return math.inf
    if quantity == "update":
        return max(relative_error(one, other) for one, other in zip(value, reference, strict=True))
    if quantity.startswith("state/Q"):
        turn = np.sign((value * reference).sum(axis=-2, keepdims=True))
        value = value * np.where(turn == 0, 1.0, turn)
    return relative_error(value, reference)


def blank(case: Case, dtype: str, status: str, message: str) -> Verdict:
    """A verdict without a measurement."""
    return Verdict(
        *(case.id, case.level, case.algorithm, case.dialect, dtype, status),
        message=message,
        about=case.comment,
    )


def grade(case: Case, dtype: str, outcome: Outcome, states: tuple[str, ...] = ("*",)) -> Verdict:
    """The verdict on an outcome.

    Args:
        case: the vector.
        dtype: compute dtype.
        outcome: what the adapter did.
        states: keys of the state that the port claims; "*" for every key that it returned.
    """
    base = replace(blank(case, dtype, PASS, ""), seconds=outcome.seconds, details=outcome.details)
    if case.result == "error":
        return _grade_refusal(case, outcome, base)
    if outcome.raised is not None or outcome.update is None:
        return base.with_status(ERROR, f"{outcome.phase} raised {outcome.raised}")
    if unknown := sorted({key.split("/")[0] for key in outcome.states} - set(STATES)):
        said = (
            f"canonical_state gave {', '.join(map(repr, unknown))}; the oracle's keys are {', '.join(STATES)}"
        )
        return base.with_status(ERROR, said)
    tolerance, ungraded = case.tolerance[dtype] or {}, []
    errors: dict[str, tuple[float, float | None]] = {}
    shapes: dict[str, str] = {}
    for quantity, reference in case.expected.items():
        key = quantity.removeprefix("state/")
        if quantity == "update":
            errors[quantity] = (error_of(quantity, outcome.update, reference), tolerance.get(quantity))
        elif key in outcome.states and ("*" in states or key.split("/")[0] in states):
            value = (
                outcome.states[key].reshape(reference.shape)
                if _fits(outcome.states[key], reference)
                else None
            )
            if value is None:
                shapes[quantity] = (
                    f"{key} has shape {list(outcome.states[key].shape)}, not {list(reference.shape)}"
                )
            error = math.inf if value is None else error_of(quantity, value, reference)
            errors[quantity] = (error, tolerance.get(quantity))
        elif "*" not in states and key.split("/")[0] in states:
            errors[quantity] = (math.inf, tolerance.get(quantity))
        else:
            ungraded.append(key.split("/")[0])
    base = replace(
        base,
        errors=errors,
        spectrum=spectrum(outcome.update, case.expected["update"]),
        ungraded=tuple(dict.fromkeys(ungraded)),
    )
    if not np.isfinite(outcome.update).all():
        return base.with_status(FAIL, "the new weight has NaN or infinite values")
    wrong = {name: pair for name, pair in errors.items() if pair[1] is not None and not pair[0] <= pair[1]}
    if wrong:
        if (note := acceptable(case, dtype, outcome.update, errors["update"][1])) is not None:
            return base.with_status(ACCEPTABLE, note)
        if (
            case.acceptable and errors["update"][1] is None
        ):  # states alone are off, as another right update has them
            return base.with_status(UNDECIDED, f"{dtype} cannot tell this from what is acceptable")
        words = [shapes.get(name) or in_words(name, *pair) for name, pair in wrong.items()]
        return base.with_status(FAIL, "; ".join(words))
    if errors["update"][1] is None:
        return base.with_status(UNDECIDED, f"{dtype} decides nothing here: a right port may be off by half")
    return base


def acceptable(case: Case, dtype: str, update: NDArray[Any], allowed: float | None) -> str | None:
    """The note of the other result that an update is, or None if it is none of those that are no bug."""
    return next(
        (note for note, other in case.acceptable if _is_other(case, dtype, update, other, allowed)), None
    )


def _is_other(
    case: Case, dtype: str, update: NDArray[Any], other: NDArray[Any], allowed: float | None
) -> bool:
    """Whether an update is another one that is no bug.

    Beyond the tolerance, what the weight's own rounding makes of it: that is no less for a smaller update.
    """
    if allowed is None or update.shape != other.shape:
        return False
    rounding = (
        ROUNDINGS
        * float(np.finfo(STORAGE[dtype]).eps)
        * float(np.linalg.norm(case.inputs.get("weight", 0.0)))
    )
    return all(
        float(np.linalg.norm(one - right)) <= allowed * float(np.linalg.norm(right)) + rounding
        for one, right in zip(update, other, strict=True)
    )


def _fits(value: NDArray[Any], reference: NDArray[Any]) -> bool:
    """True where one is the other but for dims of size one."""
    return [n for n in value.shape if n != 1] == [n for n in reference.shape if n != 1]


def in_words(name: str, error: float, allowed: float | None) -> str:
    """How far off a quantity is."""
    return f"{name.removeprefix('state/')} is off by {error:.2g}, allowed {allowed:.2g}"


def _grade_refusal(case: Case, outcome: Outcome, base: Verdict) -> Verdict:
    """NaN goes in: raising is right, and what else may be done is listed with the case."""
    if outcome.raised is not None:
        if outcome.refused:
            return base.with_status(PASS)
        return base.with_status(ERROR, f"{outcome.phase} raised {outcome.raised}")
    assert outcome.update is not None
    for note, other in case.acceptable:
        if np.isnan(other).any() and np.isnan(outcome.update).any():
            return base.with_status(ACCEPTABLE, note)
    became = "a finite update" if np.isfinite(outcome.update).all() else "an infinite one"
    return base.with_status(FAIL, f"a NaN in the gradient became {became}, without an error")


def spectrum(update: NDArray[Any], reference: NDArray[Any]) -> Spectrum:
    """By singular direction of the expected update, for the worst step: its length ``s``, and the error over it.

    With ``E`` the whole error and ``u``, ``v`` the direction's vectors the error over it is the larger of ``||E v||``
    and ``||E^T u||``: what the update does there beyond ``s u v^T`` is part of it. Empty where nothing can be compared.
    """
    if update.shape != reference.shape or not np.isfinite(update).all() or not reference.size:
        return ()
    step = int(np.argmax([relative_error(one, other) for one, other in zip(update, reference, strict=True)]))
    value, wanted = (
        array[step].reshape(array.shape[1] if array.ndim > 2 else 1, -1) for array in (update, reference)
    )
    if not wanted.any():
        return ()
    left, lengths, right = np.linalg.svd(wanted, full_matrices=False)
    error = value - wanted
    over = np.maximum(np.linalg.norm(error @ right.T, axis=0), np.linalg.norm(error.T @ left, axis=0))
    return tuple((float(s), float(e)) for s, e in zip(lengths, over, strict=True))
