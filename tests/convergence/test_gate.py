"""The gate: its bands are the oracle's, right ports pass, every injected bug fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.convergence import bands
from conformance.convergence.drivers import MATRIX_ALGORITHMS, Driver, OraclePort, ProductionPort
from conformance.convergence.faults import FAULTS, STEPS, UNSEEN, FaultyPort
from conformance.convergence.gate import Gate
from conformance.convergence.injections import clean_runs
from conformance.convergence.regression import PROBLEMS, score
from conformance.convergence.unit_facts import SHAPES, unit_facts
from dion_ref import ALGORITHMS, Precision

EVERY_FAULT = [(algorithm, fault) for algorithm, faults in FAULTS.items() for fault in faults]
FAST = ("facts", "regression")


@pytest.mark.parametrize("algorithm", sorted(STEPS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_fault_the_faulty_step_is_the_oracles(algorithm: str, shape: tuple[int, int]) -> None:
    one = ALGORITHMS[algorithm]
    generator = torch.Generator().manual_seed(3)
    options = {"dion": {"rank_fraction": 0.25}, "dion2": {"fraction": 0.25}, "dion3": {"fraction": 0.25}}
    hyper = one.Hyper(lr=0.1, **options.get(algorithm, {}))
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    own, state, own_state = W, *(one.init(W, hyper, name="w") for _ in range(2))
    for _ in range(3):
        G = torch.randn(shape, generator=generator, dtype=torch.float64)
        W, state = one.step(W, G, state, hyper)
        own, own_state = FaultyPort(algorithm, None).step(own, G, own_state, hyper)
        assert torch.equal(own, W)
        for name, value in vars(state).items():
            other = getattr(own_state, name)
            assert torch.equal(other, value) if isinstance(value, Tensor) else other == value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_oracle_steps_in_the_parameters_dtype(dtype: torch.dtype) -> None:
    """A model in float32 is stepped in float32: the gate's GPT runs on the oracle too."""
    weight = torch.eye(3, dtype=dtype)
    driver = OraclePort().driver("muon", {"w": weight}, {"weight_decay": 0.0})
    driver.step({"w": torch.ones_like(weight)}, 0.1)
    assert weight.dtype == dtype
    assert not torch.equal(weight, torch.eye(3, dtype=dtype))


def test_the_issue_s_twenty_bugs_are_among_the_injections() -> None:
    assert len(EVERY_FAULT) >= 20
    assert len(set(EVERY_FAULT)) == len(EVERY_FAULT)


@pytest.mark.parametrize(("algorithm", "fault"), EVERY_FAULT, ids=lambda text: text.replace(" ", "-"))
def test_the_gate_catches(algorithm: str, fault: str) -> None:
    result = Gate(parts=FAST, seed=1).run(FaultyPort(algorithm, fault), stop_at_failure=True)
    assert not result.passed


# Seen by training alone: what single updates cannot tell is caught by the regression, and the other way round.
@pytest.mark.parametrize(
    ("algorithm", "fault"),
    [("muon", "no momentum"), ("muon", "momentum never decays"), ("dion", "no error feedback")],
)
def test_the_regression_catches_by_itself(algorithm: str, fault: str) -> None:
    result = Gate(parts=("regression",), seed=2).run(FaultyPort(algorithm, fault), stop_at_failure=True)
    assert not result.passed


@pytest.mark.parametrize("algorithm", ["dion2"])
def test_without_a_fault_the_gate_passes(algorithm: str) -> None:
    result = Gate(parts=FAST, seed=1).run(OraclePort(algorithms=(algorithm,)))
    assert result.passed, [check.why() for check in result.failures]
    assert set(result.not_claimed) == set(bands.SETTINGS) - {algorithm}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_facts_hold_for_our_production(dtype: torch.dtype) -> None:
    result = Gate(parts=("facts",), seed=5, dtype=dtype).run(ProductionPort())
    assert result.passed, [check.why() for check in result.failures]
    assert result.not_claimed == ()
    assert {check.algorithm for check in result.checks} == set(MATRIX_ALGORITHMS)


