"""A sweep as files and as tables: results.json, losses.csv, claims.csv, report.md and the pictures."""

from __future__ import annotations

import csv
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from conformance.convergence.claims import Measured, Verdict, verdicts
from conformance.convergence.contenders import ContenderPort
from conformance.convergence.figures import draw
from conformance.convergence.spread import Interval, interval
from conformance.convergence.sweep import Result
from conformance.convergence.workloads import load


def write(
    folder: Path,
    results: Sequence[Result],
    dropped: Sequence[str],
    unfinished: Sequence[str],
    spectra: Mapping[str, Sequence[float]],
    seconds: float,
) -> dict[str, Any]:
    """Writes every file of the report and returns what results.json holds.

    Args:
        folder: where they go.
        results: of the sweep.
        dropped: names of the tasks that did not fit.
        unfinished: names of the tasks that the deadline cut off.
        spectra: of `spectra.singular_values`; may be empty.
        seconds: of the whole call.
    """
    measured = Measured(results)
    claims = verdicts(measured)
    pictures = draw(measured, spectra, folder)
    content = {
        "seconds": round(seconds, 1),
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": platform.machine(),
        },
        "data": sorted({load(result.task.study.spec).data for result in results}),
        "done": [result.task.name for result in results],
        "dropped": list(dropped),
        "unfinished": list(unfinished),
        "claims": [asdict(one) for one in claims],
        "results": [_entry(measured, result) for result in measured.results],
        "singular_values": {name: list(values) for name, values in spectra.items()},
        "figures": [path.name for path in pictures],
    }
    (folder / "results.json").write_text(json.dumps(_finite(content), indent=1) + "\n")
    _write_csv(folder / "losses.csv", _loss_rows(measured))
    _write_csv(folder / "claims.csv", [asdict(one) for one in claims])
    (folder / "report.md").write_text(_markdown(measured, claims, content))
    return content


def _entry(measured: Measured, result: Result) -> dict[str, Any]:
    study, label = result.task.study, result.task.entry.label
    return {
        "study": study.name,
        "rule": label,
        "setting": measured.setting(study.name),
        "lr": result.tuned.run.lr,
        "hyper": dict(result.tuned.run.hyper),
        "tried": list(result.tuned.tried),
        "at_edge": result.tuned.at_edge,
        "losses": {str(steps): by_seed for steps, by_seed in result.losses.items()},
        "steps_to_target": measured.steps(study.name, label),
        "steps_over_adamw": measured.ratios(study.name, label),
        "step_seconds": result.step_seconds,
        "optimizer_seconds": result.optimizer_seconds,
        "port": result.port,
        "complete": result.complete,
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def _loss_rows(measured: Measured) -> list[dict[str, Any]]:
    return [
        {
            "study": result.task.study.name,
            "rule": result.task.entry.label,
            "batch": result.task.study.batch,
            "width": result.task.study.spec.width,
            "lr": result.tuned.run.lr,
            "steps": steps,
            "seed": seed,
            "held_out_loss": loss,
        }
        for result in measured.results
        for steps, by_seed in result.losses.items()
        for seed, loss in by_seed.items()
    ]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def show(one: Interval, digits: int = 3) -> str:
    """Mean and half width, as tables print it."""
    if not math.isfinite(one.mean):
        return "-"
    half = (one.high - one.low) / 2
    return f"{one.mean:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


INTERVALS = (
    "±: 95% by Student's t. Losses: within seeds, that is, without what a seed (weights, batches) does to all rules "
    "alike. Ratios: seed by seed. Steps: over seeds."
)
FAST = ("dion_dtensor", ContenderPort.name)
"""What took the steps where their time says something."""
COLUMNS = (
    "rule",
    "lr, momentum",
    "held-out loss",
    "steps to AdamW's loss",
    "over AdamW's",
    "ms a step",
    "of it the rule",
)


def _cells(measured: Measured, result: Result) -> tuple[str, ...]:
    study, label = result.task.study.name, result.task.entry.label
    steps = measured.steps(study, label)
    reached = show(interval(list(steps.values())), 0) if steps else "-"
    lr = f"{result.tuned.run.lr:.4g}" + (" (edge)" if result.tuned.at_edge else "")
    hyper = dict(result.tuned.run.hyper)
    momentum = f", mu {hyper['mu']:g}" if "mu" in hyper else ""
    if "betas" in hyper:
        momentum = f", betas {hyper['betas'][0]:g}, {hyper['betas'][1]:g}"
    return (
        label,
        lr + momentum,
        show(measured.within(study)[label]),
        reached,
        show(interval(list(measured.ratios(study, label).values()))) if steps else "-",
        f"{1000 * result.step_seconds:.1f}",
        f"{1000 * result.optimizer_seconds:.1f}" + ("" if result.port in FAST else "*"),
    )


def tables(measured: Measured) -> list[Table]:
    """One table a study, for the terminal."""
    made = []
    for study in dict.fromkeys(result.task.study.name for result in measured.results):
        table = Table(title=f"{study}: {measured.setting(study)}", title_justify="left", box=box.SIMPLE_HEAD)
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if index < 2 else "right")
        for result in measured.results:
            if result.task.study.name == study:
                table.add_row(*_cells(measured, result))
        made.append(table)
    return made


def claims_table(claims: Sequence[Verdict], title: str) -> Table:
    """One row a claim and setting."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("claim", "where", "verdict", "effect, 95% interval"):
        table.add_column(column)
    for one in claims:
        table.add_row(one.claim, one.setting, one.verdict, effect(one))
    return table


def effect(one: Verdict) -> str:
    """The effect with its interval."""
    if not math.isfinite(one.effect):
        return "-"
    return f"{one.effect:.3f} [{one.low:.3f}, {one.high:.3f}] {one.unit}"


def _markdown(measured: Measured, claims: Sequence[Verdict], content: Mapping[str, Any]) -> str:
    lines = [
        "# Convergence sweep",
        "",
        f"Data: {'; '.join(content['data'])}. {content['seconds']:.0f} s.",
        "",
    ]
    lines += ["## Claims", "", "| claim | where | verdict | effect, 95% interval |", "|---|---|---|---|"]
    lines += [f"| {one.claim} | {one.setting} | **{one.verdict}** | {effect(one)} |" for one in claims]
    lines += ["", "## Measurements", ""]
    for study in dict.fromkeys(result.task.study.name for result in measured.results):
        lines += [f"### {study}: {measured.setting(study)}", "", f"| {' | '.join(COLUMNS)} |"]
        lines += ["|" + "---|" * len(COLUMNS)]
        lines += [
            f"| {' | '.join(_cells(measured, result))} |"
            for result in measured.results
            if result.task.study.name == study
        ]
        lines += [""]
    lines += [
        "\\* taken by the float64 oracle's code in float32, or by a variant of it: says nothing about speed.",
        "",
    ]
    lines += [INTERVALS, "", "## Figures", "", *(f"![{name}]({name})" for name in content["figures"]), ""]
    lines += [
        "## Dropped to fit the budget",
        "",
        *(f"- {name}" for name in content["dropped"] or ["nothing"]),
    ]
    lines += [
        "",
        "## Cut off by the deadline",
        "",
        *(f"- {name}" for name in content["unfinished"] or ["nothing"]),
    ]
    return "\n".join(lines) + "\n"
