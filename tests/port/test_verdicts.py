"""The suite on itself: a right port passes everything, an idle one nothing, a broken one fails where it is broken."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conformance.adapters import Arrays, Capabilities, find
from conformance.adapters.oracle import OracleAdapter
from conformance.port.execute import Outcome
from conformance.port.grading import ACCEPTABLE, ERROR, FAIL, PASS, UNCLAIMED, UNDECIDED, grade
from conformance.port.output import not_claimed, rows
from conformance.port.runner import Run, Selection, run_vectors
from conformance.vectors import VectorSet, load

LEVELS = ("L0", "L1", "L2")


@pytest.fixture(scope="module")
def vectors() -> VectorSet:
    return load()


def run(
    name: str,
    vectors: VectorSet,
    *only: str,
    dtypes: tuple[str, ...] = (),
    isolated: bool = False,
    **options: Any,
) -> Run:
    path = f"tests.port.ports:{name}"
    adapter = find(path)
    selection = Selection(LEVELS, dtypes, only)
    return run_vectors(path if isolated else adapter, adapter.capabilities(), vectors, selection, **options)


def test_the_perfect_port_passes_everything_on_a_few_shapes(vectors: VectorSet) -> None:
    found = run("perfect", vectors, "*/8x8*", "*/7x1*", "*/16x8-*", "L2/*/dion/13x10-10")
    assert Counter(one.status for one in found.verdicts).keys() <= {PASS, UNDECIDED}
    assert found.passed
    assert {one.algorithm for one in found.verdicts if one.status == PASS} >= {
        "muon",
        "dion",
        "orthonormalize",
        "lion",
    }
    assert all(one.dtype == "bfloat16" for one in found.verdicts if one.status == UNDECIDED)


@pytest.mark.slow
def test_the_perfect_port_passes_everything(vectors: VectorSet) -> None:
    found = run("perfect", vectors)
    assert found.passed
    assert Counter(one.status for one in found.verdicts).keys() == {PASS, UNDECIDED}


def test_the_idle_port_fails_everything(vectors: VectorSet) -> None:
    for dtype in ("float64", "float32"):
        found = run("idle", vectors, dtypes=(dtype,))
        left = {one.case for one in found.verdicts if one.status != FAIL}
        assert left == {one.id for one in vectors if dtype == "float32" and "nearly-dependent" in one.flags}
        assert not found.passed
        assert len(found.verdicts) == len(vectors)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("raises", ERROR, "step raised ArithmeticError: seven by one"),
        ("wrong_shape", ERROR, r"the weight has shape \[1, 7\], not \[7, 1\]"),
        ("nan", FAIL, "NaN or infinite"),
        ("wrong_dtype", ERROR, "the new weight is float16, the old one float64"),
        ("wrong_name", ERROR, "there is no 'blocks.0.weight'"),
        ("no_array", ERROR, "shape"),
    ],
)
def test_a_broken_port_gets_a_clear_verdict_and_the_run_goes_on(
    name: str, status: str, message: str, vectors: VectorSet
) -> None:
    found = run(name, vectors, "L1/muon/dion/*", "L1/lion/*", dtypes=("float64",))
    hit = [one for one in found.verdicts if vectors[one.case].shape == (7, 1)]
    assert len(hit) == 2
    for one in hit:
        assert one.status == status
        assert re.search(message, one.message), one.message
    assert all(one.status == PASS for one in found.verdicts if one not in hit)
    assert found.count(PASS) > 30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hangs", "TimeoutError: no answer within 1.5 s"),
        ("dies", "killed by SIGABRT"),
        ("leaves", "ended with exit code 5"),
    ],
)
def test_a_port_that_hangs_or_dies_takes_only_its_case_with_it(
    name: str, message: str, vectors: VectorSet
) -> None:
    only = ("L1/muon/dion/1x7-warm", "L1/muon/dion/7x1-warm", "L1/muon/dion/8x8-warm")
    found = run(
        name, vectors, *only, dtypes=("float64",), isolated=True, timeout=1.5 if name == "hangs" else 60
    )
    said = {one.case: (one.status, one.message) for one in found.verdicts}
    assert said["L1/muon/dion/7x1-warm"][0] == ERROR
    assert message in said["L1/muon/dion/7x1-warm"][1]
    assert said["L1/muon/dion/1x7-warm"] == said["L1/muon/dion/8x8-warm"] == (PASS, "")


def test_what_is_not_claimed_is_listed_and_never_passed(vectors: VectorSet) -> None:
    found = run("mislabelled", vectors, dtypes=("float64",))
    unclaimed = [one for one in found.verdicts if one.status == UNCLAIMED]
    assert len(found.verdicts) == len(vectors)
    assert {one.message for one in unclaimed} >= {"level L0", "algorithm dion", "dialect keller of muon"}
    assert {(one.algorithm, one.dialect) for one in found.verdicts if one not in unclaimed} == {
        ("muon", "torch")
    }


def test_the_convention_that_is_followed_is_found(vectors: VectorSet) -> None:
    found = run("mislabelled", vectors, dtypes=("float64",))
    assert found.count(FAIL) > 15
    best = found.fits[0]
    assert (best.claimed, best.explanation, best.matching) == ("torch", "moonlight", best.compared)
    assert best.error < 1e-12
    assert str(best).startswith("matches moonlight within tolerance in all ")


def test_a_tie_broken_otherwise_is_acceptable_with_its_note(vectors: VectorSet) -> None:
    import torch

    from conformance.certify.mutants import replaced
    from dion_ref import linalg

    def to_the_last(M: torch.Tensor, count: int, dim: int) -> torch.Tensor:
        turned = M.flip(dim)
        return (M.shape[dim] - 1 - linalg.top_slices.__wrapped__(turned, count, dim)).sort().values

    original = linalg.top_slices
    to_the_last.__wrapped__ = original  # type: ignore[attr-defined]
    with replaced(original, to_the_last):
        found = run(
            "perfect", vectors, "L1/dion?/dion/9x12-tied", "L1/dion?/dion/24x8-warm", dtypes=("float64",)
        )
        rounded = run("perfect", vectors, "L1/dion?/dion/9x12-tied", dtypes=("bfloat16",))
    assert rounded.count(ACCEPTABLE, UNDECIDED) == len(rounded.verdicts) == 2
    assert Counter(one.status for one in found.verdicts) == {ACCEPTABLE: 2, PASS: 2}
    assert "equal slices" in next(one.message for one in found.verdicts if one.status == ACCEPTABLE)


def test_a_step_lost_to_overflow_is_acceptable_and_uses_no_tolerance(vectors: VectorSet) -> None:
    """Torch's Muon divides by an infinite norm."""
    adapter = find("conformance.adapters.torch_muon:adapter")
    selection = Selection(LEVELS, ("bfloat16",), ("L1/muon/torch/24x8-overflow",))
    found = run_vectors(adapter, adapter.capabilities(), vectors, selection)
    assert [one.status for one in found.verdicts] == [ACCEPTABLE]
    assert "overflowed" in found.verdicts[0].message
    ((_, _, used),) = rows(found)
    assert used == 0


