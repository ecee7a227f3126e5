"""Intervals, steps to a target, and verdicts that are never bolder than the intervals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.convergence.claims import CONTRADICTED, NOT_SHOWN, SHOWN, near, smaller
from conformance.convergence.spread import interval, steps_to, within_seeds

LOSSES = st.dictionaries(st.integers(1, 5), st.floats(1.0, 3.0, allow_nan=False), min_size=3, max_size=5)


def test_the_interval_is_students() -> None:
    one = interval([1.0, 2.0, 3.0])
    assert one.mean == 2
    assert one.deviation == 1
    assert one.high - one.mean == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)


def test_one_value_has_no_finite_interval() -> None:
    assert interval([1.0]).high == math.inf
    assert math.isnan(interval([1.0, math.inf]).mean)


def test_steps_are_interpolated_in_the_logarithm() -> None:
    losses = {steps: 5 - math.log(steps) for steps in (100, 141, 200)}
    assert steps_to(5 - math.log(120), losses) == pytest.approx(120, rel=1e-9)


def test_steps_outside_the_budgets_are_not_guessed() -> None:
    assert steps_to(0.5, {100: 3.0, 200: 2.0}) == math.inf
    assert steps_to(4.5, {100: 3.0, 200: 2.0}) == 100  # a bound
    assert steps_to(1.0, {}) is None
    assert steps_to(4.5, {100: 3.0}) is None  # one budget says nothing about steps


def test_a_target_met_exactly_at_the_largest_budget_counts() -> None:
    assert steps_to(2.0, {100: 3.0, 200: 2.0}) == pytest.approx(200)


@given(LOSSES, LOSSES)
def test_no_claim_is_shown_when_the_intervals_overlap(a: dict[int, float], b: dict[int, float]) -> None:
    verdict, _ = smaller(a, b)
    seeds = set(a) & set(b)
    own, other = within_seeds([{seed: side[seed] for seed in seeds} for side in (a, b)])
    if own.overlaps(other):
        assert verdict == NOT_SHOWN


@given(LOSSES, LOSSES)
def test_a_verdict_turns_round_with_its_sides(a: dict[int, float], b: dict[int, float]) -> None:
    opposite = {SHOWN: CONTRADICTED, CONTRADICTED: SHOWN, NOT_SHOWN: NOT_SHOWN}
    assert smaller(b, a)[0] == opposite[smaller(a, b)[0]]


def test_clear_cases() -> None:
    low, high = {1: 1.0, 2: 1.01, 3: 0.99}, {1: 2.0, 2: 2.02, 3: 2.01}
    assert smaller(low, high)[0] == SHOWN
    assert smaller(high, low)[0] == CONTRADICTED
    assert smaller(low, low)[0] == NOT_SHOWN


def test_what_a_seed_does_to_both_sides_is_no_difference() -> None:
    assert smaller({1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.1, 2: 2.11, 3: 3.09})[0] == SHOWN
    assert smaller({1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.1, 2: 2.5, 3: 3.01})[0] == NOT_SHOWN


def test_intervals_within_seeds_are_wider_than_the_paired_one_by_the_root_of_two() -> None:
    a, b = {1: 1.0, 2: 2.0, 3: 3.3}, {1: 1.2, 2: 2.1, 3: 3.2}
    paired = interval([a[seed] - b[seed] for seed in a])
    own, other = within_seeds([a, b])
    assert own.high - own.mean == pytest.approx((paired.high - paired.mean) / 2**0.5)
    assert own.mean - other.mean == pytest.approx(paired.mean)


def test_near_is_within_one_percent_with_all_of_the_interval() -> None:
    reference = {1: 2.0, 2: 2.0, 3: 2.0}
    assert near({1: 2.010, 2: 2.011, 3: 2.012}, reference)[0] == SHOWN
    assert near({1: 2.10, 2: 2.11, 3: 2.12}, reference)[0] == CONTRADICTED
    assert near({1: 1.99, 2: 2.02, 3: 2.05}, reference)[0] == NOT_SHOWN
    assert near({1: 1.80, 2: 1.81, 3: 1.82}, reference)[0] == SHOWN
