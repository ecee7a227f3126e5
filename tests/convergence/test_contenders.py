"""Optimizers of a user's own in a sweep: tuned as the others, trained anew when they change, held to Muon."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.cli import app
from conformance.convergence.claims import NOT_SHOWN, SHOWN, Measured, verdicts
from conformance.convergence.drivers import BestPort
from conformance.convergence.job import run_sweep
from conformance.convergence.planning import make_plan
from conformance.convergence.store import Store
from conformance.convergence.studies import ENTRIES, Scale, Study, Task, contender, tasks
from conformance.convergence.sweep import Result, Sweep
from conformance.convergence.tuning import Tuned
from conformance.convergence.workloads import Spec

SAME_AS_MUON = """
import dion_dtensor
import torch


def mine(matrices, mu, weight_decay):
    return dion_dtensor.Muon(matrices, mu=mu, weight_decay=weight_decay, compile=False)


def adaptive(matrices, betas):
    group = {"params": matrices, "algorithm": "adamw", "betas": betas, "weight_decay": 0.0}
    return dion_dtensor.Muon([group], compile=False)


def plain(matrices):
    return torch.optim.SGD([matrix for _, matrix in matrices], lr=1.0)


def idle(matrices):
    return torch.optim.SGD([matrix.detach().clone() for _, matrix in matrices], lr=1.0)


def broken(matrices, learning_rate):
    raise AssertionError("is not reached")


