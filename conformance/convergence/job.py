"""The sweep from the command line to the exit status: plan, run, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from rich.console import Console

from conformance.convergence import output
from conformance.convergence.claims import Measured, verdicts
from conformance.convergence.drivers import BestPort, ProductionPort
from conformance.convergence.planning import Clock, Plan, make_plan
from conformance.convergence.progress import Monitor
from conformance.convergence.spectra import singular_values
from conformance.convergence.store import Store
from conformance.convergence.studies import Entry, Scale, Task, tasks
from conformance.convergence.sweep import Result, Sweep
from conformance.convergence.terminal import make_console
from conformance.convergence.training import Run
from conformance.convergence.workloads import load

FIGURE_SECONDS = 25.0
"""For the singular values and the pictures, at the end of a budget."""


def run_sweep(
    scale: Scale,
    folder: Path,
    budget: float | None,
    device: str,
    *,
    contenders: Sequence[Entry] = (),
    against: Sequence[str] = ("Muon",),
    plan_only: bool = False,
    json_file: Path | None = None,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Plans a sweep, does it and reports it.

    Args:
        scale: its sizes.
        folder: of the runs and the report.
        budget: minutes for this call; None for no limit. Runs that are in the folder already cost nothing.
        device: "cpu" or "cuda".
        contenders, against: see `studies.tasks`.
        plan_only: print the plan and stop.
        json_file: where the results go as well.
        now: the clock the budget is kept by, in seconds.

    Returns:
        The exit status: 0 if all that was planned was done, 1 if the deadline cut something off or nothing could be
        measured, 130 interrupted.
    """
    began = now()
    console = make_console()
    seconds = budget * 60 if budget is not None else None
    try:
        store = Store(folder)
    except OSError as error:
        console.print(f"cannot write to {folder}: {error}", style="red", markup=False, highlight=False)
        return 1
    port = BestPort(production=ProductionPort(compile=device == "cuda"))
    clock = Clock(port, device, dict((store.read("step_times.json") or {}).get(device, {})))
    finished = (store.read("finished.json") or {}).get("tasks", [])
    wanted = [task for task in tasks(scale, contenders, against) if _available(task, console)]
    with console.status("measuring step times"):
        plan = make_plan(
            wanted,
            lambda task: 0.0 if key(task) in finished else clock.seconds(task),
            seconds,
            now,
            together=bool(contenders),
        )
    store.write("step_times.json", {device: clock.known})
    _show_plan(console, plan)
    if plan_only:
        return 0
    deadline = None if seconds is None else began + seconds - min(FIGURE_SECONDS, 0.1 * seconds)
    with Monitor(console, plan, now) as monitor:
        sweep = Sweep(
            store,
            port,
            device,
            torch.bfloat16 if device == "cuda" else None,
            deadline,
            on_run=monitor.on_run,
            seconds_of=lambda run: _expected(clock, run) * monitor.slowness,
            now=now,
        )
        try:
            further = [] if contenders else list(plan.dropped)
            unfinished = _do(sweep, plan, further, store, finished, monitor)
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on from here", highlight=False)
            return 130
    spectra = _spectra(scale, sweep.results, port) if sweep.results and not contenders else {}
    done = [result.task.name for result in sweep.results]
    dropped = [task.name for task in plan.dropped if task.name not in done]
    content = output.write(folder, sweep.results, dropped, unfinished, spectra, now() - began)
    if json_file is not None:
        shutil.copyfile(folder / "results.json", json_file)
    measured = Measured(sweep.results)
    for table in output.tables(measured):
        console.print(table)
    title = "What the contenders show, here" if contenders else "The public claims, here"
    console.print(output.claims_table(verdicts(measured), title))
    for name in unfinished:
        console.print(f"cut off by the deadline: {name}", highlight=False)
    console.print(
        f"{len(done)} tasks in {content['seconds']:.0f} s ({len(plan.taken)} planned); {folder / 'report.md'}",
        highlight=False,
        soft_wrap=True,
    )
    return 0 if sweep.results and not unfinished else 1


def key(task: Task) -> str:
    """A name for the task that changes with every number in it."""
    return sha256(repr((asdict(task.study), asdict(task.entry))).encode()).hexdigest()[:16]


def _do(
    sweep: Sweep, plan: Plan, further: list[Task], store: Store, finished: list[str], monitor: Monitor
) -> list[str]:
    unfinished: list[str] = []
    waiting = list(plan.taken)
    while waiting or further:
        if not waiting:
            # all done, and time left: a task that had been dropped may fit after all
            task = further.pop(0)
            if unfinished or not _fits(task, plan, sweep, monitor):
                continue
            monitor.add(task)
        else:
            task = waiting.pop(0)
        monitor.start(task)
        result = sweep.do(task)
        monitor.done(task, result)
        if result is None or not result.complete:
            unfinished.append(task.name)
        elif key(task) not in finished:
            finished.append(key(task))
            store.write("finished.json", {"tasks": finished})
    return unfinished


def _fits(task: Task, plan: Plan, sweep: Sweep, monitor: Monitor) -> bool:
    """True if there is time for a dropped task, its study's reference is done, and its time was measured."""
    expected = plan.seconds.get(task.name)
    reference = not task.study.with_steps or task.entry.algorithm == "adamw"
    reference = reference or any(
        r.task.study == task.study and r.task.entry.algorithm == "adamw" for r in sweep.results
    )
    if expected is None or not reference or sweep.deadline is None:
        return False
    return sweep.now() + 1.1 * expected * monitor.slowness < sweep.deadline


def _available(task: Task, console: Console) -> bool:
    """False where a package or the data are missing; said once a study."""
    try:
        load(task.study.spec)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        if task.entry.label == "AdamW":
            console.print(
                f"{task.study.name} left out: {error}", markup=False, highlight=False, soft_wrap=True
            )
        return False
    return True


def _expected(clock: Clock, run: Run) -> float:
    """Seconds of a run by the measured step times; 0 if its parts were not measured."""
    model = clock.known.get(clock.model_key(run), 0.0)
    return run.steps * (model + clock.known.get(clock.rule_key(run), 0.0))


def _spectra(scale: Scale, results: Sequence[Result], port: BestPort) -> Mapping[str, Sequence[float]]:
    rates = [r.tuned.run.lr for r in results if r.task.study.name == "core" and r.task.entry.label == "Muon"]
    batch = min(scale.core_batch, 64)
    return singular_values(port, scale.spec, batch, rates[0]) if rates and scale.spec.width <= 256 else {}


def _show_plan(console: Console, plan: Plan) -> None:
    limit = "no limit" if plan.budget is None else f"budget {plan.budget / 60:g} min"
    console.print(
        f"plan: {len(plan.taken)} tasks, about {plan.total / 60:.1f} min ({limit})", highlight=False
    )
    for word, some in (("do", plan.taken), ("drop", plan.dropped)):
        by_study: dict[str, list[str]] = {}
        for task in some:
            by_study.setdefault(task.study.name, []).append(task.entry.label)
        for study, labels in by_study.items():
            console.print(f"  {word} {study}: {', '.join(labels)}", highlight=False, soft_wrap=True)
