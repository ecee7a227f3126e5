"""The basis by randomized Cholesky QR against Householder's, on one device; `test_on_ranks.py` has it sharded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dion_dtensor.orthonormalize import householder, orthonormal_basis
from dion_dtensor.philox import signs
from dion_dtensor.rules.sharded_basis import sharded_basis


def conditioned(m: int, r: int, decades: float, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(2, m, r, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    return ((left * torch.logspace(0, -decades, r, dtype=torch.float64)) @ right).to(dtype)


@pytest.mark.parametrize(("dtype", "decades"), [(torch.float64, 0), (torch.float64, 8), (torch.float32, 3)])
@pytest.mark.parametrize(("m", "r"), [(40, 12), (13, 10), (6, 6), (5, 1)])
def test_orthonormal_and_the_same_basis(m: int, r: int, decades: float, dtype: torch.dtype) -> None:
    A = conditioned(m, r, decades, dtype)
    sizes = torch.linalg.vector_norm(A, dim=1, keepdim=True)
    P, expected = sharded_basis(A, sizes), orthonormal_basis(A, sizes)
    unit = torch.finfo(dtype).eps
    assert (P.mT @ P - torch.eye(r, dtype=dtype)).abs().max() < 20 * unit
    # P is as sensitive as the condition number; a column of the wrong sign would be off by two.
    assert (P - expected).norm() < 100 * unit * 10**decades


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_dead_columns_are_zero(rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(1, 30, rank, dtype=torch.float64, generator=generator)
    A = left @ torch.randn(1, rank, 8, dtype=torch.float64, generator=generator)
    sizes = A.norm().expand(1, 1, 8).contiguous()
    P, expected = sharded_basis(A, sizes), orthonormal_basis(A, sizes)
    torch.testing.assert_close(P, expected, rtol=0, atol=1e-12)
    assert P.isfinite().all()
    assert int((P.norm(dim=1) > 0.5).sum()) == rank


def test_signs_are_the_same_whoever_asks() -> None:
    whole = signs(300, torch.arange(7))
    assert torch.equal(whole[:, 2:5], signs(300, torch.arange(2, 5)))
    assert torch.equal(whole[:40], signs(40, torch.arange(7)))
    assert set(whole.unique().tolist()) == {-1, 1}
    assert abs(float(signs(1000, torch.arange(50)).float().mean())) < 0.02


@pytest.mark.parametrize(
    "working_set", [householder.WORKING_SET, 3 * 8 * 60 * 12], ids=["at once", "in parts"]
)
def test_the_basis_by_cholesky_is_that_by_householder(
    monkeypatch: pytest.MonkeyPatch, working_set: int
) -> None:
    """As GPUs take it; columns of very different lengths, and nearly dependent ones."""
    monkeypatch.setattr(householder, "WORKING_SET", working_set)
    stack = torch.randn(7, 60, 12, generator=torch.Generator().manual_seed(0))
    stack[1] *= torch.logspace(0, -30, 12)
    stack[2] *= 1e19
    stack[3, :, 5] = stack[3, :, 2] + 1e-4 * stack[3, :, 5]
    columns, triangular = householder.cholesky_qr(stack)
    expected = orthonormal_basis(stack.double(), torch.zeros(7, 1, 12, dtype=torch.float64))
    assert torch.allclose(columns.double(), expected, atol=1e-6)
    assert torch.allclose(columns.mT @ columns, torch.eye(12).expand(7, -1, -1), atol=2e-6)
    lengths = stack.norm(dim=1, keepdim=True)
    assert torch.allclose(columns @ triangular / lengths, stack / lengths, atol=1e-5)


def test_cholesky_says_where_columns_are_dependent() -> None:
    stack = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    stack[1] = 0
    stack[2, :, 3] = 0
    columns, triangular = householder.cholesky_qr(stack)
    assert bool(columns[0].isfinite().all())
    assert bool(triangular[1:].isnan().any(-1).any(-1).all())