def test_the_rounding_of_a_weight_is_no_more_for_a_smaller_update(vectors: VectorSet) -> None:
    """The decay alone is a hundredth of the step that is lost, and float32 rounds the weight as it does after that."""
    case = vectors["L1/muon/nvidia/24x8-overflow"]
    weight = case.inputs["weight"].astype(np.float32)
    decayed = weight - np.float32(case.hyper["lr"] * case.hyper["weight_decay"]) * weight
    update = (decayed.astype(np.float64) - weight)[None]
    assert grade(case, "float32", Outcome(update=update)).status == ACCEPTABLE
    assert grade(case, "float32", Outcome(update=1.01 * update)).status == FAIL
    assert grade(case, "float32", Outcome(update=update[..., :-1])).status == FAIL
    wide = vectors["L1/muon/dion/24x8-overflow"]  # whose decay is smaller than its tolerance in bfloat16
    ((_, decay),) = wide.acceptable
    for factor, status in ((1.0, ACCEPTABLE), (0.0, FAIL), (2.0, FAIL), (-0.1, FAIL)):
        assert grade(wide, "bfloat16", Outcome(update=factor * decay)).status == status


def test_a_finite_update_from_a_nan_fails(vectors: VectorSet) -> None:
    found = run("idle", vectors, "L1/muon/dion/8x8-nan", dtypes=("float32",))
    assert found.verdicts[0].status == FAIL
    assert "without an error" in found.verdicts[0].message


