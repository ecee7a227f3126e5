"""Sweeps: planned to fit, resumed after a kill, finished in time, and reported with what was dropped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from conformance.convergence.claims import Measured, verdicts
from conformance.convergence.drivers import BestPort
from conformance.convergence.job import key, run_sweep
from conformance.convergence.planning import Clock, Plan, make_plan
from conformance.convergence.progress import Monitor
from conformance.convergence.store import Store
from conformance.convergence.studies import ENTRIES, SCALES, Scale, Study, Task, tasks
from conformance.convergence.sweep import Result, Sweep
from conformance.convergence.training import Outcome, Run, Trainer
from conformance.convergence.tuning import Tuned
from conformance.convergence.workloads import Spec

TINY = Spec(width=32, layers=1, length=8, data="new-testament")
SCALE = Scale(4, 8, (8, 2), 10, (32, 64), TINY, seeds=2, vision_steps=4, images="digits")
STUDY = Study("core", "batch", TINY, 4, 8, seeds=2)
MUON = Task(STUDY, ENTRIES["Muon"])
ADAMW = Task(STUDY, ENTRIES["AdamW"])


def test_a_plan_fits_and_names_what_it_drops() -> None:
    every = tasks(Scale())
    plan = make_plan(every, lambda task: 60.0, 600.0, clock=lambda: 0.0)
    assert plan.total <= 600
    assert len(plan.taken) == 9
    assert set(plan.taken) | set(plan.dropped) == set(every)


def test_a_plan_without_a_budget_takes_everything() -> None:
    every = tasks(Scale())
    assert make_plan(every, lambda task: 1e9, None).taken == tuple(every)


def test_nothing_that_needs_a_reference_is_taken_without_it() -> None:
    plan = make_plan(
        tasks(Scale()), lambda task: 1e9 if task.entry.algorithm == "adamw" else 1.0, 100.0, clock=lambda: 0.0
    )
    assert not any(task.study.with_steps for task in plan.taken)


def test_the_plan_covers_what_the_claims_need() -> None:
    every = tasks(Scale())
    labels = {task.entry.label for task in every}
    for rule in ("AdamW", "Lion", "Muon", "NorMuon"):
        assert rule in labels
    for mark in ("1", "1/2", "1/4", "1/8", "1/16"):
        assert {f"Dion {mark}", f"Orth-Dion {mark}"} <= labels
    for mark in ("1", "1/2", "1/4", "1/8"):
        assert {f"Dion2 {mark}", f"Dion3 {mark}"} <= labels
    batches = {task.study.batch for task in every if task.study.kind == "batch"}
    assert max(batches) / min(batches) >= 100
    # or a trend over the batch size would be one over the steps as well
    assert len({task.study.steps for task in every if task.study.kind == "batch"}) == 1
    assert {64, 128, 256, 384} <= {task.study.spec.width for task in every}
    assert {"vit", "resnet", "gpt"} == {task.study.spec.kind for task in every}
    assert len({key(task) for task in every}) == len(every)


def test_the_recipe_of_the_160m_preset() -> None:
    scale = SCALES["160m"]
    assert (scale.spec.width, scale.spec.layers, scale.spec.heads, scale.spec.length) == (768, 12, 6, 1024)
    assert (scale.core_batch, scale.core_steps, scale.schedule) == (1024, 3000, "trapezoid")
    assert all(task.study.schedule == "trapezoid" for task in tasks(scale))


class _KilledError(Exception):
    pass


def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    trained: list[Run] = []

    def count(run: Run, outcome: Outcome, fresh: bool) -> None:
        if fresh:
            trained.append(run)
        if len(trained) == limit:
            raise _KilledError

    limit = -1
    whole = Sweep(Store(tmp_path / "whole"), BestPort(), on_run=count).do(MUON)
    total = len(trained)
    trained.clear()
    limit = 4
    with pytest.raises(_KilledError):
        Sweep(Store(tmp_path / "cut"), BestPort(), on_run=count).do(MUON)
    first = list(trained)
    trained.clear()
    limit = -1
    resumed = Sweep(Store(tmp_path / "cut"), BestPort(), on_run=count).do(MUON)
    assert not set(first) & set(trained)
    assert len(first) + len(trained) == total
    assert whole is not None
    assert resumed is not None
    assert (resumed.tuned, resumed.losses) == (whole.tuned, whole.losses)


def test_a_search_begins_where_one_on_the_same_kind_of_model_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[float] = []

    def found(run: Run, loss: object, start: float) -> Tuned:
        began.append(start)
        return Tuned(replace(run, lr=2 * start), ((start, 1.0),), False, 1)

    monkeypatch.setattr("conformance.convergence.sweep.tune", found)
    sweep = Sweep(Store(tmp_path), BestPort())
    monkeypatch.setattr(sweep, "outcome", lambda run: Outcome((1.0,), 1.0, 0.1, 0.1, "x"))
    images = replace(STUDY, name="images", spec=replace(STUDY.spec, kind="vit"))
    wide = replace(STUDY, name="wide", kind="width")
    for study in (STUDY, images, wide, replace(STUDY, name="batch 2"), replace(wide, name="wider")):
        sweep.do(Task(study, ENTRIES["Muon"]))
    start = ENTRIES["Muon"].start
    assert began == [start, start, 2 * start, 2 * start, 4 * start]


def test_a_file_cut_off_in_the_middle_is_trained_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = STUDY.run(MUON.entry, 0.02, 0, 2)
    store.put(run, Outcome((2.0, 1.0), 1.0, 0.1, 0.1, "x"))
    assert store.get(run) == Outcome((2.0, 1.0), 1.0, 0.1, 0.1, "x")
    file = tmp_path / "runs" / f"{run.key}.json"
    file.write_text(file.read_text()[:40])
    assert store.get(run) is None
    store.put(run, Outcome((2.0,), float("inf"), 0.1, 0.1, "x"))
    found = store.get(run)
    assert found is not None
    assert found.held_out == float("inf")


def test_nothing_is_started_that_would_pass_the_deadline(tmp_path: Path) -> None:
    sweep = Sweep(Store(tmp_path), BestPort(), deadline=time.monotonic() + 100, seconds_of=lambda run: 1000.0)
    assert sweep.do(MUON) is None
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_that_is_slower_than_foreseen_is_given_up(tmp_path: Path) -> None:
    sweep = Sweep(Store(tmp_path), BestPort(), deadline=time.monotonic() - 1, seconds_of=lambda run: -2.0)
    assert sweep.do(MUON) is None
    assert not list((tmp_path / "runs").iterdir())


def test_the_target_is_bracketed_for_every_seed(tmp_path: Path) -> None:
    sweep = Sweep(Store(tmp_path), BestPort())
    for task in (ADAMW, MUON):
        result = sweep.do(task)
        assert result is not None
        assert 0 not in {seed for by_seed in result.losses.values() for seed in by_seed}  # the search's seed
    measured = Measured(sweep.results)
    target = measured.target("core")
    assert target is not None
    for result in sweep.results:
        smallest, largest = min(result.losses), max(result.losses)
        if smallest > 8 // 4 + 1:  # not at the end of what is tried
            assert all(loss > target for loss in result.losses[smallest].values())
        if largest < 20:
            assert all(loss <= target for loss in result.losses[largest].values())


def _result(study: Study, label: str, losses: dict[int, dict[int, float]]) -> Result:
    task = Task(study, ENTRIES[label])
    run = study.run(task.entry, 0.02, 0, study.steps)
    return Result(task, Tuned(run, ((0.02, 1.0),), False, 3), losses, 0.01, 0.001, "x")


def test_verdicts_from_made_up_losses() -> None:
    large = replace(STUDY, name="batch 400", batch=400)
    seeds = (1, 2, 3)

    def curve(factor: float) -> dict[int, dict[int, float]]:
        # straight in the logarithm of the steps, so that the interpolation is exact
        return {s: {i: 3 - 0.1 * math.log2(s / factor) + 1e-4 * i for i in seeds} for s in (2, 4, 8, 16)}

    results = [
        _result(STUDY, "AdamW", curve(1.0)),
        _result(STUDY, "Muon", curve(0.8)),
        _result(STUDY, "Dion 1", curve(1.3)),
        _result(STUDY, "Dion 1/4", curve(4.0)),
        _result(large, "AdamW", curve(1.0)),
        _result(large, "Muon", curve(0.6)),
    ]
    found = {(one.claim, one.setting): one for one in verdicts(Measured(results))}
    by_claim = {claim: one.verdict for (claim, _), one in found.items()}
    assert by_claim["fewer steps than AdamW to the same loss (Muon)"] == "shown"
    assert by_claim["fewer steps than AdamW to the same loss (Dion 1)"] == "contradicted at this scale"
    assert by_claim["the margin over AdamW grows with the batch size (Muon)"] == "shown"
    assert by_claim["error feedback pays"] == "not measured"
    core = found["fewer steps than AdamW to the same loss (Muon)", Measured(results).setting("core")]
    assert core.effect == pytest.approx(0.8, rel=1e-6)
    assert core.low <= core.effect <= core.high
    near = [one for (claim, _), one in found.items() if claim.startswith("a quarter of the rank")]
    assert [one.verdict for one in near] == ["contradicted at this scale"]


def test_a_seed_that_never_gets_there_is_not_left_out() -> None:
    def curve(shifts: dict[int, float]) -> dict[int, dict[int, float]]:
        return {s: {i: 3 - 0.1 * math.log2(s) + shift for i, shift in shifts.items()} for s in (2, 4, 8, 16)}

    even = {1: 0.0, 2: 1e-4, 3: 2e-4, 4: 3e-4}
    results = [
        _result(STUDY, "AdamW", curve(even)),
        _result(STUDY, "Muon", curve({1: -0.1, 2: -0.1, 3: 5.0, 4: 5.0})),
    ]
    (found,) = (one for one in verdicts(Measured(results)) if one.claim.startswith("fewer steps"))
    assert found.verdict == "not shown at this scale"
    assert found.setting.endswith("2 of 4 seeds never reached it")


@pytest.mark.parametrize(("spread", "verdict"), [(0.01, "shown"), (0.5, "not shown at this scale")])
def test_a_trend_is_shown_only_if_the_ends_do_not_overlap(spread: float, verdict: str) -> None:
    """Each seed's ratio falls alike; what the seeds differ by decides."""
    studies = [replace(STUDY, name=f"batch {batch}", batch=batch) for batch in (4, 40, 400)]

    def curve(factor: float) -> dict[int, dict[int, float]]:
        shifts = {i: spread * (i - 2) for i in (1, 2, 3)}
        return {
            s: {i: 3 - 0.1 * (math.log2(s / factor) - shift) for i, shift in shifts.items()}
            for s in (2, 4, 8, 16, 32)
        }

    flat = {s: {i: 3 - 0.1 * math.log2(s) for i in (1, 2, 3)} for s in (2, 4, 8, 16, 32)}
    results = [_result(study, "AdamW", flat) for study in studies]
    results += [_result(s, "Muon", curve(f)) for s, f in zip(studies, (0.9, 0.75, 0.6), strict=True)]
    (found,) = (one for one in verdicts(Measured(results)) if "grows with the batch" in one.claim)
    assert found.verdict == verdict
    assert found.high < 1


