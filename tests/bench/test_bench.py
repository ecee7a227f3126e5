"""The benchmark measures what it says; no test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.bench.contenders import BARE, OURS, UNCHECKED, Case, available, stepper
from conformance.bench.growth import slope
from conformance.bench.measure import measure
from conformance.bench.products import flops
from conformance.cli import app


def test_the_command_measures_in_pairs(tmp_path: Path) -> None:
    numbers, page = tmp_path / "bench.json", tmp_path / "bench.md"
    arguments = ["--algorithm", "adamw", "--shape", "2x16x24", "--rounds", "2", "--json", str(numbers)]
    result = CliRunner().invoke(app, ["bench", *arguments, "--page", str(page)])
    assert result.exit_code == 0, result.output
    ours, unchecked, peer = json.loads(numbers.read_text())["steps"]
    assert [e["name"] for e in (ours, unchecked, peer)] == [OURS, UNCHECKED, "torch.optim.AdamW(fused)"]
    assert len(ours["steps"]) == len(peer["steps"]) == 2
    assert peer["ratios"] == [a / b for a, b in zip(ours["steps"], peer["steps"], strict=True)]
    assert "| adamw, 2 x 16x24, float32 |" in page.read_text()


def test_a_contender_that_fails_does_not_stop_the_others() -> None:
    entries = measure(Case("adamw", 2, (8, 8)), 1, names=["nobody", OURS], memory=False)
    assert "nobody" in entries[0].failure
    assert len(entries[1].steps) == 1


def test_bare_products_have_the_flops_of_theory() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for algorithm, part in (("muon", 1.0), ("dion2", 0.25), ("dion3", 0.25)):
        step = stepper(BARE, Case(algorithm, 3, (32, 64)))
        with FlopCounterMode(display=False) as counter:
            step()
        assert counter.get_total_flops() == flops(algorithm, 3, (32, 64), part)


def test_slope_of_a_power() -> None:
    assert slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_peers_are_those_that_can_be_imported() -> None:
    assert available(Case("muon_torch", 1, (4, 4))) == (OURS, "torch.optim.Muon", BARE)
    assert available(Case("adamw", 1, (4, 4))) == (OURS, UNCHECKED, "torch.optim.AdamW(fused)")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", "2x16"],
        ["--shape", "0x4x4"],
        ["--algorithm", "sgd"],
        ["--compute-dtype", "int8"],
        ["--device", "x"],
    ],
)
def test_bad_input_is_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
