"""The ordered orthonormal basis of the columns of a tall matrix, by QR."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cholesky_qr", "orthonormal_basis"]

# A column with this many roundings in it that are new carries no information.
DEAD_COLUMN_ROUNDINGS = 8
# Of float64 copies at a time, about five of which are alive.
WORKING_SET = 128 << 20


@torch.library.custom_op("dion_dtensor::orthonormal_basis", mutates_args=())
def orthonormal_basis(stack: Tensor, sizes: Tensor) -> Tensor:
    """Orthonormalize the columns of each matrix in their order, leaving out those that carry no information.

    Column j of the result is the normalised part of column j of ``stack`` orthogonal to the earlier kept columns.  If
    the norm of that part is at most ``8 * eps * sqrt(sizes[j]^2 + sum_k (c_k sizes[k])^2)``, where ``c`` are the
    coordinates of column j on the kept columns, the column is *dead*: zero in the result, and nothing is made
    orthogonal to it.  So a zero matrix gives zeros, and a matrix of rank k gives k orthonormal columns, where a bare QR
    gives arbitrary ones.

    Args:
        stack: ``[N, m, r]`` with ``m >= r``, float32 or float64.
        sizes: ``[N, 1, r]``, what a rounding error in column j is relative to; for a product ``M Q`` it is
            ``||M||_F * ||Q_j||_2``.

    Returns:
        ``[N, m, r]``, contiguous.  Column j has a positive product with column j of ``stack``: the right factor of
        Orth-Dion would otherwise point away from the gradient.
    """
    by_gram = stack.device.type == "cuda" and stack.dtype == torch.float32
    columns, triangular = cholesky_qr(stack) if by_gram else torch.linalg.qr(stack)
    basis: Tensor = (columns * _signs(triangular)).contiguous()
    dead = _dead(triangular, sizes.squeeze(-2))
    if dead.numel():
        # An opaque operator, since which matrices need the second look depends on the data.
        for index in dead.any(-1).nonzero().flatten().tolist():
            basis[index] = _basis_without_dead(stack[index], sizes[index, 0])
    return basis


@orthonormal_basis.register_fake
def _(stack: Tensor, sizes: Tensor) -> Tensor:
    return stack.new_empty(stack.shape)


def cholesky_qr(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The reduced QR of float32 ``[N, m, r]``, by two Cholesky factorizations of float64 Gram matrices.

    On a GPU a stack of Householder QRs is taken one matrix after the other, column by column; this is products. Float64
    keeps what a condition number up to that of a dead column, some 1e6, costs when it is squared, and the second
    round makes up for the rest.

    Returns:
        ``[N, m, r]`` and ``[N, r, r]``, float32; NaN where a Gram matrix is not positive definite.
    """
    some = max(1, WORKING_SET // max(1, 8 * stack[:1].numel()))
    columns, triangular = zip(*(_cholesky_qr(part) for part in torch.split(stack, some)), strict=True)
    return torch.cat(columns), torch.cat(triangular)


def _cholesky_qr(stack: Tensor) -> tuple[Tensor, Tensor]:
    columns, triangular = stack.double(), None
    identity = torch.eye(stack.shape[-1], dtype=torch.float64, device=stack.device)
    for _ in range(2):
        lower, info = torch.linalg.cholesky_ex(columns.mT @ columns)
        factor = torch.where((info > 0).reshape(-1, 1, 1), torch.nan, lower).mT
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True)
        columns = columns @ inverse
        triangular = factor if triangular is None else factor @ triangular
    assert triangular is not None
    return columns.to(stack.dtype), triangular.to(stack.dtype)


def _signs(triangular: Tensor) -> Tensor:
    """``[..., 1, r]``: what makes the diagonal positive; LAPACK leaves it to chance."""
    diagonal = triangular.diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal < 0, -1, 1).to(triangular.dtype).unsqueeze(-2)


def _dead(triangular: Tensor, sizes: Tensor) -> Tensor:
    """Which columns ``[..., r]`` are dead, right up to the first one that is.

    Column j of ``T^-1``, divided by its diagonal entry, holds 1 and the coordinates of column j on the earlier ones.
    """
    diagonal = triangular.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(triangular.shape[-1], dtype=triangular.dtype, device=triangular.device)
    invertible = triangular + torch.diag_embed((diagonal == 0).to(triangular.dtype))
    inverse = torch.linalg.solve_triangular(invertible, identity.expand_as(triangular), upper=True)
    coordinates = inverse / inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    largest = sizes.amax(-1, keepdim=True).clamp(
        min=torch.finfo(sizes.dtype).tiny
    )  # so that no square overflows
    shares = coordinates * (sizes / largest).unsqueeze(-1)
    roundings = largest * torch.linalg.vector_norm(shares, dim=-2)
    limit: Tensor = DEAD_COLUMN_ROUNDINGS * torch.finfo(triangular.dtype).eps * roundings
    return ~(diagonal.abs() > limit)  # a limit that is NaN comes from a diagonal entry too small to invert


def _basis_without_dead(matrix: Tensor, sizes: Tensor) -> Tensor:
    """One matrix ``[m, r]``: drop the first dead column, and those after it with nothing new even to the columns before
    it, then start again, until none is left."""
    kept = torch.arange(matrix.shape[1], device=matrix.device)
    result = torch.zeros_like(matrix)
    while len(kept):
        basis, triangular = torch.linalg.qr(matrix[:, kept])
        dead = _dead(triangular, sizes[kept]).nonzero().flatten()
        if dead.numel() == 0:
            result[:, kept] = basis * _signs(triangular)
            break
        first = int(dead[0])
        before, after = sizes[kept[:first]], sizes[kept[first:]]
        coordinates = torch.linalg.solve_triangular(
            triangular[:first, :first], triangular[:first, first:], upper=True
        )
        shares = torch.linalg.vector_norm(coordinates * before.unsqueeze(1), dim=0)
        limit = DEAD_COLUMN_ROUNDINGS * torch.finfo(matrix.dtype).eps * torch.hypot(after, shares)
        alive = torch.linalg.vector_norm(triangular[first:, first:], dim=0) > limit
        alive[0] = False
        kept = torch.cat((kept[:first], kept[first:][alive]))
    return result
