"""Training runs: repeatable, the same start for every rule, all matrices on the matrix rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from conformance.convergence.drivers import BestPort, OraclePort, ProductionPort
from conformance.convergence.training import Run, Trainer, smoothed, train
from conformance.convergence.variants import VariantPort
from conformance.convergence.workloads import Spec, load, matrix_names
from dion_ref import ALGORITHMS, Precision

TINY = Spec(width=32, layers=1, length=8, data="new-testament")
RUN = Run(TINY, "muon", (), 4, 6, 0.02, 1)
PORT = BestPort()


def test_a_run_gives_the_same_numbers_again() -> None:
    first, second = train(RUN, PORT), train(RUN, PORT)
    assert (first.losses, first.held_out) == (second.losses, second.held_out)
    assert len(first.losses) == RUN.steps


def test_all_rules_start_from_the_same_weights_and_batches() -> None:
    firsts = {
        train(replace(RUN, algorithm=name, steps=1), PORT).losses[0]
        for name in ("muon", "dion", "adamw", "dion2")
    }
    assert len(firsts) == 1
    assert train(replace(RUN, seed=2, steps=1), PORT).losses[0] not in firsts


@pytest.mark.parametrize("algorithm", ["muon", "dion", "adamw", "lion"])
def test_production_and_oracle_train_alike(algorithm: str) -> None:
    run = replace(RUN, algorithm=algorithm, lr=0.003)
    oracle = OraclePort(Precision(torch.float32, torch.float32))
    ours, reference = train(run, ProductionPort()), train(run, oracle)
    assert ours.port == "dion_dtensor"
    assert reference.port == "dion_ref"
    assert ours.losses == pytest.approx(reference.losses, rel=1e-4)


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    run = replace(RUN, steps=100)
    assert run.rate(0) == pytest.approx(1 / 5)
    assert max(run.rate(step) for step in range(100)) == pytest.approx(0.96, abs=0.01)
    assert run.rate(99) == pytest.approx(0.01)
    assert replace(run, schedule="constant").rate(99) == 1
    trapezoid = replace(run, schedule="trapezoid")
    assert [trapezoid.rate(step) for step in (4, 79, 90)] == pytest.approx([1, 1, 0.5])


def test_micro_batches_give_the_whole_batch_s_step() -> None:
    whole = train(replace(RUN, batch=8, steps=3), PORT)
    parts = train(replace(RUN, batch=8, steps=3, micro=3), PORT)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    assert parts.held_out == pytest.approx(whole.held_out, rel=1e-4)


def test_a_run_that_diverges_ends_with_an_infinite_loss() -> None:
    outcome = train(replace(RUN, scalar_lr=1e4, steps=60), PORT)
    assert outcome.held_out == math.inf
    assert len(outcome.losses) < 60


def test_a_run_can_stop_at_a_loss() -> None:
    outcome = train(replace(RUN, steps=50, schedule="constant"), PORT, until=3.5, window=5)
    means = smoothed(outcome.losses, 5)
    assert means[-1] < 3.5 <= min(means[:-1])


def test_different_runs_have_different_names() -> None:
    names = {
        replace(RUN, **change).key for change in ({}, {"lr": 0.01}, {"seed": 2}, {"batch": 5}, {"micro": 1})
    }
    assert len(names) == 5


def test_the_gpt_s_matrices() -> None:
    names = matrix_names(load(TINY).model(0))
    assert [name.split(".")[-2] for name in names] == ["qkv", "proj", "up", "down"]


@pytest.mark.parametrize(("kind", "count"), [("vit", 8), ("resnet", 5)])
def test_vision_models_train_and_convolutions_are_matrices(kind: str, count: int) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    spec = Spec(kind, 32, 2 if kind == "vit" else 1, data="digits")
    trainer = Trainer(Run(spec, "muon", (), 64, 3, 0.02, 0), PORT)
    names = matrix_names(trainer.model)
    assert len(names) == count
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step(0)
    parameters = dict(trainer.model.named_parameters())
    for name in names:
        update = (parameters[name] - before[name]).detach().flatten(1)
        expected = 0.02 * (update.shape[0] / update.shape[1]) ** 0.5
        # orthonormalized as [out, in * kernel]; the smaller singular values depend on the gradient's rank
        assert 0.8 < float(torch.linalg.matrix_norm(update, 2)) / expected < 1.2
    assert math.isfinite(trainer.held_out())


def test_the_teacher_needs_no_data() -> None:
    outcome = train(Run(Spec("teacher", 32), "muon", (), 32, 40, 0.02, 0), PORT)
    assert outcome.losses[-1] < 0.7 * outcome.losses[0]


def test_dion_without_error_feedback_differs_in_the_momentum_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 16), (16, 24)):
        W, G = (torch.randn(shape, generator=generator) for _ in range(2))
        ours, theirs = W.clone(), W.clone()
        one = ALGORITHMS["dion"]
        hyper = one.Hyper(lr=0.1, rank_fraction=0.25, weight_decay=0.0)
        driver = VariantPort().driver(
            "dion_no_error_feedback", {"w": ours}, {"rank_fraction": 0.25, "weight_decay": 0.0}
        )
        driver.step({"w": G}, 0.1)
        precision = Precision(torch.float32, torch.float32)
        theirs, _ = one.step(
            W, G, one.init(W, hyper, name="w", precision=precision), hyper, precision=precision
        )
        assert torch.allclose(ours, theirs, atol=1e-5)  # no momentum yet, so no difference
        assert torch.allclose(driver._states["w"].momentum, 0.95 * G)  # type: ignore[attr-defined]