def test_a_trend_with_a_seed_that_never_gets_there_is_not_shown() -> None:
    studies = [replace(STUDY, name=f"batch {batch}", batch=batch) for batch in (4, 40, 400)]
    budgets, seeds = (2, 4, 8, 16, 32), (1, 2, 3)
    curve = {s: {i: 3 - 0.1 * math.log2(s) + 1e-4 * i for i in seeds} for s in budgets}
    never = {s: {**by_seed, 2: 5.0} for s, by_seed in curve.items()}
    results = [_result(study, "AdamW", curve) for study in studies]
    results += [_result(s, "Muon", never if s.batch == 40 else curve) for s in studies]
    (found,) = (one for one in verdicts(Measured(results)) if "grows with the batch" in one.claim)
    assert found.verdict == "not shown at this scale"


def test_step_times_are_measured_once() -> None:
    clock = Clock(BestPort())
    first = clock.step(MUON)
    known = dict(clock.known)
    assert first > 0
    assert clock.step(MUON) == first
    assert clock.known == known
    assert clock.seconds(MUON) > 8 * 10 * first  # the search and the seeds


def _time_of_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Callable[[], float]:
    """A clock on which a training step takes so long and nothing else takes any time."""
    taken = [0.0]
    really = Trainer.step

    def step(trainer: Trainer, number: int) -> float:
        taken[0] += seconds
        return really(trainer, number)

    monkeypatch.setattr(Trainer, "step", step)
    return lambda: taken[0]


