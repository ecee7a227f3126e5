"""One step of Dion and Orth-Dion on one matrix, with the rounding that each output may carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpmath import mp

from conformance.certify.conditions import basis_turns, hypot
from conformance.certify.matrix_steps import Rounded, Settings, applied
from conformance.certify.output import Output
from conformance.certify.precise import (
    EPS,
    Matrix,
    Real,
    apply,
    column_norms,
    combine,
    frobenius,
    matmul,
    real,
    singular_values,
    transpose,
    underflow,
)
from conformance.certify.primitives import Basis, ceiling, ordered_basis

DEAD = 8 * EPS
"""A column with nothing longer than this in it that is new, relative to what it was made of, is dead."""


@dataclass(frozen=True)
class Iteration:
    """One power iteration.

    Args:
        basis: of B Q.
        R: ``[s, r]``, B^T P.
        turns: by how much each kept column of P may turn.
        column_errors: bound on the error of every column of R, zero for dead ones.
        rest: Frobenius norm of the part of B outside the span of P.
    """

    basis: Basis
    R: Matrix
    turns: list[Real]
    column_errors: list[Real]
    rest: Real


def rank_of(settings: Settings, rows: int, columns: int) -> int:
    """The number of columns of Q."""
    short = min(rows, columns)
    return min(short, ceiling(settings["rank_fraction"], short, settings["rank_multiple"]))


def power_iteration(B: Matrix, Q: Matrix) -> Iteration:
    """``P = basis(B Q)``, ``R = B^T P``.

    B Q carries ``2 eps || |B| |Q_j| ||`` in column j: once since the entries of B are rounded, once for the product and
    the decomposition of it; R likewise.  In R_j, the turn of P_j away from its predecessors meets the later R_i and the
    rest of B; its turns towards the predecessors meet theirs.
    """
    size, lengths = frobenius(B), column_norms(Q)
    basis = ordered_basis(matmul(B, Q), [DEAD * size * length for length in lengths])
    R = matmul(transpose(B), basis.vectors)
    magnitudes = apply(abs, B)
    products = column_norms(matmul(magnitudes, apply(abs, Q)))
    turns = basis_turns(basis, [2 * product + underflow(len(B)) for product in products])
    products = column_norms(matmul(transpose(magnitudes), apply(abs, basis.vectors)))
    pulls = [column_norms(R)[j] for j in basis.kept]
    rest = mp.sqrt(max(size**2 - hypot(*pulls) ** 2, mp.zero))
    errors = [mp.zero] * len(lengths)
    for position, j in enumerate(basis.kept):
        away = turns[position] * hypot(rest, *pulls[position + 1 :])
        towards = [w * pull for w, pull in zip(turns[:position], pulls[:position], strict=True)]
        errors[j] = hypot(2 * products[j], away, *towards) + underflow(len(R))
    return Iteration(basis, R, turns, errors, rest)


def feedback(B: Matrix, it: Iteration, mu: Real) -> Rounded:
    """``B - (1 - mu) P R^T``.

    ``P R^T = P P^T B`` depends on the span of P alone, so turns within it don't count; each turn out of it moves the
    projection by ``w_j`` times what P_j and the rest of B carry.
    """
    fed = matmul(it.basis.vectors, transpose(it.R))
    pulls = [column_norms(it.R)[j] for j in it.basis.kept]
    turned = hypot(*(w * hypot(pull, it.rest) for w, pull in zip(it.turns, pulls, strict=True)))
    bound = hypot(2 * frobenius(B), 2 * (1 - mu) * frobenius(it.R)) + (1 - mu) * turned
    return Rounded(combine(1, B, mu - 1, fed), bound)


def _update(it: Iteration, used: Sequence[int], columns: Matrix, errors: Sequence[Real]) -> Rounded:
    """``P Q^T`` over the used columns: dP of norm ``sqrt(2) ||w||`` meets ||Q||_2, dQ meets an orthonormal P.

    Args:
        it: the iteration.
        used: indices of columns.
        columns: the new Q, transposed: all columns.
        errors: bound on the error of each column of it.
    """
    rows = len(it.basis.vectors)
    if not used:
        return Rounded([[mp.zero] * len(columns[0]) for _ in range(rows)], mp.zero)
    part = [columns[j] for j in used]
    P = [[row[j] for j in used] for row in it.basis.vectors]
    turns = [w for w, j in zip(it.turns, it.basis.kept, strict=True) if j in used]
    strength = singular_values(part)[0]
    bound = mp.sqrt(2) * hypot(*turns) * strength + hypot(*(errors[j] for j in used)) + frobenius(part)
    return Rounded(matmul(P, part), bound)


def _outputs(
    W: Matrix, U: Rounded, B: Rounded, Q: Output, transposed: bool, settings: Settings
) -> list[Output]:
    if transposed:
        U, B = Rounded(transpose(U.value), U.bound), Rounded(transpose(B.value), B.bound)
    return [applied(W, U, settings), Output("momentum", B.value, B.bound), Q]


def dion(W: Matrix, G: Matrix, M: Matrix, Q: Matrix, settings: Settings) -> list[Output]:
    """Dion: the new Q has R's columns over their length plus epsilon; a dead column keeps its direction.

    ``x / (|x| + eps)`` has a derivative of norm ``1 / (|x| + eps)``.
    """
    transposed = len(W) < len(W[0])
    total = combine(1, M, 1, G)
    B = transpose(total) if transposed else total
    it = power_iteration(B, Q)
    epsilon = real(settings["epsilon"])
    old, pulled = transpose(Q), transpose(it.R)
    columns: Matrix = []
    errors = []
    for j, (q, r) in enumerate(zip(old, pulled, strict=True)):
        source = r if j in it.basis.kept else q
        divisor = hypot(*source) + epsilon
        columns.append([x / divisor for x in source])
        errors.append(it.column_errors[j] / divisor + hypot(*columns[-1]))
    U = _update(it, it.basis.kept, columns, errors)
    fed = feedback(B, it, real(settings["mu"]))
    return _outputs(W, U, fed, Output("Q", transpose(columns), [errors]), transposed, settings)


def orth_dion(W: Matrix, G: Matrix, M: Matrix, Q: Matrix, settings: Settings) -> list[Output]:
    """Orth-Dion: the new Q is the ordered basis of R's kept columns; a column without anything new joins the dead."""
    transposed = len(W) < len(W[0])
    total = combine(1, M, 1, G)
    B = transpose(total) if transposed else total
    it = power_iteration(B, Q)
    epsilon = real(settings["epsilon"])
    right = ordered_basis(it.R, [DEAD * frobenius(it.R)] * len(Q[0]))
    turns = basis_turns(right, it.column_errors)
    columns: Matrix = []
    errors = []
    for j, (q, new) in enumerate(zip(transpose(Q), transpose(right.vectors), strict=True)):
        if j in right.kept:
            position = right.kept.index(j)
            columns.append(new)
            errors.append(hypot(1, *turns[: position + 1]))
        else:
            divisor = hypot(*q) + epsilon
            columns.append([x / divisor for x in q])
            errors.append(hypot(*columns[-1]))
    U = _update(it, right.kept, columns, errors)
    fed = feedback(B, it, real(settings["mu"]))
    return _outputs(W, U, fed, Output("Q", transpose(columns), [errors]), transposed, settings)
