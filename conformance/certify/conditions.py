"""How far rounding may carry a result: first-order perturbation theory, without dimension factors.

Everything here is the norm of a derivative times the norm of what is rounded, in units of float64 eps.  Independent
roundings are added as root of squares; sums of n terms get no factor n, since their errors grow as its root at most
and the limit of 32 units has room for the root at the sizes of the cases (40 at most, root 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpmath import mp

from conformance.certify.precise import Matrix, Real
from conformance.certify.primitives import Basis
from conformance.certify.tables import Triple

_NEAR = 1e-6
"""Divided differences of float64 numbers nearer than this are replaced by derivatives."""


def _value(x: float, step: tuple[float, float, float]) -> float:
    a, b, c = step
    return x * (a + x * x * (b + x * x * c))


def _slope(x: float, step: tuple[float, float, float]) -> float:
    a, b, c = step
    return a + x * x * (3 * b + 5 * x * x * c)


def _amplification(start: Sequence[float], end: Sequence[float], slopes: Sequence[float]) -> float:
    """Norm of the derivative of an odd function of a matrix, from its values at the singular values.

    For ``f(X) = U f(S) V^T`` the derivative acts on symmetric and skew parts of ``U^T dX V`` entry by entry with
    ``(f(s) - f(t))/(s - t)`` and ``(f(s) + f(t))/(s + t)``, and with ``f(s)/s`` outside the square (Noferini, "A
    formula for the Frechet derivative of a generalized matrix function", SIAM J. Matrix Anal. Appl. 38, 2017), so its
    norm in Frobenius is the largest of them.
    """
    worst = max(abs(slope) for slope in slopes)
    # paired with 0: the directions outside the range
    for i, (s, f) in enumerate(zip(start, end, strict=True)):
        for t, g in zip([0.0, *start[: i + 1]], [0.0, *end[: i + 1]], strict=True):
            for sign in (1.0, -1.0):
                gap = s + sign * t
                if abs(gap) > _NEAR * (abs(s) + abs(t)):
                    worst = max(worst, abs((f + sign * g) / gap))
    return worst


def newton_schulz_bound(singular: Sequence[Real], steps: Sequence[Triple], input_error: float) -> float:
    """Bound on the error of the composed polynomial.

    The input's error is amplified by the derivative of the whole composition.  Step k adds the rounding of its own
    terms, ``|a| s + |b| s^3 + |c| s^5`` over the singular values (not of their sum: they cancel), amplified by the
    derivative of what follows.

    Args:
        singular: singular values of X, all ``min(m, n)`` of them.
        steps: the coefficients.
        input_error: bound on the error of X in Frobenius norm, in units of eps, underflow included; each step's own
            underflow is smaller than it.
    """
    plain = [(float(a), float(b), float(c)) for a, b, c in steps]
    stages = [[float(s) for s in singular]]
    for step in plain:
        stages.append([_value(x, step) for x in stages[-1]])
    amplifications = [1.0]
    slopes = [1.0] * len(stages[0])
    for k in range(len(plain) - 1, -1, -1):
        slopes = [rest * _slope(x, plain[k]) for rest, x in zip(slopes, stages[k], strict=True)]
        amplifications.insert(0, _amplification(stages[k], stages[-1], slopes))
    contributions = [amplifications[0] * input_error]
    for k, (a, b, c) in enumerate(plain):
        terms = [_value(abs(x), (abs(a), abs(b), abs(c))) for x in stages[k]]
        contributions.append(amplifications[k + 1] * math.hypot(*terms))
    return math.hypot(*contributions)


def polar_bound(kept: Sequence[Real], input_error: Real, size: Real) -> Real:
    """Bound on the error of the exact polar factor: ``||dX||_F / sigma_min`` over the kept singular values.

    The derivative divides by ``(s + t)/2`` in the square part and by s outside (Higham, Functions of Matrices, theorem
    8.9); ``||dX||`` is the input's error plus the backward error of a decomposition, eps ``||X||_F``.
    """
    if not kept:
        return mp.zero
    return (input_error + size) / min(kept) + mp.sqrt(len(kept))


def upper_inverse(T: Matrix) -> Matrix:
    """Inverse of an upper triangular matrix, column by column."""
    size = len(T)
    inverse = [[mp.zero] * size for _ in range(size)]
    for j in range(size):
        for i in range(j, -1, -1):
            known = mp.fdot((T[i][k], inverse[k][j]) for k in range(i + 1, j + 1))
            inverse[i][j] = ((1 if i == j else 0) - known) / T[i][i]
    return inverse


def basis_turns(basis: Basis, column_errors: Sequence[Real]) -> list[Real]:
    """By how much each kept column of an ordered basis may turn: ``w_j = sum_k delta_k |T^-1|_kj``.

    With ``A = P T``, a change dA of A changes P by ``P K + (I - P P^T) dA T^-1``, K skew with the lower part of
    ``P^T dA T^-1`` (Stewart, "Perturbation bounds for the QR factorization", SIAM J. Numer. Anal. 14, 1977).  So
    column j moves by at most w_j away from its predecessors, each predecessor i by w_i towards it, and
    ``||dP||_F <= sqrt(2) ||w||``.  It is the condition number of the kept columns, made columnwise: it does not change
    when columns are rescaled, and an early column doesn't pay for a late one.

    Args:
        basis: the exact one.
        column_errors: ``delta``, bound on ``||dA_k||_2`` for every column of A, dead ones too.
    """
    inverse = upper_inverse(basis.triangular)
    errors = [column_errors[j] for j in basis.kept]
    return [mp.fdot((errors[k], abs(inverse[k][j])) for k in range(j + 1)) for j in range(len(errors))]


def hypot(*values: Real) -> Real:
    """Root of the sum of squares."""
    return mp.sqrt(mp.fsum(value * value for value in values))
