"""The ordered orthonormal basis of columns whose rows are sharded, without assembling a row or a column."""

from __future__ import annotations

import torch
from torch import Tensor

from dion_dtensor.assembly import by_row, elementwise, norm, product, reduced, transposed
from dion_dtensor.orthonormalize import orthonormal_basis
from dion_dtensor.philox import signs

__all__ = ["sharded_basis"]


def sharded_basis(A: Tensor, roundings: Tensor) -> Tensor:
    """The value of :func:`~dion_dtensor.orthonormalize.orthonormal_basis`, by randomized Cholesky QR.

    A sketch ``S A`` of ``k = 1.25 r`` rows is summed over the shards; its triangular factor makes the columns of A
    nearly orthonormal, and two Cholesky QRs of their ``r x r`` Gram matrix finish that.  Works at any condition
    number; a column that is dead in the sketch is dead, since a sketch keeps lengths up to a factor near one.

    Args:
        A: ``[N, m, r]``, float32 or float64; some axes may shard the rows.
        roundings: ``[N, 1, r]``, what a rounding error in each column is relative to.

    Returns:
        ``[N, m, r]``, placed as ``A``.  Source: microsoft/dion (dion/dion.py), with a second Cholesky pass, and a
        sketch of signs that depend on (row of the sketch, row of A) only; of a short A, all rows.
    """
    rows, r = A.shape[1], A.shape[2]
    size = min(rows, r + -(-r // 4))

    def sketch_of(index: Tensor) -> Tensor:
        if size == rows:
            identity: Tensor = torch.arange(rows, device=index.device).unsqueeze(1) == index
            return identity.to(A.dtype)
        drawn: Tensor = signs(size, index).to(A.dtype) / size**0.5
        return drawn

    sketch = by_row(sketch_of, A)
    compressed = reduced(product(sketch, A))
    basis = elementwise(orthonormal_basis, compressed, roundings)
    alive = norm(basis, (-2,))
    triangular = elementwise(_with_unit_for_dead, product(transposed(basis), compressed), alive)
    Y = elementwise(lambda A, alive: torch.where(alive > 0.5, A, 0), A, alive)
    Y = product(Y, elementwise(_inverse, triangular))
    for _ in range(2):
        gram = elementwise(_with_unit_for_dead, reduced(product(transposed(Y), Y)), alive)
        Y = product(Y, elementwise(_inverse_factor, gram))
    return Y


def _with_unit_for_dead(matrix: Tensor, alive: Tensor) -> Tensor:
    """``[N, r, r]`` with a one on the diagonal of columns that are zero."""
    return matrix + torch.diag_embed((alive.squeeze(-2) <= 0.5).to(matrix.dtype))


def _inverse(triangular: Tensor) -> Tensor:
    identity = torch.eye(triangular.shape[-1], dtype=triangular.dtype, device=triangular.device)
    inverse: Tensor = torch.linalg.solve_triangular(
        triangular.triu(), identity.expand_as(triangular), upper=True
    )
    return inverse


def _inverse_factor(gram: Tensor) -> Tensor:
    """The inverse of the upper Cholesky factor."""
    return _inverse(torch.linalg.cholesky_ex(gram).L.mT)
