"""Hyperparameters that several rules share, and their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from dion_ref.polynomials import POLYNOMIALS, Triple

MOMENTA = ("sum", "ema")
EPSILON_RULES = ("add", "clamp")
SCALES = ("spectral_norm", "keller", "moonlight", "rms_norm", "nvidia", None)
WEIGHT_STORAGES = ("out_in", "in_out")
EXACT = "exact"
"""The polynomial's name that asks for the exact polar factor."""


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def number(field: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> float:
    """Refuse anything but a finite number in [low, high), or (low, high) with ``open_low``.

    Returns:
        The number: an int or float as it is, any other real number (a scalar of NumPy) as a float.

    Raises:
        TypeError: no real number, or a bool.
        ValueError: out of range.
    """
    if not _is_real(value):
        raise TypeError(f"{field} must be a number, got {value!r}")
    if not ((low < value if open_low else low <= value) and value < high):
        raise ValueError(f"{field} must lie in {'(' if open_low else '['}{low}, {high}), got {value!r}")
    # NumPy's float32 would round what it is combined with to float32
    return value if type(value) in (int, float) else float(value)


def set_number(
    owner: object, field: str, *, low: float, high: float = math.inf, open_low: bool = False
) -> None:
    """Check a field of a frozen dataclass by ``number``, and keep what that returns.

    Raises:
        TypeError, ValueError: as ``number``.
    """
    checked = number(field, getattr(owner, field), low=low, high=high, open_low=open_low)
    object.__setattr__(owner, field, checked)


def fraction(field: str, value: Any) -> float:
    """Refuse anything but a number in (0, 1].

    Returns:
        The number: an int or float as it is, any other real number as the float of the decimal that it prints as.

    Raises:
        TypeError: no real number, or a bool.
        ValueError: out of range.
    """
    if not _is_real(value):
        raise TypeError(f"{field} must be a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{field} must lie in (0, 1], got {value!r}")
    # the decimal, since float(np.float32(0.28)) is a little more and would select one slice of 25 more
    return value if type(value) in (int, float) else float(Fraction(str(value)))


def integer(field: str, value: Any, *, low: int | None = None) -> int:
    """Refuse anything but an integer of at least ``low``.

    Returns:
        It, as an int.

    Raises:
        TypeError: no integer (a scalar of NumPy may be one), or a bool.
        ValueError: below ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{field} must be an int, got {value!r}")
    if low is not None and int(value) < low:
        raise ValueError(f"{field} must be >= {low}, got {value}")
    return int(value)


def flag(field: str, value: Any) -> None:
    """Refuse anything but True or False.

    Raises:
        TypeError: not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be a bool, got {value!r}")


def one_of(field: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value that is not listed.

    Raises:
        ValueError: not in ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def two_betas(value: Any) -> tuple[float, float]:
    """Refuse anything but a tuple or list of two numbers in [0, 1).

    Returns:
        Both, as ``number`` returns them.

    Raises:
        TypeError: not a pair of numbers.
        ValueError: out of range.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {value!r}")
    return number("betas[0]", value[0], low=0, high=1), number("betas[1]", value[1], low=0, high=1)


def checked_polynomial(value: Any) -> str | tuple[Triple, ...]:
    """A name in ``POLYNOMIALS``, "exact", or literal triples (lists are turned into tuples).

    Raises:
        TypeError: neither a name nor a sequence of number triples.
        ValueError: an unknown name, no step at all, or a coefficient that is not finite.
    """
    if isinstance(value, str):
        one_of("polynomial", value, (*POLYNOMIALS, EXACT))
        return value
    if not isinstance(value, Sequence):
        raise TypeError(f"polynomial must be a name or a sequence of (a, b, c), got {value!r}")
    triples = []
    for step in value:
        if not isinstance(step, Sequence) or isinstance(step, str) or len(step) != 3:
            raise TypeError(f"a polynomial's step must be (a, b, c), got {step!r}")
        for coefficient in step:
            number("a polynomial's coefficient", coefficient, low=-math.inf, open_low=True)
        triples.append((float(step[0]), float(step[1]), float(step[2])))
    if not triples:
        raise ValueError("polynomial must have at least one step")
    return tuple(triples)


@dataclass(frozen=True, kw_only=True)
class CommonHyper:
    """What every rule has.

    Args:
        lr: base learning rate, >= 0.
        weight_decay: decoupled decay, >= 0; ``W <- W (1 - lr * weight_decay)``, before the update.
        cautious: decay only where ``update * W >= 0`` (arXiv 2510.12402).
    """

    lr: float = 0.01
    weight_decay: float = 0.01
    cautious: bool = False

    def __post_init__(self) -> None:
        set_number(self, "lr", low=0)
        set_number(self, "weight_decay", low=0)
        flag("cautious", self.cautious)


@dataclass(frozen=True, kw_only=True)
class MatrixHyper(CommonHyper):
    """What every matrix rule has.

    Args:
        mu: momentum, in [0, 1); error-feedback factor in Dion, decay of the selected slices in Dion2.
        epsilon: positive; added to (or clamping) the norm that the rule divides by.
        scale: how the step grows with the shape, see ``update.scale_factor``.
        weight_storage: "out_in" if W is fan_out × fan_in, "in_out" if it is stored transposed.
    """

    mu: float = 0.95
    epsilon: float = 1e-8
    scale: str | None = "spectral_norm"
    weight_storage: str = "out_in"

    def __post_init__(self) -> None:
        super().__post_init__()
        set_number(self, "mu", low=0, high=1)
        set_number(self, "epsilon", low=0, open_low=True)
        one_of("scale", self.scale, SCALES)
        one_of("weight_storage", self.weight_storage, WEIGHT_STORAGES)


@dataclass(frozen=True, kw_only=True)
class PolynomialHyper(MatrixHyper):
    """What every rule that orthonormalizes by Newton-Schulz has.

    Args:
        polynomial: a name in ``POLYNOMIALS``, "exact" for the polar factor, or the literal ``(a, b, c)`` steps.
        epsilon_rule: "add" or "clamp", see ``linalg.normalize_input``.
        norm_factor: None for the table's own (1.02 for "polar_express", else 1).
    """

    polynomial: str | tuple[Triple, ...] = "polar_express"
    epsilon_rule: str = "add"
    norm_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "polynomial", checked_polynomial(self.polynomial))
        one_of("epsilon_rule", self.epsilon_rule, EPSILON_RULES)
        if self.norm_factor is not None:
            set_number(self, "norm_factor", low=0, open_low=True)
