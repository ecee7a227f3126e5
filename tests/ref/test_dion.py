"""Dion and Orth-Dion."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dion_ref import ALGORITHMS, Precision
from dion_ref.dion import power_iteration
from dion_ref.orth_dion import right_factor
from dion_ref.philox import normal

from .helpers import LOW_RANK, gaussian, gram_schmidt, low_rank, relative, run

EPS = 2.0**-52
SHAPES = [(12, 7), (7, 12), (9, 9), (1, 5), (5, 1), (1, 1)]
BARE = {"lr": 1.0, "weight_decay": 0.0, "scale": None}


def by_gram_schmidt(name, W, G, M, Q, hyper):
    """One step by another method: Gram-Schmidt in loops, no transposed matrix ever formed."""
    m, n = W.shape
    eps = torch.finfo(W.dtype).eps
    M = M + G
    A = M @ Q if m >= n else torch.einsum("ij,ik->jk", M, Q)
    size = torch.linalg.vector_norm
    P, kept = gram_schmidt(A, 8 * eps * size(M) * size(Q, dim=0))
    R = torch.einsum("ij,ik->jk", M, P) if m >= n else M @ P
    low = torch.einsum("ik,jk->ij", P, R) if m >= n else torch.einsum("ik,jk->ij", R, P)
    M = M - (1 - hyper.mu) * low
    old = torch.stack([Q[:, j] / (size(Q[:, j]) + hyper.epsilon) for j in range(Q.shape[1])], 1)
    if name == "dion":
        new = torch.stack([R[:, j] / (size(R[:, j]) + hyper.epsilon) for j in range(Q.shape[1])], 1)
        alive = kept
    else:
        R = torch.where(torch.tensor(kept), R, 0)
        new, alive = gram_schmidt(R, (8 * eps * size(R)).expand(R.shape[1]))
    Q = torch.where(torch.tensor(alive), new, old)
    P = torch.where(torch.tensor(alive), P, 0)
    U = torch.einsum("ik,jk->ij", P, Q) if m >= n else torch.einsum("ik,jk->ij", Q, P)
    scale = math.sqrt(m / n) if hyper.scale else 1.0
    return W * (1 - hyper.lr * hyper.weight_decay) - hyper.lr * scale * U, M, Q


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOW_RANK)
def test_steps_by_gram_schmidt(name, shape, fraction):
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper(rank_fraction=fraction, mu=0.8, lr=0.05, weight_decay=0.2)
    W = gaussian(*shape)
    state = algorithm.init(W, hyper, name="w", seed=3)
    for seed in range(1, 5):
        G = gaussian(*shape, seed=seed)
        wanted, M, Q = by_gram_schmidt(name, W, G, state.momentum, state.Q, hyper)
        new, state = algorithm.step(W, G, state, hyper)
        assert relative(new - W, wanted - W) < 1e-11
        assert torch.dist(state.momentum, M) < 1e-12 * float(torch.linalg.matrix_norm(M) + 1)
        assert relative(state.Q, Q) < 1e-11
        W = new


@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.floats(0.05, 1.0),
    st.integers(0, 99),
    st.sampled_from(LOW_RANK),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_factors_of_any_shape(m, n, fraction, seed, name):
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper(rank_fraction=fraction, **BARE)
    W, G = gaussian(m, n, seed=seed), gaussian(m, n, seed=seed + 1)
    state = algorithm.init(W, hyper, name="w")
    r = hyper.rank(m, n)
    assert state.Q.shape == (min(m, n), r)
    B = G if m >= n else G.mT
    P, R, kept = power_iteration(B, state.Q)
    assert bool(kept.all())
    assert torch.dist(P.mT @ P, torch.eye(r, dtype=torch.float64)) < 1e-12
    assert torch.equal(R, B.mT @ P)
    new, after = algorithm.step(W, G, state, hyper)
    U = W - new
    norms = torch.linalg.vector_norm(after.Q, dim=0)
    assert float((norms - 1).abs().max()) < 1e-6
    assert float(torch.linalg.matrix_norm(U)) == pytest.approx(math.sqrt(r), rel=1e-6)
    if name == "orth_dion":
        assert torch.dist(after.Q.mT @ after.Q, torch.eye(r, dtype=torch.float64)) < 1e-12
        assert torch.linalg.svdvals(U)[:r].tolist() == pytest.approx([1.0] * r, abs=1e-12)


def test_dion_is_not_orthonormal_on_the_right_but_orth_dion_is():
    W, G = gaussian(40, 30), gaussian(40, 30, seed=1)
    top = {
        name: float(
            torch.linalg.matrix_norm(
                W - run(name, W, [G], ALGORITHMS[name].Hyper(rank_fraction=0.5, **BARE))[0], 2
            )
        )
        for name in LOW_RANK
    }
    assert top["dion"] > 1.1
    assert top["orth_dion"] == pytest.approx(1.0, abs=1e-12)


def test_full_rank_with_converged_factors_is_the_polar_factor():
    U, _, Vh = torch.linalg.svd(gaussian(8, 5), full_matrices=False)
    M = U @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)) @ Vh
    algorithm = ALGORITHMS["dion"]
    hyper = algorithm.Hyper(**BARE)
    W = torch.zeros_like(M)
    state = algorithm.State(momentum=torch.zeros_like(M), Q=Vh.mT.contiguous())
    new, _ = algorithm.step(W, M, state, hyper)
    assert relative(-new, U @ Vh) < 1e-7  # epsilon 1e-8 over a norm of 1


def test_error_feedback_keeps_what_was_not_used():
    algorithm = ALGORITHMS["dion"]
    hyper = algorithm.Hyper(rank_fraction=0.25, mu=0.9)
    W, G = gaussian(12, 8), gaussian(12, 8, seed=1)
    state = algorithm.init(W, hyper, name="w")
    P, R, _ = power_iteration(G, state.Q)
    _, after = algorithm.step(W, G, state, hyper)
    assert relative(after.momentum, G - 0.1 * P @ R.mT) < 1e-15
    # P P^T is a projector: inside it the momentum is mu G, outside it is G
    assert relative(P.mT @ after.momentum, 0.9 * P.mT @ G) < 1e-14
    rest = torch.eye(12, dtype=torch.float64) - P @ P.mT
    assert relative(rest @ after.momentum, rest @ G) < 1e-14


@pytest.mark.parametrize("name", LOW_RANK)
def test_trap_1_zero_momentum_still_decays_and_keeps_Q(name):
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper(lr=0.1, weight_decay=0.5)
    W = gaussian(6, 4)
    state = algorithm.init(W, hyper, name="w")
    new, after = algorithm.step(W, torch.zeros_like(W), state, hyper)
    assert torch.equal(new, W * (1 - 0.1 * 0.5))
    assert not after.momentum.any()
    assert relative(after.Q, state.Q / (torch.linalg.vector_norm(state.Q, dim=0) + 1e-8)) < 1e-15
    again, last = algorithm.step(new, torch.zeros_like(W), after, hyper)
    assert torch.equal(again, new * (1 - 0.1 * 0.5))
    assert torch.isfinite(last.Q).all()


@pytest.mark.parametrize("name", LOW_RANK)
def test_trap_1_one_zero_block_is_not_zero(name):
    W, G = gaussian(8, 4), gaussian(8, 4, seed=1)
    G[:4] = 0  # what a rank with the first half of the rows would hold
    new, _ = run(name, W, [G], ALGORITHMS[name].Hyper(**BARE))
    assert torch.dist(new[:4], W[:4]) < 1e-14
    alone, _ = run(name, W[4:], [G[4:]], ALGORITHMS[name].Hyper(**BARE))
    assert relative(W[4:] - new[4:], W[4:] - alone) < 1e-12


@pytest.mark.parametrize("power", [-300, 300])
def test_tiny_and_huge_momenta_have_the_same_left_factor(power):
    B, Q = gaussian(10, 6), gaussian(6, 4, seed=1)
    P, _, kept = power_iteration(B, Q)
    scaled, _, scaled_kept = power_iteration(B * 2.0**power, Q)
    assert bool(kept.all() & scaled_kept.all())
    assert relative(scaled, P) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOW_RANK)
def test_trap_2_a_rank_deficient_momentum_gives_no_noise(name, dtype):
    # rank 4 exactly, in floating point too: only four rows are not zero
    G = torch.zeros(24, 16, dtype=dtype)
    G[3::6] = gaussian(4, 16, dtype=dtype)
    W = torch.zeros_like(G)
    precision = Precision(dtype, dtype)
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper(**BARE)
    state = algorithm.init(W, hyper, name="w", precision=precision)
    _, _, kept = power_iteration(G, state.Q)
    assert kept.tolist() == [True] * 4 + [False] * 12
    new, after = algorithm.step(W, G, state, hyper, precision=precision)
    assert float(torch.linalg.matrix_norm(new)) == pytest.approx(2.0, rel=1e-5)  # sqrt(4), not sqrt(16)
    old = state.Q / (torch.linalg.vector_norm(state.Q, dim=0) + 1e-8)
    assert torch.equal(after.Q[:, 4:], old[:, 4:])


def test_trap_2_general_low_rank_momentum():
    for seed in range(20):
        G = low_rank(24, 16, 4, seed=2 * seed)
        new, _ = run("dion", torch.zeros_like(G), [G], ALGORITHMS["dion"].Hyper(**BARE))
        assert float(torch.linalg.matrix_norm(new)) == pytest.approx(2.0, rel=1e-6)


def test_trap_2_the_threshold():
    # column 1 of M Q is new by `ratio` of ||M||_F ||Q_1||
    Q = torch.eye(2, dtype=torch.float64)
    for ratio, alive in ((7.5, False), (8.5, True)):
        B = torch.tensor([[1.0, 0.0], [0.0, ratio * EPS], [0.0, 0.0]], dtype=torch.float64)
        _, _, kept = power_iteration(B, Q)
        assert kept.tolist() == [True, alive]
        _, _, kept = power_iteration(B, Q @ torch.diag(torch.tensor([1.0, 1e3], dtype=torch.float64)))
        assert kept.tolist() == [True, alive]


def test_orth_dion_column_that_becomes_dependent_in_R():
    R = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    Q = gaussian(3, 3)
    new, alive = right_factor(R, Q, torch.tensor([True, True, True]), 1e-8)
    assert alive.tolist() == [True, False, True]
    assert new[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert new[:, 2].tolist() == [0.0, 0.0, 1.0]
    assert relative(new[:, 1], Q[:, 1] / torch.linalg.vector_norm(Q[:, 1])) < 1e-7
    new, alive = right_factor(R, Q, torch.tensor([False, True, True]), 1e-8)
    assert alive.tolist() == [False, True, True]
    assert new[:, 1].tolist() == [1.0, 0.0, 0.0]


def test_orth_dion_step_with_a_column_that_dies_only_in_R():
    # new in B Q_1: 15 eps > 8 sqrt(2 * 1.5) eps; new in R_1: 15 eps / sqrt(2) <= 8 sqrt(2) eps
    algorithm = ALGORITHMS["orth_dion"]
    G = torch.tensor([[1.0, 1.0], [0.0, 15 * EPS]], dtype=torch.float64)
    Q = torch.tensor([[1.0, -0.5], [0.0, 1.0]], dtype=torch.float64)
    state = algorithm.State(momentum=torch.zeros_like(G), Q=Q)
    assert power_iteration(G, state.Q)[2].tolist() == [True, True]
    new, after = algorithm.step(torch.zeros_like(G), G, state, algorithm.Hyper(**BARE))
    assert torch.dist(-new, torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=torch.float64).sqrt()) < 1e-14
    assert after.Q[:, 1].tolist() == pytest.approx([-(0.2**0.5), 0.8**0.5], abs=2e-8)


@pytest.mark.parametrize("name", LOW_RANK)
def test_trap_4_a_transposed_problem_gives_the_transposed_step(name):
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper(rank_fraction=0.5, scale=None)
    W, grads = gaussian(11, 6), [gaussian(11, 6, seed=seed) for seed in (1, 2, 3)]
    tall, state = run(name, W, grads, hyper)
    wide, flipped = run(name, W.mT.contiguous(), [grad.mT.contiguous() for grad in grads], hyper)
    assert relative(wide.mT, tall) < 1e-14
    assert relative(flipped.momentum.mT, state.momentum) < 1e-13
    assert relative(flipped.Q, state.Q) < 1e-12


def test_trap_4_the_side_matters_so_it_is_fixed_by_the_shape():
    # a square matrix is not transposed: P has its rows, and the other choice would be another algorithm
    W, G = torch.zeros(6, 6, dtype=torch.float64), gaussian(6, 6, seed=1)
    hyper = ALGORITHMS["dion"].Hyper(rank_fraction=0.5, **BARE)
    U, _ = run("dion", W, [G], hyper)
    Q = normal(6, 3, seed=0, name="weight")
    P = torch.linalg.qr(G @ Q)[0]
    assert relative(P @ (P.mT @ U), U) < 1e-13  # columns of U lie in the span of G Q
    other, _ = run("dion", W, [G.mT.contiguous()], hyper)
    assert relative(other.mT, U) > 0.1


@pytest.mark.parametrize("name", LOW_RANK)
def test_trap_5_signs_of_Q_are_free_but_a_rotation_is_not(name):
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper(rank_fraction=0.5, **BARE)
    W, G = gaussian(12, 8), gaussian(12, 8, seed=1)
    state = algorithm.init(W, hyper, name="w")
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    new, after = algorithm.step(W, G, state, hyper)
    flipped, flipped_after = algorithm.step(W, G, dataclasses.replace(state, Q=state.Q * signs), hyper)
    assert relative(flipped, new) < 1e-14
    assert relative(flipped_after.Q * signs, after.Q) < 1e-13
    assert relative(flipped_after.momentum, after.momentum) < 1e-14
    rotation = torch.linalg.qr(gaussian(4, 4, seed=9))[0]
    rotated, _ = algorithm.step(W, G, dataclasses.replace(state, Q=state.Q @ rotation), hyper)
    assert relative(W - rotated, W - new) > 1e-2


def test_trap_6_Q0_is_counted_by_matrix_and_rounded_from_float64():
    algorithm = ALGORITHMS["dion"]
    hyper = algorithm.Hyper(rank_fraction=0.5)
    stack = algorithm.init(gaussian(3, 9, 6), hyper, name="w", seed=4, first_matrix=5)
    for index in range(3):
        assert torch.equal(stack.Q[index], normal(6, 3, seed=4, name="w", matrix=5 + index))
        single = algorithm.init(gaussian(9, 6), hyper, name="w", seed=4, first_matrix=5 + index)
        assert torch.equal(stack.Q[index], single.Q)
    half = algorithm.init(
        gaussian(9, 6).float(), hyper, name="w", seed=4, precision=Precision(torch.float32, torch.float32)
    )
    assert torch.equal(half.Q, normal(6, 3, seed=4, name="w").float())


@pytest.mark.parametrize(
    ("fraction", "multiple", "shape", "rank"),
    [
        (0.07, 1, (100, 300), 7),  # 0.07 * 100 is 7.000000000000001 in floats
        (0.55, 1, (300, 100), 55),
        (0.28, 1, (25, 25), 7),
        (0.29, 1, (25, 25), 8),
        (0.25, 8, (40, 60), 16),
        (0.001, 1, (40, 60), 1),
        (0.9, 32, (40, 60), 40),
        (1.0, 1, (3, 2), 2),
        (1, 1, (3, 2), 2),
    ],
)
def test_trap_7_rank_in_exact_rationals(fraction, multiple, shape, rank):
    for name in LOW_RANK:
        assert ALGORITHMS[name].Hyper(rank_fraction=fraction, rank_multiple=multiple).rank(*shape) == rank


def test_compute_dtype_touches_the_outer_products_only():
    algorithm = ALGORITHMS["dion"]
    hyper = algorithm.Hyper(rank_fraction=0.5)
    W, G = gaussian(32, 24).float(), gaussian(32, 24, seed=1).float()
    full, half = Precision(torch.float32, torch.float32), Precision(torch.float32, torch.bfloat16)
    state = algorithm.init(W, hyper, precision=full)
    a, after_a = algorithm.step(W, G, state, hyper, precision=full)
    b, after_b = algorithm.step(W, G, state, hyper, precision=half)
    assert torch.equal(after_a.Q, after_b.Q)
    assert 1e-4 < relative(W - b, W - a) < 2e-2
    assert 1e-6 < relative(after_b.momentum, after_a.momentum) < 1e-3


def test_rank_above_the_short_side_is_named():
    algorithm = ALGORITHMS["dion"]
    W = gaussian(6, 4)
    state = algorithm.State(momentum=torch.zeros_like(W), Q=gaussian(4, 5))
    with pytest.raises(ValueError, match=r"rank 5, above min\(m, n\) = 4"):
        algorithm.step(W, W, state, algorithm.Hyper())


def test_trap_3_a_step_depends_on_its_state_alone():
    algorithm = ALGORITHMS["dion"]
    hyper = algorithm.Hyper(rank_fraction=0.5)
    W, grads = gaussian(9, 6), [gaussian(9, 6, seed=seed) for seed in range(1, 7)]
    through, last = run("dion", W, grads, hyper)
    middle, state = run("dion", W, grads[:3], hyper)
    state = algorithm.State(**{key: value.clone() for key, value in vars(state).items()})
    for grad in grads[3:]:
        middle, state = algorithm.step(middle, grad, state, hyper)
    assert torch.equal(middle, through)
    assert torch.equal(state.Q, last.Q)


def test_column_made_of_near_parallel_ones_is_dead():
    """The rounding of earlier columns reaches a dependent one times its coordinates on them: 20 eps here."""
    M = torch.tensor([[-9, 10, -5, 0], [8, -8, 2, 2], [-1, -2, 8, -7], [-11, 10, 0, -5]], dtype=torch.float64)
    assert int(torch.linalg.matrix_rank(M)) == 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        Q = torch.randn(4, 3, dtype=torch.float64, generator=generator)
        Q[:, 1] = Q[:, 0] + 1e-2 * Q[:, 1]
        _, _, kept = power_iteration(M, Q)
        assert kept.tolist() == [True, True, False]


@pytest.mark.parametrize(("rows", "columns", "rank"), [(6, 6, 3), (24, 16, 8), (64, 64, 16)])
def test_rank_of_the_momentum_is_the_number_of_live_columns(rows, columns, rank):
    for seed in range(40):
        M = gaussian(rows, rank, seed=seed) @ gaussian(rank, columns, seed=seed + 1000)
        _, _, kept = power_iteration(M, gaussian(columns, columns, seed=seed + 2000))
        assert kept.tolist() == [True] * rank + [False] * (columns - rank)
