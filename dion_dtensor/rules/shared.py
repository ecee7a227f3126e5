"""What the rules that orthonormalize by a polynomial have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from dion_dtensor.assembly import elementwise
from dion_dtensor.orthonormalize import gram_newton_schulz, newton_schulz, resolve_polynomial
from dion_dtensor.orthonormalize.polynomial import Coefficients, norm_factor_of
from dion_dtensor.rules.rule import Scalar

__all__ = [
    "POLYNOMIAL_DEFAULTS",
    "check_fraction",
    "check_mu",
    "check_polynomial",
    "normalized_rows",
    "orthonormalizer",
    "polynomial_fields",
    "to_dtype",
]

POLYNOMIAL_DEFAULTS: dict[str, Any] = {
    "polynomial": "polar_express",
    "epsilon": 1e-8,
    "epsilon_rule": "add",
    "norm_factor": None,
    "scale": "spectral_norm",
    "weight_storage": "out_in",
}


class PolynomialHyper(Protocol):
    """The fields of a rule's hyper that :func:`orthonormalizer` reads."""

    @property
    def coefficients(self) -> Coefficients: ...
    @property
    def epsilon(self) -> Scalar: ...
    @property
    def epsilon_rule(self) -> str: ...
    @property
    def norm_factor(self) -> float: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...


def orthonormalizer(hyper: PolynomialHyper) -> Callable[[Tensor], Tensor]:
    """The polynomial as a function of a stack of whole matrices."""
    exact = hyper.compute_dtype == torch.float64
    return partial(
        newton_schulz if exact else gram_newton_schulz,
        coefficients=hyper.coefficients,
        epsilon=hyper.epsilon,
        epsilon_rule=hyper.epsilon_rule,
        norm_factor=hyper.norm_factor,
    )


def normalized_rows(U: Tensor, variance: Tensor, beta2: Scalar, epsilon: Scalar) -> tuple[Tensor, Tensor]:
    """Divide each row by the root of its running variance, and give the matrix its Frobenius norm back.

    Args:
        U: ``[k, m, n]``, orthonormalized whole matrices.
        variance: ``[k, m, 1]``, before this step.
        beta2: its decay.
        epsilon: added to the root, and the smallest denominator of the rescaling.

    Returns:
        The rows in the dtype of ``U`` and the new variance, computed in that of ``variance``.  Source: Li et al.,
        arXiv 2510.05491; order of operations of microsoft/dion (dion/normuon.py).
    """
    wide = U.to(variance.dtype)
    variance = beta2 * variance + (1 - beta2) * wide.square().mean(-1, keepdim=True)
    rows = wide / (variance.sqrt() + epsilon)

    def size(stack: Tensor) -> Tensor:
        total: Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        return total

    factor = size(wide) / torch.clamp(size(rows), min=epsilon)
    return (rows * factor.to(rows.dtype)).to(U.dtype), variance


def to_dtype(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """``stack`` in another dtype, where it lies."""
    return elementwise(lambda values: values.to(dtype), stack)


def polynomial_fields(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, Any]:
    """The polynomial by its coefficients, whatever the shape."""
    factor = group["norm_factor"]
    return {
        "coefficients": resolve_polynomial(group["polynomial"]),
        "norm_factor": norm_factor_of(group["polynomial"]) if factor is None else float(factor),
    }


def check_mu(group: Mapping[str, Any]) -> None:
    """Refuse a factor outside [0, 1)."""
    if not 0 <= float(group["mu"]) < 1:
        raise ValueError(f"mu={group['mu']} must be in [0, 1)")


def check_fraction(name: str, group: Mapping[str, Any]) -> None:
    """Refuse a fraction outside (0, 1], or one that is no plain number: it decides shapes."""
    if not isinstance(group[name], Real) or not 0 < float(group[name]) <= 1:
        raise ValueError(f"{name}={group[name]!r} must be a number in (0, 1]")


def check_polynomial(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    check_mu(group)
    if group["epsilon_rule"] not in ("add", "clamp"):
        raise ValueError(f"epsilon_rule={group['epsilon_rule']!r} must be 'add' or 'clamp'")
    if group["norm_factor"] is not None and not group["norm_factor"] > 0:
        raise ValueError(f"norm_factor={group['norm_factor']} must be positive")
    resolve_polynomial(group["polynomial"])


def check_variance(group: Mapping[str, Any]) -> None:
    """Refuse a decay of the variance outside [0, 1), or an epsilon that is not positive."""
    if not 0 <= float(group["beta2"]) < 1:
        raise ValueError(f"beta2={group['beta2']} must be in [0, 1)")
    if not group["variance_epsilon"] > 0:
        raise ValueError(f"variance_epsilon={group['variance_epsilon']} must be positive")
