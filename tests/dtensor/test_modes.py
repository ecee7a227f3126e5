"""A step within what torch wraps around it: modes that count, inference mode, a graph that still needs the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dion_dtensor import Muon, updates
from dion_dtensor.buckets import Bucket
from dion_dtensor.planning.predict import polynomial_flops
from tests.dtensor.small import RULES, Small, backward, make, optimizer_of, train


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("how", ["counted", "disabled"])
@pytest.mark.parametrize("algorithm", ["muon", "dion2", "adamw"])
def test_where_torch_compiles_nothing_a_compiled_step_is_taken_eagerly(algorithm: str, how: str) -> None:
    """It raised after it had stepped: "fullgraph=True found no compiled frames"."""
    stepped = []
    for compiled in (True, False):
        parameter = drawn(12, 8)
        parameter.grad = drawn(12, 8).detach() + 1
        optimizer = make(algorithm, [("w", parameter)], compile=compiled, cautious=True)
        if how == "counted":
            with FlopCounterMode(display=False) as counter:
                optimizer.step()
            rows = 4 if algorithm == "dion2" else 8
            counted = 0.0 if algorithm == "adamw" else polynomial_flops(12, rows, dtype=torch.float32)
            assert counter.get_total_flops() == counted
        else:
            with torch._dynamo.config.patch(disable=True):
                optimizer.step()
        stepped.append((parameter.detach(), optimizer.state[parameter]))
    (ours, state), (eager, expected) = stepped
    assert torch.equal(ours, eager)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


# Compiled: one that writes by torch's fused kernel, and one that does not.
@pytest.mark.parametrize(
    ("algorithm", "compiled"), [*((rule, False) for rule in RULES), ("adamw", True), ("muon", True)]
)
def test_a_backward_pass_by_weights_that_have_changed_is_refused(algorithm: str, compiled: bool) -> None:
    parameter = drawn(6, 4)
    parameter.grad = torch.ones(6, 4)
    optimizer = make(algorithm, [("w", parameter)], compile=compiled)
    loss = (parameter * parameter).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("algorithm", RULES)
def test_an_optimizer_that_was_made_in_inference_mode_trains_outside(algorithm: str) -> None:
    model = Small()
    with torch.inference_mode():
        optimizer = optimizer_of(model, algorithm)
        copied = copy.deepcopy(optimizer)
    other = copied.param_groups
    expected = train(model, optimizer, 2)
    for group, own in zip(other, optimizer.param_groups, strict=True):
        for copy_, parameter in zip(group["params"], own["params"], strict=True):
            copy_.grad = parameter.grad
    copied.step()
    assert all(torch.isfinite(weight).all() for weight in expected)


def test_a_step_that_cannot_be_compiled_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    optimizer = optimizer_of(model, "muon", momentum="ema", bias_correction=True)
    train(model, optimizer, 1)

    def failing(*_: Any) -> None:
        raise RuntimeError("no C++ compiler")

    counts = [float(state["step"]) for state in optimizer.state.values()]
    assert set(counts) == {1.0}
    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "_step", failing)
        with pytest.raises(RuntimeError, match="no C"):
            optimizer.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == counts
    backward(model)
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_the_compiled_function_is_used_where_torch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        def fail(*_: Any) -> None:
            raise AssertionError("compiled")

        return fail

    updates.update_of.cache_clear()
    monkeypatch.setattr(torch, "compile", refused)
    parameter = drawn(10, 6)
    parameter.grad = torch.ones(10, 6)
    optimizer = Muon([("w", parameter)])
    with pytest.raises(AssertionError, match="compiled"):
        optimizer.step()
    updates.update_of.cache_clear()