def _with_step_times(folder: Path, seconds: float, scale: Scale = SCALE) -> None:
    known: dict[str, float] = {}
    for task in tasks(scale):
        run = task.study.run(task.entry, 1e-4, 0, 1000)
        known[Clock.model_key(run)] = known[Clock.rule_key(run)] = seconds / 2
    Store(folder).write("step_times.json", {"cpu": known})


def test_a_budget_is_kept_and_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_step_times(tmp_path, 0.06)
    clock = _time_of_steps(monkeypatch, 0.05)
    scale = replace(SCALE, vision_steps=80, batches=(8, 2))  # one task fits
    assert run_sweep(scale, tmp_path, 0.25, "cpu", now=clock) == 0
    assert clock() <= 15
    content = json.loads((tmp_path / "results.json").read_text())
    assert "core: AdamW" in content["done"]
    assert not content["unfinished"]
    assert content["dropped"]
    for name in ("losses.csv", "claims.csv", "report.md", *content["figures"]):
        assert (tmp_path / name).stat().st_size > 100
    report = (tmp_path / "report.md").read_text()
    assert all(name in report for name in content["dropped"])
    assert {one["verdict"] for one in content["claims"]} <= {
        "shown", "not shown at this scale", "contradicted at this scale", "not measured"
    }  # fmt: skip


