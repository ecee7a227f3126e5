"""What only longer runs show: nightly."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from conformance.convergence import steps_gate
from conformance.convergence.drivers import BestPort, OraclePort
from conformance.convergence.gate import LARGEST_RATIO
from conformance.convergence.training import Run, train
from conformance.convergence.workloads import Spec

pytestmark = pytest.mark.slow


def test_error_feedback_pays_in_a_thousand_steps_at_a_sixteenth_of_the_rank() -> None:
    run = Run(Spec(data="new-testament"), "dion", (("rank_fraction", 0.0625),), 16, 1000, 0.02, 0)
    gains = []
    for seed in range(3):
        with_it = train(replace(run, seed=seed), BestPort()).held_out
        without = train(replace(run, seed=seed, algorithm="dion_no_error_feedback"), BestPort()).held_out
        gains.append(without - with_it)
    assert min(gains) > 0
    assert statistics.mean(gains) > 0.01


@pytest.mark.parametrize("group", [1, 2, 3])
def test_fresh_seeds_need_clearly_fewer_steps_than_adamw(group: int) -> None:
    found = dict(steps_gate.steps_over_adamw(BestPort(), ("muon", "dion"), group, 3, {}))
    assert set(found) == {"muon", "dion"}
    assert max(found.values()) <= LARGEST_RATIO


def test_adamw_s_rate_is_the_best_of_its_neighbours() -> None:
    lr, hyper = steps_gate.RULES["adamw"]

    def mean(rate: float) -> float:
        return statistics.mean(
            steps_gate.steps_needed(BestPort(), "adamw", rate, hyper, seed) for seed in range(3)
        )

    # a step is taken as equal: the curves have plateaus
    assert mean(lr) <= min(mean(lr / 2), mean(lr * 2)) + 3


def test_muon_that_never_decays_its_momentum_fails_on_the_gpt() -> None:
    found = dict(steps_gate.steps_over_adamw(OraclePort(), ("muon",), 0, 3, {"muon": {"mu": 0.999}}))
    assert found["muon"] > LARGEST_RATIO
