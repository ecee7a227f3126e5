"""The primitives by other methods than the oracle's: no SVD, no Householder, no iteration on the short side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from mpmath import mp

from conformance.certify.precise import (
    EPS,
    Matrix,
    Real,
    add_to_diagonal,
    combine,
    frobenius,
    matmul,
    real,
    scaled,
    shape,
    singular_values,
    transpose,
    vector_norm,
    zeros,
)
from conformance.certify.tables import Triple

CLEAN_GAP = 16
"""A discrete decision must be this many times clear of rounding, or exact; a case at rounding level tests nothing."""


class UncleanCaseError(ValueError):
    """A case asks for a discrete decision at rounding level: the case is wrong, not the oracle."""


def clean_below(value: Real, threshold: Real, what: str) -> bool:
    """``value <= threshold``, refusing values within a factor ``CLEAN_GAP`` of it.

    Raises:
        UncleanCaseError: too near to tell in float64.
    """
    if value != 0 and threshold / CLEAN_GAP < value < threshold * CLEAN_GAP:
        raise UncleanCaseError(
            f"{what}: {mp.nstr(value, 5)} is too near to the threshold {mp.nstr(threshold, 5)}"
        )
    return bool(value <= threshold)


@dataclass(frozen=True)
class Basis:
    """Result of ``ordered_basis``.

    Args:
        vectors: ``[m, r]``, zero in the dead columns.
        kept: indices of the other ones.
        triangular: ``[len(kept), len(kept)]``, upper, positive diagonal: ``A[:, kept] = vectors[:, kept] triangular``.
    """

    vectors: Matrix
    kept: list[int]
    triangular: Matrix


def back_substituted(columns: Matrix, right: Sequence[Real]) -> list[Real]:
    """c with ``T c = right``, T upper triangular and given by its columns down to the diagonal."""
    rest, c = list(right), [mp.zero] * len(right)
    for k in reversed(range(len(c))):
        c[k] = rest[k] / columns[k][k]
        for i in range(k):
            rest[i] -= c[k] * columns[k][i]
    return c


def ordered_basis(A: Matrix, negligible: Sequence[Real]) -> Basis:
    """Modified Gram-Schmidt, column after column; a column with nothing new in it is dead.

    Args:
        A: ``[m, r]``.
        negligible: ``[r]``, the length that counts as rounding in each column.  What is new in column j counts as
            nothing at or below ``sqrt(negligible_j^2 + sum_k (c_k negligible_k)^2)``, with ``A_j = sum_k c_k A_k`` and
            what is new.

    Raises:
        UncleanCaseError: what is new is neither clearly more nor clearly less.
    """
    columns: Matrix = []
    kept: list[int] = []
    triangular: Matrix = []  # columns of the factor, without the zeros below the diagonal
    for j, column in enumerate(transpose(A)):
        rest, coordinates = list(column), []
        for i in kept:
            along = mp.fdot(columns[i], rest)
            coordinates.append(along)
            rest = [x - along * p for x, p in zip(rest, columns[i], strict=True)]
        new = vector_norm(rest)
        shares = [
            c * negligible[k] for c, k in zip(back_substituted(triangular, coordinates), kept, strict=True)
        ]
        if clean_below(new, vector_norm([negligible[j], *shares]), f"column {j} of the basis"):
            columns.append([mp.zero] * len(rest))
            continue
        columns.append([x / new for x in rest])
        kept.append(j)
        triangular.append([*coordinates, new])
    size = len(kept)
    return Basis(transpose(columns), kept, transpose([c + [mp.zero] * (size - len(c)) for c in triangular]))


def newton_polar(A: Matrix) -> Matrix:
    """Polar factor of a matrix of full rank: Gram-Schmidt to a square one, then Newton's ``X <- (gX + X^-T/g)/2``.

    ``g = (||X^-1||_F / ||X||_F)^(1/2)`` (Higham, Functions of Matrices, section 8.6).

    Raises:
        ZeroDivisionError: A is singular.
    """
    rows, columns = shape(A)
    if rows < columns:
        return transpose(newton_polar(transpose(A)))
    basis = ordered_basis(A, [mp.zero] * columns)
    if len(basis.kept) < columns:
        raise ZeroDivisionError("the matrix is singular")
    X = basis.triangular
    while True:
        inverse = transpose(mp.inverse(mp.matrix(X)).tolist())
        g = mp.sqrt(frobenius(inverse) / frobenius(X))
        following = combine(g / 2, X, 1 / (2 * g), inverse)
        change = frobenius(combine(1, following, -1, X)) / frobenius(following)
        X = following
        # quadratic: after a change of 1e-20 the next one would be at the last digit
        if change < real(10) ** -20:
            break
    inverse = transpose(mp.inverse(mp.matrix(X)).tolist())
    return matmul(basis.vectors, combine(real(1) / 2, X, real(1) / 2, inverse))


def eigen_polar(A: Matrix, tolerance: Real) -> Matrix:
    """Polar factor on the range: ``A V diag(1/s) V^T`` over the eigenvectors V of ``A^T A`` with ``s > tolerance``.

    Args:
        A: ``[m, n]``; works on the short side.
        tolerance: singular values at or below it are dropped.
    """
    rows, columns = shape(A)
    if rows < columns:
        return transpose(eigen_polar(transpose(A), tolerance))
    size = frobenius(A)
    if size == 0:
        return zeros(rows, columns)
    unit = scaled(1 / size, A)
    squares, vectors = mp.eigsy(mp.matrix(matmul(transpose(unit), unit)))
    kept = [k for k in range(columns) if squares[k] > 0 and mp.sqrt(squares[k]) * size > tolerance]
    V = [[vectors[i, k] for k in kept] for i in range(columns)]
    directions = matmul(unit, V)
    lengths = [mp.sqrt(squares[k]) for k in kept]
    return matmul([[x / s for x, s in zip(row, lengths, strict=True)] for row in directions], transpose(V))


def polar(A: Matrix) -> tuple[Matrix, list[Real]]:
    """Polar factor with singular values ``<= max(m, n) eps sigma_max`` dropped, and the kept singular values.

    Newton's iteration when nothing is dropped, else the eigenvectors of the Gram.

    Raises:
        UncleanCaseError: a singular value near the threshold.
    """
    singular = singular_values(A)
    tolerance = max(shape(A)) * EPS * singular[0]
    kept = [s for s in singular if not clean_below(s, tolerance, "singular value")]
    if not kept:
        return zeros(*shape(A)), []
    return (newton_polar(A) if len(kept) == len(singular) else eigen_polar(A, tolerance)), kept


def newton_schulz(X: Matrix, steps: Sequence[Triple]) -> Matrix:
    """The polynomial of the oracle as ``X F(X^T X)``: all steps on the right Gram matrix, X multiplied in once.

    With ``q = a + bG + cG^2``: ``F <- F q`` and ``G <- G q^2``.  The oracle multiplies X in at every step, on the side
    where its Gram is small; here it is the right side, except for wide matrices with more than 16 columns.
    """
    if len(X[0]) > max(len(X), 16):
        return transpose(newton_schulz(transpose(X), steps))
    G = matmul(transpose(X), X)
    F: Matrix | None = None
    for a, b, c in steps:
        q = add_to_diagonal(combine(b, G, c, matmul(G, G)), a)
        F = q if F is None else matmul(F, q)
        G = matmul(G, matmul(q, q))
    return X if F is None else matmul(X, F)


def normalize_columns(R: Matrix, epsilon: Real) -> Matrix:
    """Every column divided by its length plus epsilon, by dividing rows of the transpose."""
    columns = []
    for column in transpose(R):
        divisor = vector_norm(column) + epsilon
        columns.append([x / divisor for x in column])
    return transpose(columns)


def top_slices(slices: Sequence[Sequence[float]], count: int) -> list[int]:
    """Indices of the ``count`` slices with the largest sum of absolute values, as exact rationals; ties to the lowest.

    Args:
        slices: float64 entries, a slice each.
        count: how many.

    Raises:
        UncleanCaseError: the last chosen and the first left out differ, but by no more than float64 sums may.
    """
    lengths = [sum((abs(Fraction(x)) for x in entries), Fraction(0)) for entries in slices]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if count < len(order):
        last, following = lengths[order[count - 1]], lengths[order[count]]
        if 0 < last - following <= CLEAN_GAP * len(slices[0]) * Fraction(EPS) * last:
            raise UncleanCaseError(
                f"slices {order[count - 1]} and {order[count]} differ at rounding level only"
            )
    return sorted(order[:count])


def ceiling(share: float, size: int, multiple: int = 1) -> int:
    """The least multiple of ``multiple`` that is at least ``share * size``, share read as the decimal it prints as."""
    numerator, denominator = Decimal(repr(share)).as_integer_ratio()
    result = 0
    while result * denominator < numerator * size:
        result += multiple
    return result
