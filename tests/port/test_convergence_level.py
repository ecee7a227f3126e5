"""Level L5 through an adapter: the gate's facts pass on ours, fail on a port that decays the step, and are listed."""

from __future__ import annotations

import pytest

from conformance.adapters.ours import adapter as ours
from conformance.port.convergence import gate_ids, run_gate
from conformance.port.grading import ERROR, FAIL, PASS, SKIP, UNCLAIMED
from conformance.port.runner import Selection
from conformance.port.selection import Known
from conformance.vectors import load
from tests.port.ports import half_steps

FACTS = Selection(("L5",), (), ("L5/muon/facts",))


def test_ours_passes() -> None:
    (verdict,) = run_gate(ours, ours.capabilities(), load(), FACTS)
    assert verdict.status == PASS, verdict.message
    assert verdict.errors


def test_half_steps_fail_and_what_is_not_claimed_is_listed() -> None:
    port = half_steps
    listed, verdict = run_gate(port, port.capabilities(), load(), FACTS)
    assert (listed.case, listed.status) == ("L5/dion2", UNCLAIMED)
    assert verdict.status == FAIL
    assert "must lie in" in verdict.message


@pytest.mark.parametrize(
    ("how", "said"),
    [("leaves", "exit code 0"), ("dies", "exit code 0"), ("hangs", "no answer within 3 s")],
)
def test_an_adapter_that_ends_its_process_or_hangs_is_an_error(how: str, said: str) -> None:
    port = f"tests.port.ports:{how}_when_stepped"
    listed, verdict = run_gate(port, half_steps.capabilities(), load(), FACTS, timeout=0.1)
    assert (listed.status, verdict.status) == (UNCLAIMED, ERROR)
    assert said in verdict.message


def test_a_skip_needs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.port.convergence.Gate", None)
    known = Known("L5/muon/*", "takes too long", "skip:1")
    selection = Selection(("L5",), (), ("L5/muon/facts",), skip=(known,))
    (verdict,) = run_gate(ours, ours.capabilities(), load(), selection)
    assert (verdict.status, verdict.message) == (SKIP, "takes too long")
    assert "L5/muon/gpt" in gate_ids(ours.capabilities(), load())
