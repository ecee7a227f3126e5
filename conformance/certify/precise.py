"""Matrices of mpmath numbers: the few operations that the recomputation needs, as lists of rows.

Every function works at the precision in force; callers enter ``fifty_digits()`` once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from mpmath import mp
from torch import Tensor

Real: TypeAlias = Any
"""An ``mpmath.mpf`` (mpmath has no type stubs)."""

Matrix: TypeAlias = list[list[Real]]
"""Rows of numbers; a vector is a matrix of one row or one column."""

DIGITS = 50
EPS = 2.0**-52
"""Spacing of float64 at 1; the unit of every error here is this times a condition number."""

SMALLEST_NORMAL = 2.0**-1022
"""Below it float64 has no relative accuracy: eps times it is the spacing of the denormals."""


def fifty_digits() -> AbstractContextManager[Any]:
    """The context in which all recomputation runs."""
    context: AbstractContextManager[Any] = mp.workdps(DIGITS)
    return context


def real(value: float | int | str) -> Real:
    """A float64 (exactly), an int, or a decimal string as an mpf."""
    return mp.mpf(value)


def from_tensor(tensor: Tensor) -> Matrix:
    """A float64 tensor as an exact matrix; ``[n]`` becomes one row, 0-d one entry, more dims are flattened to 2."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.detach().reshape(1, 1)
    return [[mp.mpf(value) for value in row] for row in rows.tolist()]


def zeros(rows: int, columns: int) -> Matrix:
    """The zero matrix."""
    return [[mp.zero] * columns for _ in range(rows)]


def shape(A: Matrix) -> tuple[int, int]:
    """(rows, columns)."""
    return len(A), len(A[0])


def transpose(A: Matrix) -> Matrix:
    """A^T."""
    return [list(row) for row in zip(*A, strict=True)]


def matmul(A: Matrix, B: Matrix) -> Matrix:
    """A B; every entry is one exactly accumulated sum, rounded once."""
    columns = transpose(B)
    return [[mp.fdot(zip(row, column, strict=True)) for column in columns] for row in A]


def combine(alpha: Real, A: Matrix, beta: Real, B: Matrix) -> Matrix:
    """alpha A + beta B."""
    return [[alpha * a + beta * b for a, b in zip(x, y, strict=True)] for x, y in zip(A, B, strict=True)]


def apply(function: Callable[..., Real], *matrices: Matrix) -> Matrix:
    """The function on corresponding entries."""
    return [
        [function(*entries) for entries in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)
    ]


def scaled(alpha: Real, A: Matrix) -> Matrix:
    """alpha A."""
    return [[alpha * a for a in row] for row in A]


def add_to_diagonal(A: Matrix, alpha: Real) -> Matrix:
    """A + alpha I."""
    return [[a + alpha if i == j else a for j, a in enumerate(row)] for i, row in enumerate(A)]


def vector_norm(values: Iterable[Real]) -> Real:
    """Euclidean norm."""
    return mp.sqrt(mp.fsum(value * value for value in values))


def frobenius(A: Matrix) -> Real:
    """Frobenius norm."""
    return vector_norm(a for row in A for a in row)


def underflow(*sizes: int) -> Real:
    """Frobenius norm of one denormal spacing in each entry of an array of these sizes, in units of eps.

    The model of float64 near its lower end is ``fl(x op y) = (x op y)(1 + eps) + eta`` with eta of that spacing.
    """
    return mp.sqrt(mp.fprod(sizes)) * SMALLEST_NORMAL


def row_norms(A: Matrix) -> list[Real]:
    """Euclidean norm of every row."""
    return [vector_norm(row) for row in A]


def column_norms(A: Matrix) -> list[Real]:
    """Euclidean norm of every column."""
    return row_norms(transpose(A))


def singular_values(A: Matrix) -> list[Real]:
    """Singular values of A, largest first, ``min(m, n)`` of them, as roots of the eigenvalues of the short Gram.

    Squaring costs half the digits: relative to the largest they are right to 1e-25 or so.
    """
    short = A if len(A) <= len(A[0]) else transpose(A)
    size = frobenius(A)
    if size == 0:
        return [mp.zero] * len(short)
    unit = scaled(1 / size, short)
    squares = mp.eigsy(mp.matrix(matmul(unit, transpose(unit))), eigvals_only=True)
    return sorted((size * mp.sqrt(max(value, mp.zero)) for value in squares), reverse=True)
