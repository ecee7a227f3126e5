from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dion_ref.linalg import (
    newton_schulz,
    norm,
    normalize_columns,
    normalize_input,
    ordered_basis,
    polar_factor,
    top_slices,
)
from dion_ref.polynomials import POLYNOMIALS

from .helpers import gaussian, gram_schmidt, low_rank, on_singular_values, relative

EPS = 2.0**-52
SIZES = st.integers(1, 24)
SWEEP = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("power", [-1060, -500, 0, 500, 1000])
def test_norm_neither_overflows_nor_underflows(power):
    X = torch.tensor([[3.0, 4.0], [12.0, 0.0]], dtype=torch.float64) * 2.0**power
    assert float(norm(X)) == 13 * 2.0**power
    assert float(norm(X[:1], dim=1)) == 5 * 2.0**power


def test_norm_of_columns_of_very_different_size():
    X = torch.tensor([[3e200, 3e-200, 0.0], [4e200, 4e-200, 0.0]], dtype=torch.float64)
    assert norm(X, dim=0).tolist() == pytest.approx([5e200, 5e-200, 0.0], rel=4 * EPS, abs=0)
    assert float(norm(torch.zeros(2, 2))) == 0


@given(SIZES, SIZES, st.integers(0, 99))
@SWEEP
def test_polar_factor_is_the_nearest_isometry(m, n, seed):
    M = gaussian(m, n, seed=seed)
    U = polar_factor(M)
    short = U if m <= n else U.mT
    assert torch.dist(short @ short.mT, torch.eye(min(m, n), dtype=torch.float64)) < 1e-13
    # M = U H with H symmetric and positive semidefinite
    H = U.mT @ M if m >= n else M @ U.mT
    assert torch.dist(H, H.mT) < 1e-12
    assert float(torch.linalg.eigvalsh((H + H.mT) / 2).min()) > -1e-12


def test_polar_factor_is_zero_on_the_null_space():
    M = low_rank(12, 9, 3)
    U = polar_factor(M)
    assert torch.linalg.svdvals(U).tolist() == pytest.approx([1.0] * 3 + [0.0] * 6, abs=1e-13)
    assert not polar_factor(torch.zeros(4, 3, dtype=torch.float64)).any()


def test_polar_factor_keeps_what_is_small_but_not_rounding():
    M = torch.diag(torch.tensor([1.0, 1e-14, 1e-17], dtype=torch.float64))
    assert polar_factor(M).diagonal().tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-12)
    # the bound is max(m, n) eps sigma_max: 4 eps here
    M = torch.diag(torch.tensor([1.0, 5 * EPS, 3 * EPS, 0.5], dtype=torch.float64))
    assert polar_factor(M).diagonal().tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0], abs=1e-12)


@pytest.mark.parametrize("name", POLYNOMIALS)
@given(SIZES, SIZES, st.integers(0, 99))
@SWEEP
def test_newton_schulz_acts_on_singular_values(name, m, n, seed):
    M = gaussian(m, n, seed=seed)
    table = POLYNOMIALS[name]
    size = float(torch.linalg.matrix_norm(M))
    got = newton_schulz(M / (1.02 * size), table.coefficients)
    assert relative(got, on_singular_values(M, table.coefficients, 1.02 * size)) < 1e-12


def test_newton_schulz_commutes_with_transposition_bitwise():
    X = gaussian(5, 8) / 10
    coefficients = POLYNOMIALS["keller"].coefficients
    assert torch.equal(newton_schulz(X.mT, coefficients), newton_schulz(X, coefficients).mT)


@pytest.mark.parametrize(
    ("rule", "size", "wanted"),
    [
        ("add", 2.0, 2.0 / (3 * 2.0 + 0.5)),
        ("clamp", 2.0, 2.0 / (3 * 2.0)),
        ("add", 0.25, 0.25 / (3 * 0.25 + 0.5)),
        ("clamp", 0.25, 0.25 / (3 * 0.5)),
        ("add", 0.0, 0.0),
        ("clamp", 0.0, 0.0),
    ],
)
def test_epsilon_rules(rule, size, wanted):
    M = torch.tensor([[size]], dtype=torch.float64)
    assert float(normalize_input(M, epsilon=0.5, epsilon_rule=rule, norm_factor=3.0)) == wanted