Muon = mine
"""
TINY = Spec(width=32, layers=1, length=8, data="new-testament")
SCALE = Scale(4, 8, (8, 2), 10, (32, 64), TINY, seeds=2, vision_steps=4, images="digits")
STUDY = Study("core", "batch", TINY, 4, 8, seeds=2)


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rules.py").write_text(SAME_AS_MUON)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rules", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own_rules.py"


def test_a_contender_that_is_muon_gets_muons_search_and_losses(tmp_path: Path) -> None:
    sweep = Sweep(Store(tmp_path / "runs"), BestPort())
    own = contender("own_rules:mine")
    assert own.hyper == ENTRIES["Muon"].hyper
    for entry in (ENTRIES["AdamW"], ENTRIES["Muon"], own):
        sweep.do(Task(STUDY, entry))
    _, muon, mine = sweep.results
    assert mine.losses == muon.losses
    assert (mine.tuned.run.lr, mine.tuned.run.hyper) == (muon.tuned.run.lr, muon.tuned.run.hyper)
    assert (muon.port, mine.port) == ("dion_dtensor", "contender")
    found = {one.claim: one for one in verdicts(Measured(sweep.results))}
    assert set(found) == {
        "fewer steps than AdamW to the same loss (Muon)",
        "fewer steps than AdamW to the same loss (mine)",
        "fewer steps than Muon to AdamW's loss: mine",
        "a smaller loss at equal steps than Muon: mine",
    }
    steps = found["fewer steps than Muon to AdamW's loss: mine"]
    loss = found["a smaller loss at equal steps than Muon: mine"]
    assert (steps.verdict, steps.effect, steps.low, steps.high) == (NOT_SHOWN, 1.0, 1.0, 1.0)
    assert (loss.verdict, loss.effect) == (NOT_SHOWN, 0.0)


def test_what_the_function_takes_is_tuned() -> None:
    assert [name for name, _ in contender("own_rules:adaptive").hyper] == ["betas"]
    assert contender("own_rules:plain").hyper == ()


def test_a_changed_module_is_another_contender(module: Path) -> None:
    before = contender("own_rules:mine")
    module.write_text(SAME_AS_MUON + "\n# changed\n")
    after = contender("own_rules:mine")
    assert before.algorithm != after.algorithm
    assert before.label == after.label == "mine"


def _result(label: str, algorithm: str, losses: dict[int, list[float]]) -> Result:
    entry = contender("own_rules:mine") if algorithm == "own" else ENTRIES[label]
    run = STUDY.run(entry, 0.02, 0, 8)
    by_seed = {steps: dict(enumerate(some, 1)) for steps, some in losses.items()}
    return Result(Task(STUDY, entry), Tuned(run, ((0.02, 1.0),), False, 1), by_seed, 1.0, 0.5, "any")


def test_a_better_contender_is_shown_to_be_better() -> None:
    adamw = {4: [4.0, 4.1, 4.2], 8: [3.0, 3.1, 3.2], 16: [2.0, 2.1, 2.2]}
    muon = {4: [3.5, 3.6, 3.7], 8: [2.5, 2.6, 2.7], 16: [1.5, 1.6, 1.7]}
    own = {4: [2.9, 3.0, 3.1], 8: [1.9, 2.0, 2.1], 16: [0.9, 1.0, 1.1]}
    results = [
        _result("AdamW", "adamw", adamw),
        _result("Muon", "muon", muon),
        _result("mine", "own", own),
    ]
    found = {one.claim: one for one in verdicts(Measured(results))}
    steps = found["fewer steps than Muon to AdamW's loss: mine"]
    loss = found["a smaller loss at equal steps than Muon: mine"]
    assert steps.verdict == loss.verdict == SHOWN
    assert steps.effect < 0.8
    assert loss.effect == pytest.approx(-0.6)


def test_contenders_alone_meet_adamw_and_what_is_asked_for() -> None:
    own = contender("own_rules:mine")
    planned = tasks(SCALE, [own], ["NorMuon", "Muon"])
    assert {task.entry.label for task in planned} == {"AdamW", "NorMuon", "Muon", "mine"}
    assert [task.study.name for task in planned[::4]] == [
        "core",
        "width 64",
        "vision transformer",
        "batch 8",
        "batch 2",
    ]


def test_a_study_is_done_with_all_of_them_or_not_at_all() -> None:
    planned = tasks(SCALE, [contender("own_rules:mine")])
    plan = make_plan(planned, lambda task: 60.0, 500.0, clock=lambda: 0.0, together=True)
    assert [task.name for task in plan.taken] == [task.name for task in planned[:6]]
    assert plan.dropped == tuple(planned[6:])
    assert len(make_plan(planned, lambda task: 60.0, 500.0, clock=lambda: 0.0).taken) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contender", "own_rules:nothing"], "has no attribute 'nothing'"),
        (["--contender", "no_such_module:make"], "No module named 'no_such_module'"),
        (["--contender", "own_rules:Muon"], "a rule of the sweep is called Muon"),
        (["--contender", "own_rules:idle"], "left the tall and the wide matrix as it was"),
        (["--contender", "own_rules:broken"], "missing 1 required positional argument: 'learning_rate'"),
        (["--contender", "own_rules:mine", "--against", "Shampoo"], "'Shampoo' is no rule"),
        (["--against", "Muon"], "--against names the rules that a --contender meets"),
        (["--contender", "own_rules:mine"] * 2, "two contenders have functions of the same name"),
    ],
)
def test_what_cannot_contend_is_refused_by_name(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["converge", "--plan", *arguments], env={"COLUMNS": "400"})
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", "").split())


def test_a_sweep_with_a_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [contender("own_rules:plain")]
    folder = tmp_path / "sweep"
    one = Scale(4, 8, (), 10, (32,), TINY, seeds=2, vision_steps=4, images="missing")
    assert run_sweep(one, folder, None, "cpu", contenders=entries) == 0
    said = capsys.readouterr().out
    assert "What the contenders show, here" in said
    content = json.loads((folder / "results.json").read_text())
    assert [row["rule"] for row in content["results"]] == ["AdamW", "Muon", "plain"]
    assert "plain" in (folder / "report.md").read_text()
    assert content["singular_values"] == {}


def test_a_plan_alone_leaves_nothing_behind(tmp_path: Path) -> None:
    arguments = ["converge", "--plan", "--width", "32", "--layers", "1", "--budget", "0.1", "--text"]
    done = CliRunner().invoke(app, [*arguments, "new-testament"])
    assert done.exit_code == 0
    assert "plan: " in done.output
    assert not (tmp_path / "converge").exists()


def test_the_gate_says_where_other_ports_are_held_to_it() -> None:
    done = CliRunner().invoke(app, ["converge", "gate", "--port", "mine:adapter"], env={"COLUMNS": "300"})
    assert done.exit_code == 2
    assert "conformance port MODULE:NAME --level L5" in " ".join(done.output.replace("│", "").split())
