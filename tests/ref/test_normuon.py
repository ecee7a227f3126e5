from __future__ import annotations

import math

import pytest
import torch

from dion_ref import ALGORITHMS

from .helpers import gaussian, relative, run

NORMUON = ALGORITHMS["normuon"]


def by_rows(U, v, beta2, epsilon):
    """NorMuon's normalization in plain loops over Python floats."""
    rows, before = U.tolist(), math.sqrt(sum(x * x for row in U.tolist() for x in row))
    v = [
        beta2 * old + (1 - beta2) * sum(x * x for x in row) / len(row)
        for old, row in zip(v, rows, strict=True)
    ]
    rows = [[x / (math.sqrt(w) + epsilon) for x in row] for w, row in zip(v, rows, strict=True)]
    after = max(math.sqrt(sum(x * x for row in rows for x in row)), epsilon)
    return torch.tensor([[x * before / after for x in row] for row in rows], dtype=torch.float64), v


@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_steps_by_loops(shape, epsilon):
    hyper = NORMUON.Hyper(
        lr=1.0,
        weight_decay=0.0,
        beta2=0.8,
        variance_epsilon=epsilon,
        nesterov=True,
        momentum="ema",
        scale=None,
    )
    muon = ALGORITHMS["muon"].Hyper(lr=1.0, weight_decay=0.0, nesterov=True, momentum="ema", scale=None)
    W = Z = gaussian(*shape)
    state, plain, v = NORMUON.init(W, hyper), ALGORITHMS["muon"].init(W, muon), [0.0] * shape[0]
    for seed in (1, 2, 3):
        G = gaussian(*shape, seed=seed)
        G[2] *= 0.01  # one row quieter than the others
        before, (W, state) = W, NORMUON.step(W, G, state, hyper)
        last, (Z, plain) = Z, ALGORITHMS["muon"].step(Z, G, plain, muon)
        wanted, v = by_rows(last - Z, v, 0.8, epsilon)
        assert relative(before - W, wanted) < 1e-12
        assert state.variance.flatten().tolist() == pytest.approx(v, rel=1e-12)


def test_trap_10_rescale_keeps_the_norm_of_the_whole_matrix_not_of_blocks():
    W, G = gaussian(12, 8), gaussian(12, 8, seed=1) * torch.logspace(-2, 0, 12, dtype=torch.float64)[:, None]
    exact = {"lr": 1.0, "weight_decay": 0.0, "polynomial": "exact", "scale": None}
    U = W - run("normuon", W, [G], NORMUON.Hyper(**exact))[0]
    polar = W - run("muon", W, [G], ALGORITHMS["muon"].Hyper(**exact))[0]
    size = torch.linalg.matrix_norm
    assert float(size(U)) == pytest.approx(math.sqrt(8), rel=1e-12)
    assert float(size(U[:2]) / size(polar[:2])) > 2  # a shard's rescale would give 1 here
    assert float(size(U[10:]) / size(polar[10:])) < 0.9


def test_first_step_evens_out_the_rows():
    W, G = gaussian(12, 5), gaussian(12, 5, seed=1)
    U = W - run("normuon", W, [G], NORMUON.Hyper(lr=1.0, weight_decay=0.0))[0]
    rows = torch.linalg.vector_norm(U, dim=1)
    assert float(rows.max() - rows.min()) < 1e-6 * float(rows.max())


def test_no_bias_correction_of_the_variance():
    W, G = gaussian(4, 6), gaussian(4, 6, seed=1)
    _, state = run("normuon", W, [G], NORMUON.Hyper(polynomial="exact"))
    assert state.variance.flatten().tolist() == pytest.approx([0.05 / 6] * 4, rel=1e-12)
