"""The ordered orthonormal basis of the columns of a tall matrix, by Householder QR."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthonormal_basis"]

# A column this many roundings of its product away from the earlier ones carries no information.
DEAD_COLUMN_ROUNDINGS = 8


@torch.library.custom_op("dion_dtensor::orthonormal_basis", mutates_args=())
def orthonormal_basis(stack: Tensor, sizes: Tensor) -> Tensor:
    """Orthonormalize the columns of each matrix in their order, leaving out those that carry no information.

    Column j of the result is the normalised part of column j of ``stack`` orthogonal to the earlier kept columns.  If
    the norm of that part is at most ``8 * eps * sizes[j]`` the column is *dead*: zero in the result, and nothing is
    made orthogonal to it.  So a zero matrix gives zeros, and a matrix of rank k gives k orthonormal columns, where a
    bare QR gives arbitrary ones.

    Args:
        stack: ``[N, m, r]`` with ``m >= r``, float32 or float64.
        sizes: ``[N, 1, r]``, what a rounding error in column j is relative to; for a product ``M Q`` it is
            ``||M||_F * ||Q_j||_2``.

    Returns:
        ``[N, m, r]``, contiguous.  The sign of a column is that of LAPACK's QR.
    """
    threshold = DEAD_COLUMN_ROUNDINGS * torch.finfo(stack.dtype).eps * sizes.squeeze(-2)
    columns, triangular = torch.linalg.qr(stack)
    basis: Tensor = columns.contiguous()
    dead = triangular.diagonal(dim1=-2, dim2=-1).abs() <= threshold
    if dead.numel():
        # An opaque operator, since which matrices need the second look depends on the data.
        for index in dead.any(-1).nonzero().flatten().tolist():
            basis[index] = _basis_without_dead(stack[index], threshold[index])
    return basis


@orthonormal_basis.register_fake
def _(stack: Tensor, sizes: Tensor) -> Tensor:
    return stack.new_empty(stack.shape)


def _basis_without_dead(matrix: Tensor, threshold: Tensor) -> Tensor:
    """One matrix ``[m, r]``: drop the first dead column and start again, until none is left."""
    kept = list(range(matrix.shape[1]))
    result = torch.zeros_like(matrix)
    while kept:
        basis, triangular = torch.linalg.qr(matrix[:, kept])
        dead = (triangular.diagonal().abs() <= threshold[kept]).nonzero().flatten()
        if dead.numel() == 0:
            result[:, kept] = basis
            break
        del kept[int(dead[0])]
    return result