def test_a_teacher_is_learned_where_there_are_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = replace(SCALE, spec=Spec("teacher", 32), vision_steps=80)
    _with_step_times(tmp_path, 0.02, scale)
    assert run_sweep(scale, tmp_path, 0.4, "cpu", now=_time_of_steps(monkeypatch, 0.01)) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert {"core: AdamW", "core: Muon", "core: Dion 1/4", "core: Dion 1"} <= set(content["done"])
    near = [one for one in content["claims"] if one["claim"].startswith("a quarter of the rank")]
    assert near[0]["unit"] == "squared error above Dion 1"
    assert "singular_values.png" in content["figures"]


def test_what_a_slow_machine_cuts_off_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_step_times(tmp_path, 0.05)
    clock = _time_of_steps(monkeypatch, 0.5)
    assert run_sweep(SCALE, tmp_path, 0.25, "cpu", now=clock) == 1
    assert clock() <= 15
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["done"] == []
    assert "core: AdamW" in content["unfinished"]
    assert "cut off by the deadline: core: AdamW" in capsys.readouterr().out


def test_what_was_finished_before_says_nothing_about_speed() -> None:
    """A resumed sweep may have to train more for such a task; its slowness once cut off all that came after."""
    times = iter([0.0, 0.0, 100.0, 100.0, 120.0])
    first, second = MUON, ADAMW
    plan = Plan((first, second), (), {first.name: 0.0, second.name: 10.0}, None)
    monitor = Monitor(Console(quiet=True), plan, lambda: next(times, 120.0))
    monitor.start(first)
    monitor.done(first, None)
    assert monitor.slowness == 1.0
    monitor.start(second)
    monitor.done(second, None)
    assert monitor.slowness == 2.0
