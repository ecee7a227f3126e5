"""Level L5 through an adapter: the gate's facts pass on ours, fail on a port that decays the step, and are listed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from conformance.adapters import Arrays, Capabilities
from conformance.adapters.ours import adapter as ours
from conformance.port.convergence import gate_ids, run_gate
from conformance.port.grading import FAIL, PASS, SKIP, UNCLAIMED
from conformance.port.runner import Selection
from conformance.port.selection import Known
from conformance.vectors import load

FACTS = Selection(("L5",), (), ("L5/muon/facts",))


class HalfSteps:
    """Ours, but each update is half of what it should be."""

    def capabilities(self) -> Capabilities:
        return Capabilities("half", {"muon": ("dion",), "dion2": ("torch",)}, ("L5",), ("float64",))

    def init(self, spec: Any, params: Arrays) -> Any:
        return ours.init(spec, params)

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        new, state = ours.step(params, grads, state, hyper)
        return {name: (value + params[name]) / 2 for name, value in new.items()}, state


def test_ours_passes() -> None:
    (verdict,) = run_gate(ours, ours.capabilities(), load(), FACTS)
    assert verdict.status == PASS, verdict.message
    assert verdict.errors


def test_half_steps_fail_and_what_is_not_claimed_is_listed() -> None:
    port = HalfSteps()
    listed, verdict = run_gate(port, port.capabilities(), load(), FACTS)
    assert (listed.case, listed.status) == ("L5/dion2", UNCLAIMED)
    assert verdict.status == FAIL
    assert "must lie in" in verdict.message


def test_a_skip_needs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.port.convergence.Gate", None)
    known = Known("L5/muon/*", "takes too long", "skip:1")
    selection = Selection(("L5",), (), ("L5/muon/facts",), skip=(known,))
    (verdict,) = run_gate(ours, ours.capabilities(), load(), selection)
    assert (verdict.status, verdict.message) == (SKIP, "takes too long")
    assert "L5/muon/gpt" in gate_ids(ours.capabilities(), load())