def test_our_production_learns_within_the_bands() -> None:
    port = ProductionPort(algorithms=("muon",))
    result = Gate(parts=("regression",), seed=5, dtype=torch.float32).run(port)
    assert result.passed, [check.why() for check in result.failures]
    assert len(result.checks) == len(PROBLEMS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_all_of_our_production_passes(dtype: torch.dtype) -> None:
    result = Gate(parts=FAST, seed=6, dtype=dtype).run(ProductionPort())
    assert result.passed, [check.why() for check in result.failures]


@pytest.mark.parametrize("algorithm", MATRIX_ALGORITHMS)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_facts_hold_in_low_precision(algorithm: str, compute: torch.dtype) -> None:
    port = OraclePort(Precision(torch.float32, compute))
    for seed in range(4):
        for shape in SHAPES:
            facts = unit_facts(
                port, algorithm, shape, hyper={}, seed=seed, dtype=torch.float32, compute_dtype=compute
            )
            assert facts
            assert all(fact.holds for fact in facts), [fact for fact in facts if not fact.holds]


@pytest.mark.parametrize("algorithm", sorted(UNSEEN))
def test_a_rescaled_momentum_is_not_seen(algorithm: str) -> None:
    setting = bands.SETTINGS[algorithm]
    for problem in bands.problems(algorithm)[:1]:
        clean = score(FaultyPort(algorithm, None), algorithm, setting.hyper, problem, 0)
        fault = FaultyPort(algorithm, UNSEEN[algorithm][0])
        # not equal: epsilon is added to a smaller norm
        assert score(fault, algorithm, setting.hyper, problem, 0) == pytest.approx(clean, rel=1e-3)


class _Still:
    """A port that does nothing, or writes NaN."""

    name: str = "still"
    algorithms: tuple[str, ...] = ("muon", "adamw")

    def __init__(self, value: float) -> None:
        self.value = value

    def driver(self, algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Driver:
        value = self.value

        class _Adds:
            def step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
                for parameter in parameters.values():
                    parameter.add_(value)

        return _Adds()


@pytest.mark.parametrize("value", [0.0, float("nan")], ids=["nothing", "nan"])
def test_a_port_that_does_nothing_fails_every_rule(value: float) -> None:
    result = Gate(parts=("regression",)).run(_Still(value))
    assert {check.algorithm for check in result.failures} == {"muon", "adamw"}


def test_a_port_without_rules_does_not_pass() -> None:
    port = _Still(0.0)
    port.algorithms = ()
    result = Gate().run(port)
    assert not result.passed
    assert set(result.not_claimed) == set(bands.SETTINGS)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="gtp"):
        Gate(parts=("gtp",)).run(OraclePort())


@pytest.mark.parametrize("algorithm", sorted(bands.SETTINGS))
def test_the_shipped_bands_are_the_oracles(algorithm: str) -> None:
    entry = bands._shipped()[algorithm]
    setting = bands.SETTINGS[algorithm]
    assert entry["hyper"] == dict(setting.hyper)
    assert [len(one["scores"]) for one in entry["problems"]] == [bands.SEEDS] * len(PROBLEMS)
    problem = bands.problems(algorithm)[1]
    again = next(iter(bands.measure(algorithm, setting.hyper, problem, 1)))
    stored = next(one["scores"] for one in entry["problems"] if one["problem"]["rows"] == problem.rows)
    assert again == pytest.approx(stored[0], rel=1e-4)


def test_another_convention_is_held_to_bands_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "FEWER_SEEDS", 3)
    problem = bands.problems("muon")[2]
    shipped = bands.band("muon", bands.SETTINGS["muon"].hyper, problem)
    other = bands.band("muon", {"weight_decay": 0.0, "scale": None}, problem)
    assert (shipped.seeds, other.seeds) == (bands.SEEDS, 3)
    assert abs(other.mean - shipped.mean) > 5 * shipped.deviation


@pytest.mark.slow
def test_no_false_alarm_in_twenty_clean_runs() -> None:
    assert clean_runs(range(100, 120)) == []


@pytest.mark.slow
def test_the_whole_gate_passes_on_a_real_gpt() -> None:
    result = Gate(seed=7).run(ProductionPort())
    assert result.passed, [check.why() for check in result.failures]
    assert result.seconds < 120
