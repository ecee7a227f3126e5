"""A NaN in the gradient has to be refused by the port itself: what the suite trips over is no refusal."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.port.execute import execute
from conformance.port.grading import ERROR, PASS, grade
from conformance.vectors import load

CASE = "L1/muon/dion/8x8-nan"


class Port:
    def init(self, spec: Any, params: Any) -> Any:
        return None


class ReturnsNothing(Port):
    def step(self, params: Any, grads: Any, state: Any, hyper: Any) -> Any:
        return None


class ReturnsWeights(Port):
    def step(self, params: Any, grads: Any, state: Any, hyper: Any) -> Any:
        return params


class TakesLess(Port):
    def step(self, params: Any, grads: Any) -> Any:
        return params, None


class HasNone(Port):
    def step(self, params: Any, grads: Any, state: Any, hyper: Any) -> Any:
        raise NotImplementedError


class Refuses(Port):
    def step(self, params: Any, grads: Any, state: Any, hyper: Any) -> Any:
        raise FloatingPointError("NaN")


@pytest.mark.parametrize(
    ("port", "status"),
    [(ReturnsNothing, ERROR), (ReturnsWeights, ERROR), (TakesLess, ERROR), (HasNone, ERROR), (Refuses, PASS)],
)
def test_only_what_the_step_itself_raises_is_a_refusal(port: Any, status: str) -> None:
    case = load()[CASE]
    assert grade(case, "float32", execute(port(), case, "float32")).status == status
