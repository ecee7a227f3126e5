"""AdamW and Lion, and the weight decay that all rules share."""

from __future__ import annotations

import math

import pytest
import torch

from dion_ref import ALGORITHMS

from .helpers import ALL, gaussian, relative, run

ADAMW, LION = ALGORITHMS["adamw"], ALGORITHMS["lion"]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (2, 3, 4), (2, 0)])
def test_adamw_against_torch(shape):
    W, grads = gaussian(*shape), [gaussian(*shape, seed=seed) for seed in range(1, 8)]
    hyper = ADAMW.Hyper(lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), epsilon=1e-4)
    parameter = torch.nn.Parameter(W.clone())
    theirs = torch.optim.AdamW([parameter], lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-4)
    for grad in grads:
        parameter.grad = grad.clone()
        theirs.step()
    ours, state = run("adamw", W, grads, hyper)
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(state.exp_avg, theirs.state[parameter]["exp_avg"], rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(
        state.exp_avg_sq, theirs.state[parameter]["exp_avg_sq"], rtol=1e-13, atol=1e-16
    )
    assert state.step == 7


def test_adamw_in_plain_floats():
    w, m, v, hyper = 1.5, 0.0, 0.0, ADAMW.Hyper(lr=0.1, weight_decay=0.2, epsilon=1e-3)
    W = torch.tensor(1.5, dtype=torch.float64)
    state = ADAMW.init(W, hyper)
    for t, g in enumerate((0.3, -0.7, 2.0), 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - 0.02) - 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-3)
        W, state = ADAMW.step(W, torch.tensor(g, dtype=torch.float64), state, hyper)
        assert float(W) == pytest.approx(w, rel=1e-14)


@pytest.mark.parametrize("cautious", [False, True])
def test_lion_in_plain_floats(cautious):
    w, m, hyper = (
        [1.5, -0.5],
        [0.0, 0.0],
        LION.Hyper(lr=0.1, weight_decay=0.2, betas=(0.9, 0.6), cautious=cautious),
    )
    W = torch.tensor(w, dtype=torch.float64)
    state = LION.init(W, hyper)
    for G in ([0.3, 0.2], [-0.2, 0.0], [-2.0, -0.1], [0.0, 0.0]):
        for i, g in enumerate(G):
            x = 0.9 * m[i] + (1 - 0.9) * g
            u = math.copysign(1.0, x) if x else 0.0
            m[i] = 0.6 * m[i] + (1 - 0.6) * g
            w[i] = (w[i] * (1 - 0.02) if not cautious or u * w[i] >= 0 else w[i]) - 0.1 * u
        W, state = LION.step(W, torch.tensor(G, dtype=torch.float64), state, hyper)
        assert W.tolist() == pytest.approx(w, rel=1e-14)
        assert state.exp_avg.tolist() == pytest.approx(m, rel=1e-14)


def test_lion_sign_of_zero_is_zero():
    W = gaussian(3)
    hyper = LION.Hyper(weight_decay=0.0)
    new, _ = LION.step(W, torch.zeros(3, dtype=torch.float64), LION.init(W, hyper), hyper)
    assert torch.equal(new, W)


@pytest.mark.parametrize("name", ALL)
def test_decay_uses_the_base_rate_and_covers_everything(name):
    Hyper = ALGORITHMS[name].Hyper
    W, G = gaussian(6, 9), gaussian(6, 9, seed=1)
    free, _ = run(name, W, [G], Hyper(lr=0.1, weight_decay=0.0))
    decayed, _ = run(name, W, [G], Hyper(lr=0.1, weight_decay=0.5))
    assert relative(free - decayed, 0.05 * W) < 1e-13


@pytest.mark.parametrize("name", ALL)
def test_decay_comes_before_the_update(name):
    Hyper = ALGORITHMS[name].Hyper
    W, G = gaussian(6, 9), gaussian(6, 9, seed=1)
    update = W - run(name, W, [G], Hyper(lr=0.1, weight_decay=0.0))[0]
    decayed, _ = run(name, W, [G], Hyper(lr=0.1, weight_decay=9.0))
    assert relative(decayed, 0.1 * W - update) < 1e-13  # not 0.1 * (W - update)


@pytest.mark.parametrize("name", ALL)
def test_cautious_decay_only_where_update_and_weight_agree(name):
    Hyper = ALGORITHMS[name].Hyper
    W, G = gaussian(8, 9), gaussian(8, 9, seed=1)
    W[0, :3] = 0
    free, _ = run(name, W, [G], Hyper(lr=0.1, weight_decay=0.0))
    cautious, _ = run(name, W, [G], Hyper(lr=0.1, weight_decay=0.5, cautious=True))
    agrees = (W - free) * W >= 0
    assert 0.2 < float(agrees.double().mean()) < 0.95
    wanted = torch.where(agrees, free - 0.05 * W, free)
    assert torch.dist(cautious, wanted) < 1e-14
    if name in ("dion2", "dion3"):  # where nothing is subtracted, decay goes on
        still = (free == W).all(dim=1)
        assert int(still.sum()) == 6
        assert relative(cautious[still], 0.95 * W[still]) < 1e-15
