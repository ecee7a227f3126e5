"""The search: the best is never at an edge that could have been moved."""

from __future__ import annotations

import math

import pytest

from conformance.convergence.training import Run
from conformance.convergence.tuning import FACTOR, LARGEST_EXTENSION, snapped, tune
from conformance.convergence.workloads import Spec

RUN = Run(Spec(), "muon", (), 8, 10, 0.0, 0)
ADAMW = Run(Spec(), "adamw", (("betas", (0.9, 0.95)),), 8, 10, 0.0, 0)


def parabola(best: float) -> object:
    return lambda run: (math.log(run.lr) - math.log(best)) ** 2


@pytest.mark.parametrize("best", [0.0003, 0.004, 0.02, 0.9])
def test_the_grid_grows_until_the_best_is_inside(best: float) -> None:
    found = tune(RUN, parabola(best), 0.02)  # type: ignore[arg-type]
    assert abs(math.log(found.run.lr / best, FACTOR)) <= 0.5 + 1e-9
    rates = [lr for lr, _ in found.tried]
    assert min(rates) < found.run.lr < max(rates)
    assert not found.at_edge


def test_a_loss_without_a_minimum_is_reported_as_at_the_edge() -> None:
    found = tune(RUN, lambda run: -run.lr, 0.02)
    assert found.at_edge
    assert found.runs == 3 + LARGEST_EXTENSION


def test_rates_that_diverge_are_worse_than_any() -> None:
    found = tune(RUN, lambda run: math.inf if run.lr > 0.003 else 1 - run.lr, 0.02)
    assert found.run.lr == pytest.approx(0.0025)
    assert not found.at_edge


def test_betas_are_searched_beyond_the_grid() -> None:
    def loss(run: Run) -> float:
        first, second = dict(run.hyper)["betas"]
        rate = (math.log(run.lr) - math.log(0.01)) ** 2
        return (
            rate + (math.log(1 - first) - math.log(0.4)) ** 2 + (math.log(1 - second) - math.log(0.005)) ** 2
        )

    found = tune(ADAMW, loss, 0.02)
    assert dict(found.run.hyper)["betas"] == (0.6, 0.995)
    assert found.run.lr == pytest.approx(0.01)


@pytest.mark.parametrize("start", [0.0, 0.2, 0.6, 0.95, 0.995])
@pytest.mark.parametrize("best", [0.0, 0.2, 0.6, 0.9, 0.98])
def test_the_best_momentum_is_found_wherever_the_search_begins(start: float, best: float) -> None:
    run = Run(Spec(), "muon", (("mu", start),), 8, 1000, 0.0, 0)
    found = tune(run, lambda one: (math.log(1.01 - dict(one.hyper)["mu"]) - math.log(1.01 - best)) ** 2, 0.02)
    assert dict(found.run.hyper)["mu"] == best


def test_a_valley_along_which_both_change_is_followed() -> None:
    """Neither the rate nor the momentum alone leads on from where the search begins."""
    momenta = (0.0, 0.2, 0.6, 0.8, 0.9)

    def loss(run: Run) -> float:
        rate, momentum = math.log2(run.lr / 0.01), momenta.index(dict(run.hyper)["mu"])
        return 10 * (rate + momentum - 4) ** 2 + (rate - momentum + 2) ** 2

    run = Run(Spec(), "muon", (("mu", 0.2),), 8, 12, 0.0, 0)
    found = tune(run, loss, 0.08)
    assert (dict(found.run.hyper)["mu"], found.run.lr) == (0.8, pytest.approx(0.02))
    assert not found.at_edge


@pytest.mark.parametrize(("algorithm", "most"), [("lion", 0.98), ("adamw", 0.995)])
def test_no_average_is_longer_than_the_run(algorithm: str, most: float) -> None:
    """A momentum that never moves is another rule; AdamW's averages are corrected."""
    run = Run(Spec(), algorithm, (("betas", (0.9, 0.95)),), 8, 60, 0.0, 0)
    found = tune(run, lambda one: -min(dict(one.hyper)["betas"][1], 0.995) + (one.lr - 0.01) ** 2, 0.02)
    assert dict(found.run.hyper)["betas"][1] == most


def test_no_run_is_asked_for_twice() -> None:
    asked = []

    def loss(run: Run) -> float:
        asked.append(run)
        return (math.log(run.lr) - math.log(0.005)) ** 2

    found = tune(ADAMW, loss, 0.02)
    assert len(asked) == len(set(asked)) == found.runs


def test_rates_lie_on_one_grid() -> None:
    assert snapped(0.011) == snapped(0.01) == 0.01
    assert snapped(0.019) == pytest.approx(0.02)