class Odd(OracleAdapter):
    """The oracle, whose result or state an adapter hands on otherwise."""

    def __init__(self, how: str, **claims: Any) -> None:
        self.how, self.claims, self.own = how, claims, np.zeros(0)

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), **self.claims)

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        new, state = super().step(params, grads, state, hyper)
        ((name, weight),) = new.items()
        if self.own.shape != weight.shape:
            self.own = np.zeros_like(weight)
        self.own[...] = weight
        return {name: self.own if self.how == "its own buffer" else weight}, state

    def canonical_state(self, state: Any) -> Arrays:
        found = dict(super().canonical_state(state))
        if self.how == "unknown key":
            found["momentum_buffer"] = found.pop("momentum")
        if self.how == "no states":
            return {}
        if self.how == "wrong shape":
            found["momentum"] = found["momentum"][:1]
        return found


def run_odd(how: str, vectors: VectorSet, *only: str, dtype: str = "float64", **claims: Any) -> Run:
    adapter = Odd(how, **claims)
    return run_vectors(adapter, adapter.capabilities(), vectors, Selection(LEVELS, (dtype,), only))


def test_a_port_may_return_a_buffer_that_it_writes_again(vectors: VectorSet) -> None:
    found = run_odd("its own buffer", vectors, "L2/muon/dion/13x10-10*")
    assert found.count(PASS) == len(found.verdicts) == 2


def test_states_are_graded_or_said_not_to_be(vectors: VectorSet) -> None:
    one = "L1/muon/dion/13x10-warm"
    (unknown,) = run_odd("unknown key", vectors, one).verdicts
    assert unknown.status == ERROR
    assert unknown.message == (
        "canonical_state gave 'momentum_buffer'; the oracle's keys are "
        "momentum, Q, variance, exp_avg, exp_avg_sq, step"
    )
    (shape,) = run_odd("wrong shape", vectors, one).verdicts
    assert (shape.status, shape.message) == (FAIL, "momentum has shape [1, 10], not [13, 10]")
    nothing = run_odd("no states", vectors, one)
    assert nothing.passed
    assert not_claimed(nothing) == "not claimed: states momentum"


def test_a_run_to_which_momentum_makes_no_difference_says_so(vectors: VectorSet) -> None:
    fresh = {"algorithms": {"muon": ("dion",)}, "levels": ("L1", "L2")}
    assert run_odd("", vectors, **fresh, features=()).without_momentum == ["muon (dion)"]
    assert run_odd("", vectors, **fresh, features=("schedule:lr",)).without_momentum == []


@pytest.mark.parametrize(
    "name", ["conformance.adapters.ours:adapter", "conformance.adapters.torch_muon:adapter"]
)
def test_shipped_ports_pass(name: str, vectors: VectorSet) -> None:
    adapter = find(name)
    selection = Selection(LEVELS, (), ("*/1x1*", "*/13x10*", "*/8x24-fresh", "*/14x10-gate-up"))
    found = run_vectors(adapter, adapter.capabilities(), vectors, selection)
    assert [one for one in found.verdicts if one.status in (FAIL, ERROR)] == []
    assert found.count(PASS) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["conformance.adapters.ours:adapter", "conformance.adapters.torch_muon:adapter"]
)
def test_shipped_ports_pass_everything(name: str, vectors: VectorSet) -> None:
    adapter = find(name)
    found = run_vectors(adapter, adapter.capabilities(), vectors, Selection(LEVELS))
    assert [one for one in found.verdicts if one.status in (FAIL, ERROR)] == []
