from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from conformance.job.grading import (
    Series,
    align_columns,
    low_precision_bound,
    nearest_lion_update,
    relative_error,
    tightest,
)
from conformance.job.judge import Judge, Step, shares
from conformance.job.results import TRAINED, Row, all_passed, rounded
from conformance.job.settings import DTYPES, OPTIMIZERS
from dion_ref import ALGORITHMS


def series(*errors: float, bound: float = 1e-12, quantity: str = "update") -> Series:
    return Series("blocks.0.mlp.up.weight", "muon", quantity, errors, (), bound)


def row(*parts: Series, losses: tuple[float, ...] = (5.0, 4.0)) -> Row:
    return Row("muon", "float64", "2x2 fsdp,tp", TRAINED, parts, losses, 1.0, 1.0, 0.1)


def test_relative_error_is_frobenius_over_the_whole_tensor() -> None:
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_error(reference + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), reference) == pytest.approx(0.2)
    assert relative_error(reference, reference) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    assert not series(0.0, bad).passed
    assert series(0.0, bad).largest == math.inf
    assert not row(series(0.0, bad)).passed


def test_an_error_at_the_bound_passes_and_above_it_fails() -> None:
    assert series(1e-12).passed
    assert not series(1e-13, 1.01e-12).passed
    assert series(5e-13).used == pytest.approx(0.5)
    assert series(0.0, bound=0.0).passed
    assert not series(1e-30, bound=0.0).passed
    assert not series().passed


def test_one_failing_state_fails_the_row_though_its_updates_pass() -> None:
    assert row(series(0.0)).passed
    failing = row(series(0.0), series(1.0, quantity="momentum"))
    assert not failing.passed
    assert "momentum of blocks.0.mlp.up.weight (muon) is off by 1.00e+00 at step 1" in failing.why()


def test_a_row_without_updates_or_with_a_rising_loss_fails() -> None:
    assert not row(series(0.0, quantity="momentum")).passed
    rising = row(series(0.0), losses=(4.0, 5.0))
    assert not rising.passed
    assert "the loss did not fall" in rising.why()
    assert not row(series(0.0), losses=(5.0, math.nan)).passed


def test_missing_rows_fail_the_job() -> None:
    assert all_passed([row(series(0.0))], 1)
    assert not all_passed([row(series(0.0))], 2)
    assert not all_passed([], 1)


def test_the_low_precision_bound_is_of_the_parameters_worst_step() -> None:
    assert low_precision_bound([1e-6, 3e-6, 2e-6], 2.0) == pytest.approx(6e-6)
    assert tightest([series(1e-14), series(5e-13), series(1e-13)]).used == pytest.approx(0.5)


def test_column_signs_are_free_and_nothing_else_is() -> None:
    Q = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    flipped = Q * torch.tensor([1.0, -1.0, -1.0])
    assert torch.equal(align_columns(flipped, Q), Q)
    assert relative_error(align_columns(Q[:, [1, 0, 2]], Q), Q) > 0.1


def test_lion_may_differ_only_where_its_terms_cancel() -> None:
    epsilon, lr, beta = 1.2e-7, 0.1, 0.9
    exp_avg = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    grad = torch.tensor([-9.0 - 1e-8, -9.0 - 1e-3, 1.0, 1.0], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.1, -0.1, -0.1], dtype=torch.float64)
    for taken in (-0.1, 0.0, 0.1):
        update = torch.tensor([taken, 0.1, -0.1, -0.1], dtype=torch.float64)
        nearest, others = nearest_lion_update(
            update, reference, exp_avg, grad, lr=lr, beta=beta, epsilon=epsilon
        )
        assert relative_error(update, nearest) == pytest.approx(0.0, abs=1e-15)
        assert others == (taken != 0.1)
    for place in (1, 2, 3):
        wrong = reference.clone()
        wrong[place] *= -1
        nearest, _ = nearest_lion_update(wrong, reference, exp_avg, grad, lr=lr, beta=beta, epsilon=epsilon)
        assert relative_error(wrong, nearest) > 0.5


def _steps(optimizer: str, dtype: str, name: str) -> tuple[Judge, Step]:
    """A judge, and a step that the oracle itself took in that dtype."""
    judge = Judge(OPTIMIZERS[optimizer], DTYPES[dtype])
    storage = DTYPES[dtype].storage
    generator = torch.Generator().manual_seed(1)
    weight, grad = (torch.randn(12, 8, generator=generator).to(storage) for _ in range(2))
    rule, hyper = ALGORITHMS[judge.algorithm(name)], judge.hyper(name)
    precision = DTYPES[dtype].precision
    state = rule.init(weight, hyper, name=name, precision=precision)
    new_weight, new_state = rule.step(weight, grad, state, hyper, precision=precision)
    old, new = ({k: v for k, v in vars(s).items() if k != "step"} for s in (state, new_state))
    return judge, Step(weight, grad, old, new_weight, new, 0)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_judge_passes_the_oracle_and_fails_a_wrong_step(optimizer: str, dtype: str) -> None:
    name = "blocks.0.mlp.up.weight"
    judge, step = _steps(optimizer, dtype, name)
    judge.initial_state(name, step.weight, step.state)
    judge.step(name, step)
    assert all(one.passed for one in judge.series()), judge.series()
    judge, step = _steps(optimizer, dtype, name)
    judge.step(name, replace(step, new_weight=step.weight + 1.5 * (step.new_weight - step.weight)))
    failed = [one.quantity for one in judge.series() if not one.passed]
    assert "update" in failed


def test_a_wrong_first_q_is_seen() -> None:
    name = "blocks.0.mlp.up.weight"
    judge, step = _steps("dion", "float64", name)
    judge.initial_state("blocks.1.mlp.up.weight", step.weight, step.state)  # the Q of another name
    assert [one.quantity for one in judge.series() if not one.passed] == ["initial Q"]


def test_shares_deal_every_name_once_and_evenly() -> None:
    sizes = {f"p{index}": 1 + index % 5 for index in range(23)}
    dealt = shares(sizes, 4)
    assert sorted(name for part in dealt for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in dealt]
    assert max(loads) - min(loads) <= 5


def test_json_numbers_are_short_and_never_nan() -> None:
    assert rounded(1.23456789e-13) == 1.235e-13
    assert rounded(math.nan) == "nan"
    assert rounded(math.inf) == "inf"
