"""Dion2 and Dion3."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dion_ref import ALGORITHMS
from dion_ref.linalg import top_slices

from .helpers import gaussian, on_singular_values, relative, run
from .test_muon import POLAR_EXPRESS
from .test_normuon import by_rows

DION2, DION3, MUON = (ALGORITHMS[name] for name in ("dion2", "dion3", "muon"))
BARE = {"lr": 1.0, "weight_decay": 0.0, "scale": None}


def largest(M, count, dim):
    sums = [math.fsum(abs(x) for x in row) for row in (M if dim == 0 else M.mT).tolist()]
    return sorted(sorted(range(len(sums)), key=lambda i: (-sums[i], i))[:count])


@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (9, 9), (1, 4), (4, 1)])
def test_dion2_steps_by_hand(shape, share):
    m, n = shape
    hyper = DION2.Hyper(lr=0.1, weight_decay=0.2, mu=0.7, fraction=share)
    W, M = gaussian(m, n), torch.zeros(m, n, dtype=torch.float64)
    state = DION2.init(W, hyper)
    dim = 0 if m <= n else 1
    for seed in (1, 2, 3, 4):
        G = gaussian(m, n, seed=seed)
        M = M + G
        K = largest(M, math.ceil(share * shape[dim] - 1e-9), dim)
        part = M[K] if dim == 0 else M[:, K]
        O = on_singular_values(part, POLAR_EXPRESS, 1.02 * float(torch.linalg.vector_norm(part)) + 1e-8)  # noqa: E741
        U = torch.zeros_like(M)
        for position, index in enumerate(K):
            if dim == 0:
                U[index], M[index] = O[position], 0.7 * M[index]
            else:
                U[:, index], M[:, index] = O[:, position], 0.7 * M[:, index]
        wanted = W * (1 - 0.1 * 0.2) - 0.1 * math.sqrt(m / n) * U
        new, state = DION2.step(W, G, state, hyper)
        assert relative(new - W, wanted - W) < 1e-12
        assert relative(state.momentum, M) < 1e-15
        W = new


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_dion3_steps_by_hand(shape):
    m, n = shape
    hyper = DION3.Hyper(
        **(BARE | {"weight_decay": 0.3}), mu=0.7, fraction=0.4, beta2=0.8, variance_epsilon=1e-3
    )
    W, M = gaussian(m, n), torch.zeros(m, n, dtype=torch.float64)
    state, v = DION3.init(W, hyper), [0.0] * m
    for seed in (1, 2, 3, 4):
        G = gaussian(m, n, seed=seed)
        M = M + G
        K = largest(M, math.ceil(0.4 * m - 1e-9), 0)
        O = on_singular_values(M[K], POLAR_EXPRESS, 1.02 * float(torch.linalg.vector_norm(M[K])) + 1e-8)  # noqa: E741
        O, chosen = by_rows(O, [v[i] for i in K], 0.8, 1e-3)  # noqa: E741
        U = torch.zeros_like(M)
        for position, index in enumerate(K):
            U[index], M[index], v[index] = O[position], 0.7 * M[index], chosen[position]
        new, state = DION3.step(W, G, state, hyper)
        assert relative(new - W, -0.3 * W - U) < 1e-12
        assert relative(state.momentum, M) < 1e-15
        assert state.variance.flatten().tolist() == pytest.approx(v, rel=1e-12)
        W = new


@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_everything_selected_is_muon_on_the_same_momentum(m, n, seed):
    W, G = gaussian(m, n, seed=seed), gaussian(m, n, seed=seed + 1)
    whole, _ = run("muon", W, [G], MUON.Hyper())
    assert torch.equal(run("dion2", W, [G], DION2.Hyper(fraction=1.0))[0], whole)
    row_normalized, _ = run("normuon", W, [G], ALGORITHMS["normuon"].Hyper())
    assert torch.equal(run("dion3", W, [G], DION3.Hyper(fraction=1.0))[0], row_normalized)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 1.0), st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_only_selected_slices_change(m, n, share, seed):
    for algorithm in (DION2, DION3):
        hyper = algorithm.Hyper(**BARE, fraction=share, mu=0.5)
        W, G = gaussian(m, n, seed=seed), gaussian(m, n, seed=seed + 1)
        new, state = algorithm.step(W, G, algorithm.init(W, hyper), hyper)
        dim = 0 if m <= n or algorithm is DION3 else 1
        moved = (new != W).any(dim=1 - dim)
        decayed = (state.momentum != G).any(dim=1 - dim)
        assert int(moved.sum()) == hyper.count((m, n)[dim])
        assert torch.equal(moved, decayed)


def test_dion3_takes_rows_of_a_tall_matrix_where_dion2_takes_columns():
    W, G = gaussian(8, 4), gaussian(8, 4, seed=1)
    moved2 = run("dion2", W, [G], DION2.Hyper(**BARE))[0] != W
    moved3 = run("dion3", W, [G], DION3.Hyper(**BARE))[0] != W
    assert moved2.all(dim=0).sum() == 1
    assert moved2.any(dim=0).sum() == 1
    assert moved3.all(dim=1).sum() == 2
    assert moved3.any(dim=1).sum() == 2


@pytest.mark.parametrize(
    ("share", "size", "count"),
    [(0.07, 100, 7), (0.55, 100, 55), (0.28, 25, 7), (0.25, 10, 3), (0.25, 8, 2), (0.001, 8, 1), (1.0, 8, 8)],
)
def test_trap_7_count_in_exact_rationals(share, size, count):
    for algorithm in (DION2, DION3):
        assert algorithm.Hyper(fraction=share).count(size) == count


@pytest.mark.parametrize("algorithm", [DION2, DION3], ids=["dion2", "dion3"])
def test_trap_8_tied_slices(algorithm):
    row = gaussian(6)
    G = torch.stack([row, -row, row, row.neg()])
    hyper = algorithm.Hyper(**BARE, fraction=0.5)
    W = torch.zeros_like(G)
    new, _ = algorithm.step(W, G, algorithm.init(W, hyper), hyper)
    assert (new != 0).any(dim=1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("algorithm", [DION2, DION3], ids=["dion2", "dion3"])
def test_trap_1_zero_momentum_still_decays(algorithm):
    W = gaussian(6, 8)
    hyper = algorithm.Hyper(lr=0.1, weight_decay=0.5)
    new, state = algorithm.step(W, torch.zeros_like(W), algorithm.init(W, hyper), hyper)
    assert torch.equal(new, W * (1 - 0.1 * 0.5))
    assert not state.momentum.any()


TIED = [[0.1, 0.2, 0.3, 0.7, 0.11], [0.3, 0.7, 0.2, 0.11, 0.1], [0.7, 0.11, 0.1, 0.3, 0.2]]


@pytest.mark.parametrize("algorithm", [DION2, DION3], ids=["dion2", "dion3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trap_8_rows_of_the_same_values_in_another_order_tie(algorithm, dtype):
    G = torch.tensor(TIED, dtype=dtype).double()
    assert len({sum(row) for row in G.tolist()}) > 1 or dtype == torch.float32  # as plain sums see them
    new, _ = run(algorithm.name, torch.zeros_like(G), [G], algorithm.Hyper(**BARE, fraction=0.25))
    assert [bool(row.any()) for row in new] == [True, False, False]


def test_the_largest_rows_may_sum_beyond_the_range():
    M = torch.tensor([[1e-300, 0.0], [1.5e308, 1e308], [1.5e308, 1.1e308]], dtype=torch.float64)
    assert top_slices(M, 1, 0).tolist() == [2]
    assert top_slices(M, 2, 0).tolist() == [1, 2]


def test_trap_9_a_selected_zero_row_decays_its_variance():
    G = torch.zeros(4, 6, dtype=torch.float64)
    G[3] = gaussian(6)
    W = torch.zeros_like(G)
    hyper = DION3.Hyper(**BARE, fraction=0.5, beta2=0.9)
    state = DION3.State(momentum=torch.zeros_like(G), variance=torch.ones(4, 1, dtype=torch.float64))
    new, after = DION3.step(W, G, state, hyper)
    # row 3 is the largest; of the zero rows the lowest index is taken
    assert after.variance[0].item() == pytest.approx(0.9, rel=1e-15)
    assert after.variance[1:3].flatten().tolist() == [1.0, 1.0]
    assert after.variance[3].item() > 0.9
    assert not new[:3].any()


def test_trap_10_rescale_uses_all_selected_rows():
    W = torch.zeros(8, 6, dtype=torch.float64)
    G = gaussian(8, 6, seed=1) * torch.logspace(-2, 0, 8, dtype=torch.float64)[:, None]
    hyper = DION3.Hyper(**BARE, fraction=1.0, polynomial="exact")
    new, _ = run("dion3", W, [G], hyper)
    assert float(torch.linalg.vector_norm(new)) == pytest.approx(math.sqrt(6), rel=1e-12)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
@pytest.mark.parametrize("scale", ["spectral_norm", "keller", "moonlight", "nvidia"])
@pytest.mark.parametrize("algorithm", [DION2, DION3], ids=["dion2", "dion3"])
def test_trap_11_scale_is_the_whole_matrix(algorithm, scale, shape):
    m, n = shape
    W, G = torch.zeros(m, n, dtype=torch.float64), gaussian(m, n, seed=1)
    plain, _ = run(algorithm.name, W, [G], algorithm.Hyper(**BARE))
    scaled, _ = run(algorithm.name, W, [G], algorithm.Hyper(**(BARE | {"scale": scale})))
    factor = {
        "spectral_norm": math.sqrt(m / n),
        "keller": math.sqrt(max(1, m / n)),
        "moonlight": 0.2 * math.sqrt(max(m, n)),
        "nvidia": math.sqrt(max(m, n)),
    }[scale]
    assert relative(scaled, factor * plain) < 1e-15
