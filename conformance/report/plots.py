"""The pictures of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from conformance.job.grading import Series
from conformance.job.results import SIMULATED, TRAINED, Row

FLOOR = 1e-18  # where an error of exactly zero is drawn
COLORS = {"adamw": "#4c72b0", "lion": "#dd8452", "muon": "#55a868", "dion": "#8172b3"}
OTHERS, SHOWN, RERUN, BOUND = "#b9c4d0", "#1f4e79", "#e08e0b", "#c0392b"


def draw(rows: Sequence[Row], folder: Path) -> dict[str, Path]:
    """Writes all pictures as PNG into `folder` and returns them by name; none for what was not run."""
    trained = [row for row in rows if row.kind == TRAINED]
    simulated = [row for row in rows if row.kind == SIMULATED]
    made: dict[str, Path] = {}
    for name, some, picture in (
        ("errors", trained, errors_by_step),
        ("losses", trained, losses_by_step),
        ("meshes", simulated, errors_by_mesh),
    ):
        if some:
            figure = picture(some)
            made[name] = folder / f"{name}.png"
            figure.savefig(made[name], dpi=110)
            plt.close(figure)
    return made


def errors_by_step(rows: Sequence[Row]) -> Figure:
    """Update errors by step, one panel an (optimizer, dtype): the worst parameter, its bound, all others."""
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    size = (1.2 + 4.2 * len(dtypes), 1.0 + 2.7 * len(optimizers))
    figure, grid = plt.subplots(
        len(optimizers), len(dtypes), figsize=size, squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for row in rows:
        axes = grid[optimizers.index(row.optimizer)][dtypes.index(row.dtype)]
        axes.set_visible(True)
        _error_panel(axes, row)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes in grid.flat:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for line in grid:
        line[0].set_ylabel("relative error of the update")
    handles: dict[str, Artist] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    columns = {1: 1, 2: 2}.get(len(dtypes), 4)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=columns, frameon=False
    )
    return figure


def _error_panel(axes: Axes, row: Row) -> None:
    worst = max(row.updates, key=lambda one: one.used)
    steps = range(1, len(worst.errors) + 1)
    first = True
    for one in row.updates:
        if one is not worst:
            label = "the others (each with a bound of its own)" if first else None
            axes.plot(steps, _drawable(one.errors), color=OTHERS, lw=0.7, alpha=0.7, label=label)
            first = False
    marker = "o" if len(worst.errors) < 6 else None
    axes.plot(steps, _drawable(worst.errors), color=SHOWN, lw=1.8, marker=marker, ms=3, label=_shown(worst))
    if worst.rerun:
        axes.plot(
            steps,
            _drawable(worst.rerun),
            color=RERUN,
            lw=1.2,
            ls="--",
            label="the oracle rerun in this dtype",
        )
    axes.axhline(worst.bound or FLOOR, color=BOUND, lw=1.2, label="bound of the blue one")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2, high * 4)
    axes.grid(True, which="major", color="#e6e6e6", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{row.optimizer}, {row.dtype}: {'pass' if row.passed else 'FAIL'}"
    axes.set_title(title, fontsize=10, color="black" if row.passed else BOUND, loc="left")
    name = worst.parameter.removesuffix(".weight")
    axes.text(0.99, 0.02, name, transform=axes.transAxes, ha="right", va="bottom", fontsize=7, color=SHOWN)


def _shown(_: Series) -> str:
    return "the parameter closest to its bound (named below)"


def _drawable(errors: Sequence[float]) -> list[float]:
    return [max(error, FLOOR) if math.isfinite(error) else math.nan for error in errors]


def losses_by_step(rows: Sequence[Row]) -> Figure:
    """Training loss by step, one panel a dtype, one line an optimizer."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    size = (1.0 + 4.2 * len(dtypes), 3.4)
    figure, grid = plt.subplots(
        1, len(dtypes), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for axes, dtype in zip(grid[0], dtypes, strict=True):
        for row in (row for row in rows if row.dtype == dtype):
            steps = range(1, len(row.losses) + 1)
            axes.plot(steps, row.losses, lw=1.6, color=COLORS.get(row.optimizer), label=row.optimizer)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(dtype, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(True, color="#e6e6e6", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("training loss, nats a byte")
    grid[0][-1].legend(frameon=False)
    return figure


def errors_by_mesh(rows: Sequence[Row]) -> Figure:
    """Largest update error of one step on each simulated mesh, with its bound."""
    meshes = list(dict.fromkeys(row.mesh for row in rows))
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    figure, axes = plt.subplots(figsize=(8.0, 1.4 + 0.42 * len(meshes)), layout="constrained")
    for place, optimizer in enumerate(optimizers):
        some = [row for row in rows if row.optimizer == optimizer]
        heights = [meshes.index(row.mesh) + 0.16 * (place - (len(optimizers) - 1) / 2) for row in some]
        errors = _drawable([row.own.largest for row in some])
        color = COLORS.get(optimizer)
        axes.plot(errors, heights, "o", color=color, label=optimizer)
        axes.plot([row.own.bound for row in some], heights, "|", color=color, ms=14, mew=2)
    axes.plot([], [], "|", color="black", ms=14, mew=2, label="bound")
    axes.set_yticks(range(len(meshes)), meshes)
    axes.set_ylim(len(meshes) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("relative error of the update, float64")
    axes.grid(True, axis="x", color="#e6e6e6", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
