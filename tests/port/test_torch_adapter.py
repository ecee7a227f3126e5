"""The adapter of torch optimizers: state keys that are wrong, and the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conformance.adapters import AdapterError, Capabilities, Spec, use_device
from conformance.adapters.torch_optimizer import TorchOptimizerAdapter
from conformance.port.grading import ERROR, PASS
from conformance.port.runner import Selection, run_vectors
from conformance.vectors import load

HYPER = {"lr": 0.1, "weight_decay": 0.0}
SPEC = Spec(
    "w", (2, 3), "float32", "float32", "muon", "torch", None, HYPER, {}, {"momentum": np.zeros((2, 3))}
)


def _plain_muon(params: Any, spec: Spec) -> torch.optim.Optimizer:
    hyper = spec.hyper
    return torch.optim.Muon([p for _, p in params], lr=hyper["lr"], weight_decay=hyper["weight_decay"])


def test_a_state_key_that_the_optimizer_does_not_have_is_an_error() -> None:
    claims = Capabilities("plain", {"muon": ("torch",)}, dtypes=("bfloat16",))
    adapter = TorchOptimizerAdapter(claims, _plain_muon, state={"momentum": "momentum_bufer", "Q": "no"})
    run = run_vectors(adapter, claims, load(), Selection(("L1",), (), ("L1/muon/torch/13x10-zero",)))
    (verdict,) = run.verdicts
    assert verdict.status == ERROR
    assert (
        "state={'momentum': 'momentum_bufer'}, but the optimizer keeps ['momentum_buffer']" in verdict.message
    )


def test_everything_that_a_port_is_given_lies_on_the_device() -> None:
    seen: list[str] = []

    def build(params: Any, spec: Spec) -> torch.optim.Optimizer:
        seen.extend(p.device.type for _, p in params)
        return _plain_muon(params, spec)

    def orthonormalize(matrix: torch.Tensor, _: Any) -> torch.Tensor:
        seen.append(matrix.device.type)
        return torch.zeros(matrix.shape)

    claims = Capabilities("plain", {"muon": ("torch",)}, features=("state",))
    adapter = TorchOptimizerAdapter(
        claims, build, state={"momentum": "momentum_buffer"}, orthonormalize=orthonormalize
    )
    adapter.use_device("meta")  # any but the CPU
    named, optimizer, _ = adapter.init(SPEC, {SPEC.name: np.zeros((2, 3))})
    assert optimizer.state[named[0][1]]["momentum_buffer"].device.type == "meta"
    adapter.orthonormalize(np.zeros((2, 3)), {}, "float32")
    assert seen == ["meta", "meta"]
    with pytest.raises(NotImplementedError, match="meta"):  # reached with gradients there, read from there
        adapter.step({}, {SPEC.name: np.zeros((2, 3))}, (named, optimizer, SPEC), {})
    assert named[0][1].grad.device.type == "meta"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    adapter = TorchOptimizerAdapter(Capabilities("plain", {}), _plain_muon)
    with pytest.raises(
        AdapterError, match=r"'my:adapter': it cannot use the device 'cuda'.*torch sees no GPU here"
    ):
        use_device(adapter, "cuda", "my:adapter")


def test_keys_that_the_oracle_does_not_have_are_refused() -> None:
    claims = Capabilities("plain", {})
    with pytest.raises(AdapterError, match=r"state: the oracle has no 'momentun'; it has momentum, Q"):
        TorchOptimizerAdapter(claims, _plain_muon, state={"momentun": "momentum_buffer"})
    with pytest.raises(AdapterError, match=r"hyper: the oracle has no 'momentun'; it has lr, mu"):
        TorchOptimizerAdapter(claims, _plain_muon, hyper={"momentun": "momentum"})


def test_a_hyperparameter_that_no_group_has_is_an_error_when_it_changes() -> None:
    claims = Capabilities("plain", {"muon": ("torch",)}, dtypes=("bfloat16",), features=("schedule:mu",))
    adapter = TorchOptimizerAdapter(claims, _plain_muon, hyper={"mu": "mu"})
    run = run_vectors(adapter, claims, load(), Selection(("L2",), (), ("L2/muon/torch/13x10-10-warmup",)))
    assert run.verdicts[0].status == ERROR
    assert "hyper={'mu': 'mu'}, but the param groups have [" in run.verdicts[0].message


def test_a_build_that_forgets_to_return() -> None:
    adapter = TorchOptimizerAdapter(Capabilities("plain", {}), lambda *_: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="build must return the optimizer, not NoneType"):
        adapter.init(SPEC, {SPEC.name: np.zeros((2, 3))})


def test_a_state_that_is_kept_otherwise_is_made_by_a_function() -> None:
    """torch.optim.AdamW counts its steps in a tensor, and has no state before the first."""

    def build(params: Any, spec: Spec) -> torch.optim.Optimizer:
        hyper = {
            "lr": spec.hyper["lr"],
            "weight_decay": spec.hyper["weight_decay"],
            "eps": spec.hyper["epsilon"],
        }
        return torch.optim.AdamW([p for _, p in params], betas=tuple(spec.hyper["betas"]), **hyper)

    claims = Capabilities("plain", {"adamw": ("dion",)}, dtypes=("float64",), features=("state",))
    state: dict[str, Any] = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"}
    for step, right in ((("step", torch.Tensor.float), True), ("step", False)):
        adapter = TorchOptimizerAdapter(claims, build, state={**state, "step": step})
        run = run_vectors(adapter, claims, load(), Selection(("L1",), (), ("L1/adamw/dion/*warm",)))
        assert run.verdicts
        assert all((one.status == PASS) == right for one in run.verdicts)


@pytest.mark.parametrize(
    ("feature", "given", "message"),
    [
        (
            "state",
            {},
            r"port claims the feature 'state', but state=\{\} has no key of its optimizer; give state=",
        ),
        ("state", {"state": {}}, "'state', but"),
        (
            "schedule:mu",
            {},
            r"'schedule:mu', but hyper=\{'lr'\} has no key for it; give hyper=\{'mu': 'your key'\}",
        ),
    ],
)
def test_a_claim_without_its_key_is_refused_at_once(
    feature: str, given: dict[str, Any], message: str
) -> None:
    claims = Capabilities("port", {"muon": ("keller",)}, features=("schedule:lr", feature))

    def build(params: Any, spec: Any) -> Any:
        """Never called: the claims are looked at before."""

    with pytest.raises(AdapterError, match=message):
        TorchOptimizerAdapter(claims, build, **given)
    TorchOptimizerAdapter(claims, build, state={"momentum": "buffer"}, hyper={"mu": "momentum"})
