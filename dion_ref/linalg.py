"""The linear algebra of the papers, on one matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DEAD_FACTOR = 8.0
"""A column is dependent when what is new in it has at most this many units of rounding."""


def norm(X: Tensor, dim: int | None = None) -> Tensor:
    """Euclidean norm of all of X (Frobenius), or along ``dim``, safe from overflow and underflow.

    Args:
        X: any floating dtype and shape.
        dim: None for one number, else the dim that is summed away.

    Returns:
        0-d tensor, or X without ``dim``; dtype of X.
    """
    dims = tuple(range(X.ndim)) if dim is None else (dim,)
    peak = X.abs().amax(dim=dims, keepdim=True)
    # the largest power of two below the peak: dividing by it rounds nothing
    power = torch.where(peak > 0, peak / (2 * torch.frexp(peak).mantissa), 1)
    scaled: Tensor = torch.linalg.vector_norm(X / power, dim=dims)
    return scaled * power.squeeze(dims)


def polar_factor(M: Tensor) -> Tensor:
    """The exact polar factor of M: ``U V^T`` of the thin SVD ``M = U S V^T``.

    Singular values ``<= max(m, n) * eps * sigma_max`` are dropped: on the null space of M the factor is zero,
    and zero altogether for M = 0.

    Args:
        M: ``[m, n]``, float32 or float64.

    Returns:
        ``[m, n]``, a partial isometry; dtype of M.
    """
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    kept = max(M.shape) * torch.finfo(M.dtype).eps * S[0] < S
    factor: Tensor = (U * kept) @ Vh
    return factor


def normalize_input(M: Tensor, *, epsilon: float, epsilon_rule: str, norm_factor: float) -> Tensor:
    """The first line of every Newton-Schulz: bring the singular values of M into [0, 1].

    ``M / (norm_factor * ||M||_F + epsilon)`` by the rule "add", or
    ``M / (norm_factor * max(||M||_F, epsilon))`` by the rule "clamp".

    Args:
        M: ``[m, n]``.
        epsilon: positive, in the units of M.
        epsilon_rule: "add" or "clamp".
        norm_factor: positive.

    Returns:
        ``[m, n]``, dtype of M.
    """
    size = norm(M)
    if epsilon_rule == "add":
        return M / (norm_factor * size + epsilon)
    return M / (norm_factor * size.clamp(min=epsilon))


def newton_schulz(X: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """Quintic Newton-Schulz: ``X <- aX + (b A + c A^2) X`` with ``A = X X^T``, one ``(a, b, c)`` a step.

    Iterates on the side on which ``X X^T`` is small.  Source: KellerJordan/Muon; per-step coefficients:
    Polar Express, arXiv 2505.16932.

    Args:
        X: ``[m, n]``, singular values in [0, 1].
        coefficients: the steps, in order.

    Returns:
        ``[m, n]``, singular values near 1; dtype of X.
    """
    if X.shape[0] > X.shape[1]:
        return newton_schulz(X.mT, coefficients).mT
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


def ordered_basis(A: Tensor, negligible: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the columns of A in their order, without the dependent ("dead") ones.

    Column j of the basis is the normalized part of ``A_j`` that is orthogonal to the earlier kept columns.
    With ``c_k`` the coordinates of ``A_j`` on the kept columns ``A_k``, what is new may be no more than the
    rounding of ``A_j`` and of ``c_k A_k``; if its norm is
    ``<= sqrt(negligible[j]^2 + sum_k (c_k negligible[k])^2)`` the column is dead: zero in the basis, and later
    columns are not orthogonalized against it.  Signs: the diagonal of the triangular factor is positive.

    Method: Householder QR of the kept columns; the first dead one is removed; repeat.

    Args:
        A: ``[m, r]``, float32 or float64, r <= m.
        negligible: ``[r]``, the length that counts as rounding in each column.

    Returns:
        The basis ``[m, r]`` and a bool tensor ``[r]``, True where a column was kept.
    """
    # what is new in a column is never longer than the column
    candidates = torch.nonzero(norm(A, dim=0) > negligible).flatten()
    while True:
        orthonormal, triangular = torch.linalg.qr(A[:, candidates])
        diagonal = triangular.diagonal()
        dead = torch.nonzero(diagonal.abs() <= _propagated(triangular, negligible[candidates])).flatten()
        if dead.numel() == 0:
            break
        first = int(dead[0])
        candidates = torch.cat((candidates[:first], candidates[first + 1 :]))
    basis = torch.zeros_like(A)
    basis[:, candidates] = orthonormal * diagonal.sign()
    kept = torch.zeros(A.shape[1], dtype=torch.bool, device=A.device)
    kept[candidates] = True
    return basis, kept


def _propagated(triangular: Tensor, negligible: Tensor) -> Tensor:
    """``sqrt(negligible[j]^2 + sum_k (c_k negligible[k])^2)`` for each column j up to the first dependent one."""
    result = negligible.clone()
    for j in range(1, len(negligible)):
        if triangular[j - 1, j - 1] == 0:
            break  # column j - 1 has nothing new at all; the next turn is without it
        c = torch.linalg.solve_triangular(triangular[:j, :j], triangular[:j, j : j + 1], upper=True).squeeze(
            1
        )
        result[j] = torch.hypot(negligible[j], norm(c * negligible[:j]))
    return result


def normalize_columns(R: Tensor, epsilon: float) -> Tensor:
    """``R_j / (||R_j||_2 + epsilon)`` for every column j.

    Args:
        R: ``[n, r]``.
        epsilon: positive; outside the root.

    Returns:
        ``[n, r]``, dtype of R.
    """
    return R / (norm(R, dim=0) + epsilon)


def top_slices(M: Tensor, count: int, dim: int) -> Tensor:
    """Indices of the ``count`` slices of M along ``dim`` with the largest L1 norm; ties to the lowest index.

    Args:
        M: ``[m, n]``; in float64 norms are summed exactly and rounded once, so that slices of the same values in
            another order tie; in a rerun's narrower dtype they are summed in that.
        count: how many, 1 <= count <= size of ``dim``.
        dim: 0 for rows, 1 for columns.

    Returns:
        int64 ``[count]``, ascending.
    """
    # contiguous slices, so that equal slices are summed in the same order and tie in any dtype
    slices = (M if dim == 0 else M.mT).abs().contiguous()
    norms = _exact_sums(slices) if M.dtype == torch.float64 else slices.sum(dim=1)
    order = torch.sort(norms, descending=True, stable=True).indices
    return order[:count].sort().values


def _exact_sums(slices: Tensor) -> Tensor:
    """The sum of each row of non-negative ``[k, j]``, rounded once; scaled where it would leave the range."""
    if float(slices.amax()) > 1e290:
        slices = slices * 2.0**-64
    sums = [math.fsum(row) for row in slices.tolist()]
    return torch.tensor(sums, dtype=slices.dtype, device=slices.device)
