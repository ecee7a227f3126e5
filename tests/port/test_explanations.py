"""What a port does otherwise than it claims is named: a preset, one choice, an adapter's mistake, or bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_optimizer import TorchOptimizerAdapter
from conformance.port.runner import Selection, run_vectors
from conformance.vectors import load

CASES = tuple(
    f"L?/muon/keller/{name}"
    for name in (
        "24x8-warm",
        "8x24-warm",
        "13x10-warm",
        "24x8-tiny",
        "13x10-fresh",
        "24x8-fresh",
        "13x10-10*",
    )
)
FEATURES = ("state", "schedule:lr", "schedule:mu")


class Muon(torch.optim.Optimizer):
    """Keller Jordan's, with one thing done otherwise."""

    def __init__(self, params: Any, how: str, **hyper: Any) -> None:
        super().__init__(params, hyper)
        self.how = how

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group)

    def update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        how, lr, mu, decay = self.how, group["lr"], group["momentum"], group["weight_decay"]
        mu = self.defaults["momentum"] if how == "constant momentum" else mu
        buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
        if self.state[p].pop("doubled", False):
            buffer.mul_(0.5)
        if how == "sum":
            X = p.grad + mu * buffer.mul_(mu).add_(p.grad)
        else:
            buffer.lerp_(p.grad, 1 - mu)
            X = buffer if how == "no Nesterov" else p.grad.lerp(buffer, mu)
        X = X.bfloat16() if how == "bfloat16" else X
        X = X / (X.norm() + (1e-2 if how == "large epsilon" else 1e-7))
        for _ in range(4 if how == "four steps" else 5):
            A = X @ X.mT
            first = 3.4445 * (1.00001 if how == "a little off" else 1)
            X = first * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
        if how == "another scale":
            scale = 0.2 * max(p.shape) ** 0.5
        update = -lr * scale * X.to(p.dtype)
        if how == "late decay":
            p.add_(update).mul_(1 - lr * decay)
        elif how == "scaled decay":
            p.mul_(1 - lr * scale * decay).add_(update)
        else:
            p.mul_(1 - lr * decay).add_(update)
        if how == "of its own":
            p.mul_(1.01)
        if how == "wrong state":  # right again at the next step
            buffer.mul_(2)
            self.state[p]["doubled"] = True


def explanations(
    how: str, key: str = "buffer", cases: tuple[str, ...] = CASES, features: tuple[str, ...] = FEATURES
) -> list[str]:
    def build(params: Any, spec: Spec) -> torch.optim.Optimizer:
        hyper = {name: spec.hyper[name] for name in ("lr", "weight_decay")}
        return Muon([p for _, p in params], how, momentum=spec.hyper["mu"], **hyper)

    claims = Capabilities("port", {"muon": ("keller",)}, dtypes=("float32",), features=features)
    adapter = TorchOptimizerAdapter(claims, build, state={"momentum": key}, hyper={"mu": "momentum"})
    run = run_vectors(adapter, claims, load(), Selection(("L1", "L2"), (), cases))
    return [str(fit) for fit in run.fits]


@pytest.mark.parametrize(
    ("how", "explanation"),
    [
        ("sum", "keller with momentum='sum'"),
        ("no Nesterov", "keller with nesterov=False"),
        ("large epsilon", "keller with epsilon=0.01"),
        ("four steps", "keller with 4 steps of the polynomial"),
        ("another scale", "torch-match-rms"),
        ("late decay", "keller with decay after the update"),
        ("scaled decay", "keller with decay by the learning rate times the scale"),
        ("constant momentum", "keller with mu as it was when the optimizer was made"),
        ("bfloat16", "keller but for the rounding of bfloat16, or for a mistake of that size,"),
    ],
)
def test_one_choice_is_named(how: str, explanation: str) -> None:
    first, *_ = explanations(how)
    assert first.startswith(f"matches {explanation} to ")
    assert " in all " in first


def test_a_state_under_the_wrong_key_is_named() -> None:
    assert "keller with no momentum to start from, whatever is given" in explanations("", key="bufer")[0]


def test_a_mistake_smaller_than_rounding_is_not_called_rounding() -> None:
    """Its updates are within bfloat16's tolerances, but closer than bfloat16 brings them."""
    (said,) = explanations("a little off")
    assert said == "no known convention matches, nor this one with one choice changed"


def test_where_updates_are_right_the_states_are_said_to_be_off() -> None:
    (said,) = explanations("wrong state")
    assert said.startswith("the updates follow it, to ")
    assert " in all " in said


def test_what_nothing_explains_gets_no_guess() -> None:
    assert explanations("of its own") == ["no known convention matches, nor this one with one choice changed"]
    assert explanations("") == []  # nothing failed


FRESH = ("L1/muon/keller/13x10-fresh", "L1/muon/keller/8x24-fresh", "L1/muon/keller/24x8-tiny")


@pytest.mark.parametrize(
    ("cases", "features", "said"),
    [
        (
            ("L1/muon/keller/13x10-warm",),
            FEATURES,
            "1 case cannot tell what it follows: run all of its L1 and L2, and claim",
        ),
        (FRESH, FEATURES, "3 cases cannot tell what it follows: run all of its L1 and L2, and claim"),
        (("L?/muon/keller/13x10-fresh", "L2/muon/keller/*-10"), FEATURES, "3 cases cannot tell"),
        ((*FRESH, "L1/muon/keller/8x8-warm"), FEATURES, "matches keller with"),
        (FRESH, (), "3 cases cannot tell"),
        (("L?/muon/keller/13x10-fresh", "L2/muon/keller/*-10"), FEATURES[1:], "matches keller with"),
    ],
)
def test_no_convention_is_named_from_too_few_cases(
    cases: tuple[str, ...], features: tuple[str, ...], said: str
) -> None:
    (first, *_) = explanations("four steps", cases=cases, features=features)
    assert first.startswith(said)