@given(SIZES, SIZES, st.integers(0, 99))
@SWEEP
def test_ordered_basis_is_orthonormal_and_ordered(m, r, seed):
    m, r = max(m, r), min(m, r)
    A = gaussian(m, r, seed=seed)
    P, kept = ordered_basis(A, torch.zeros(r, dtype=torch.float64))
    assert bool(kept.all())
    assert torch.dist(P.mT @ P, torch.eye(r, dtype=torch.float64)) < 1e-13
    triangle = P.mT @ A
    assert float(torch.tril(triangle, -1).abs().max()) < 1e-13
    assert bool((triangle.diagonal() > 0).all())


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 99), st.lists(st.integers(0, 11), max_size=4))
@SWEEP
def test_ordered_basis_equals_gram_schmidt_with_dead_columns(r, extra, seed, repeats):
    A = gaussian(r + extra, r, seed=seed)
    for index, source in enumerate(repeats):  # plant dependent and zero columns
        A[:, index % r] = 3 * A[:, source % r] if source % r < index % r else 0
    negligible = 1e-10 * torch.linalg.vector_norm(A) * torch.ones(r, dtype=torch.float64)
    P, kept = ordered_basis(A, negligible)
    wanted, wanted_kept = gram_schmidt(A, negligible)
    assert kept.tolist() == wanted_kept
    assert torch.dist(P, wanted) < 1e-10


def test_dead_column_is_zero_and_later_ones_ignore_it():
    A = gaussian(6, 4)
    A[:, 1] = 2 * A[:, 0] + 1e-9 * gaussian(6, seed=1)
    P, kept = ordered_basis(A, torch.full((4,), 1e-6, dtype=torch.float64))
    alone, _ = ordered_basis(A[:, [0, 2, 3]], torch.zeros(3, dtype=torch.float64))
    assert kept.tolist() == [True, False, True, True]
    assert not P[:, 1].any()
    assert torch.equal(P[:, [0, 2, 3]], alone)


def test_threshold_is_inclusive_and_per_column():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    _, kept = ordered_basis(A, torch.tensor([1.0, 1.9, 3.5], dtype=torch.float64))
    assert kept.tolist() == [False, True, False]
    # only what is new counts: column 1 is longer than its threshold, its new part is exactly as long
    A = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    for threshold, alive in ((2.0, False), (1.999, True)):
        _, kept = ordered_basis(A, torch.tensor([0.0, threshold], dtype=torch.float64))
        assert kept.tolist() == [True, alive]


def test_all_columns_dead():
    P, kept = ordered_basis(torch.zeros(5, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert not P.any()
    assert not kept.any()


def test_normalize_columns_has_epsilon_outside_the_root():
    R = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    assert normalize_columns(R, 0.5).tolist() == [[3 / 5.5, 0.0], [4 / 5.5, 0.0]]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.data())
@SWEEP
def test_top_slices_are_the_largest(m, n, seed, data):
    M = gaussian(m, n, seed=seed)
    for dim, size in ((0, m), (1, n)):
        count = data.draw(st.integers(1, size))
        K = top_slices(M, count, dim).tolist()
        sums = [math.fsum(abs(x) for x in row) for row in (M if dim == 0 else M.mT).tolist()]
        assert sorted(sorted(range(size), key=lambda i: (-sums[i], i))[:count]) == K


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", [1, 3, 7, 64, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trap_8_ties_go_to_the_lowest_index(dim, length, dtype):
    row = gaussian(length, dtype=dtype)
    M = torch.stack([row, 2 * row, -row, row, 2 * row, row.neg(), row])
    M = M if dim == 0 else M.mT
    assert top_slices(M, 1, dim).tolist() == [1]
    assert top_slices(M, 3, dim).tolist() == [0, 1, 4]
    assert top_slices(M, 5, dim).tolist() == [0, 1, 2, 3, 4]
    assert top_slices(torch.zeros(4, 4, dtype=dtype), 2, dim).tolist() == [0, 1]
