"""The benchmark measures what it says; no test asserts a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from conformance.bench import growth, worker
from conformance.bench.contenders import BARE, OURS, UNCHECKED, Case, available, stepper
from conformance.bench.growth import RANKS, Line, sent_lines, slope
from conformance.bench.measure import measure
from conformance.bench.page import draw_growth, markdown
from conformance.bench.products import flops
from conformance.bench.traffic import sent, traffic
from conformance.cli import app


def test_the_command_measures_in_pairs(tmp_path: Path) -> None:
    numbers, page = tmp_path / "bench.json", tmp_path / "bench.md"
    arguments = ["--algorithm", "adamw", "--shape", "2x16x24", "--rounds", "2", "--json", str(numbers)]
    result = CliRunner().invoke(app, ["bench", *arguments, "--page", str(page)])
    assert result.exit_code == 0, result.output
    assert "ours / it: our step over this one's, median (and quartiles) of the rounds" in result.output
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


def test_bytes_grow_with_the_ranks_as_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "PROCESSES", (2, 4))
    (line,) = sent_lines(Case("muon", 1, (512, 768), compute_dtype="bfloat16"), ["muon"])
    assert (line.quantity, line.values) == (RANKS, (2, 4))
    # Half of a rank's half, then three quarters of its quarter: there and back; what the ranks agree on is little.
    assert line.expected == pytest.approx([4 * 512 * 768 * 2 * 2 * part for part in (1 / 4, 3 / 16)])
    assert line.measured == pytest.approx(line.expected, rel=0.01)
    assert line.slope == pytest.approx(-0.41, abs=0.01)


def test_growth_is_drawn_and_written(tmp_path: Path) -> None:
    lines = [
        Line("muon", "N", (2, 4, 8), (0.2, 0.4, 0.8), (10.0, 20.0, 40.0)),
        Line("muon", RANKS, (2, 4), (4e6, 3e6), (4e6, 3e6)),
    ]
    draw_growth(lines, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    page = markdown([], lines, [], {}, "conformance bench", "growth.png")
    assert "| muon | N | 2, 4, 8 | 1.00 | 1.00 |" in page
    assert "| muon | ranks | 2, 4 | -0.42 | -0.42 |" in page


def test_peers_are_those_that_can_be_imported() -> None:
    assert available(Case("muon_torch", 1, (4, 4))) == (OURS, "torch.optim.Muon", BARE)
    assert available(Case("adamw", 1, (4, 4))) == (OURS, UNCHECKED, "torch.optim.AdamW(fused)")


OWN = """
import torch
from conformance.bench.contenders import Case


def plain(named: list[tuple[str, torch.Tensor]], case: Case) -> torch.optim.Optimizer:
    assert case.shape == tuple(named[0][1].shape)
    assert named[1][0] == "layers.1.weight"
    return torch.optim.SGD([parameter for _, parameter in named], lr=0.1)
"""


def test_an_optimizer_of_ones_own_is_a_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_contender.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = "own_contender:plain"
    arguments = ["--algorithm", "adamw", "--shape", "2x16x8", "--rounds", "1", "--json", "found.json"]
    result = CliRunner().invoke(app, ["bench", *arguments, "--contender", own])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())["steps"]
    (timed,) = (one for one in found if one["name"] == own)
    assert timed["median"] > 0
    (counted,) = traffic(Case("muon", 2, (16, 8)), 2, names=(), further=(own,))
    assert (counted.name, counted.bytes, counted.failure) == (own, 0, "")
    for name, message in (
        ("nowhere_at_all:x", "No module named"),
        ("own_contender:none", "no attribute 'none'"),
    ):
        refused = CliRunner().invoke(app, ["bench", "--contender", name])
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.replace("│", " ").split())


def test_bytes_are_those_of_the_formula() -> None:
    """Muon's matrices go to a rank and back: three quarters of a rank's share on four ranks, twice."""
    (ours,) = [
        one for one in traffic(Case("muon", 8, (64, 32), compute_dtype="bfloat16"), 4) if one.name == OURS
    ]
    assert ours.failure == ""
    agreement = 2 * 3 / 4 * 256 * 8  # a block of numbers, reduced over all ranks
    assert ours.bytes == 2 * 3 / 4 * 8 * 64 * 32 / 4 * 2 + agreement
    assert ours.collectives == 3


def test_a_reduce_scatter_counts_as_it_was_asked_for() -> None:
    def event(name: str, shape: list[int]) -> Any:
        kinds = ["float", "", "Scalar", ""]
        return SimpleNamespace(name=lambda: name, shapes=lambda: [shape, [], []], dtypes=lambda: kinds)

    scattered = [event("_c10d_functional::reduce_scatter_tensor", [8, 5]), event("gloo:all_reduce", [8, 5])]
    assert sent(scattered, 4) == (3 / 4 * 8 * 5 * 4, 1)
    lists = SimpleNamespace(
        name=lambda: "gloo:all_to_all", shapes=lambda: [[2, 5]] * 4, dtypes=lambda: ["c10::BFloat16"] * 4
    )
    assert sent([lists, event("aten::mm", [8, 5])], 4) == (3 / 4 * 4 * 2 * 5 * 2, 1)


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


def test_a_turn_is_one_step_or_the_median_of_several_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([worker.TURN + 1, 9.0 * worker.TURN / 10, 0.05 * worker.TURN, 0.06 * worker.TURN])
    monkeypatch.setattr(worker, "timed", lambda *_: next(seconds))
    assert worker._turn(lambda: None, "cpu") == worker.TURN + 1
    assert worker._turn(lambda: None, "cpu") == pytest.approx(0.06 * worker.TURN)
