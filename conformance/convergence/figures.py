"""The pictures of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from conformance.convergence.claims import Measured, gaps_by_width
from conformance.convergence.spread import Interval, interval

COLORS = {
    "AdamW": "#4c72b0",
    "Lion": "#dd8452",
    "Muon": "#55a868",
    "NorMuon": "#1b7837",
    "Dion": "#8172b3",
    "Dion without error feedback": "#c0392b",
    "Orth-Dion": "#da70d6",
    "Dion2": "#937860",
    "Dion3": "#e08e0b",
}
FRACTIONS = {"1": 1.0, "1/2": 0.5, "1/4": 0.25, "1/8": 0.125, "1/16": 0.0625}


def draw(measured: Measured, spectra: Mapping[str, Sequence[float]], folder: Path) -> list[Path]:
    """Writes every picture for which there are results, as PNG.

    Args:
        measured: the results.
        spectra: of `spectra.singular_values`; empty for no such picture.
        folder: where they go.

    Returns:
        The files.
    """
    made = []
    for name, figure in (
        ("steps_by_batch", steps_by_batch(measured)),
        ("steps", steps(measured)),
        ("loss_by_fraction", loss_by_fraction(measured)),
        ("error_feedback", error_feedback(measured)),
        ("width", width_trend(measured)),
        ("singular_values", singular_values(spectra) if spectra else None),
    ):
        if figure is not None:
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=120)
            plt.close(figure)
    return made


def family(label: str) -> str:
    """The label without its fraction."""
    head, _, tail = label.rpartition(" ")
    return head if tail in FRACTIONS else label


def color(label: str) -> str:
    """One colour a family of rules."""
    return COLORS.get(family(label), "#333333")


def _clean(axes: Axes) -> None:
    axes.grid(True, color="#e6e6e6", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(one: Interval) -> tuple[float, float]:
    return one.mean - one.low, one.high - one.mean


def _ratio(measured: Measured, study: str, label: str) -> Interval | None:
    """Steps over AdamW's; None for AdamW, for fewer than two seeds, and where a seed never got there."""
    one = interval(list(measured.ratios(study, label).values()))
    return one if label != "AdamW" and one.count >= 2 and math.isfinite(one.mean) else None


def steps_by_batch(measured: Measured) -> Figure | None:
    """Steps to AdamW's loss over AdamW's steps, against the batch size."""
    studies = sorted(measured.studies("batch"), key=measured.batch_of)
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    drawn, batches = 0, set()
    for label in dict.fromkeys(r.task.entry.label for r in measured.results):
        points = [
            (measured.batch_of(study), one)
            for study in studies
            if (one := _ratio(measured, study, label)) is not None
        ]
        if len(points) < 2:
            continue
        drawn += 1
        batches |= {batch for batch, _ in points}
        shift = 1.0 + 0.02 * drawn
        errors = list(zip(*(_bars(one) for _, one in points), strict=True))
        axes.errorbar(
            [b * shift for b, _ in points],
            [one.mean for _, one in points],
            yerr=errors,
            marker="o",
            capsize=4,
            color=color(label),
            label=label,
        )
    if not drawn:
        plt.close(figure)
        return None
    axes.axhline(1.0, color=COLORS["AdamW"], lw=1.4, label="AdamW")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(batches)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(batch) for batch in sorted(batches)])
    budgets = sorted({measured.budget_of(study) for study in studies})
    axes.set_xlabel(f"sequences in a batch; both sides tuned at {', '.join(map(str, budgets))} steps")
    axes.set_ylabel("steps to AdamW's loss, over AdamW's steps")
    axes.set_title(
        f"{measured.workload(studies[0])}. Below 1: fewer steps than AdamW. Bars: 95% intervals over seeds.",
        fontsize=9,
        loc="left",
    )
    axes.legend(frameon=False)
    _clean(axes)
    return figure


def steps(measured: Measured) -> Figure | None:
    """Steps over AdamW's for every rule of every study."""
    rows = [
        (study, label, one)
        for study in measured.studies("batch", "vision")
        for label in dict.fromkeys(r.task.entry.label for r in measured.results if r.task.study.name == study)
        if (one := _ratio(measured, study, label)) is not None
    ]
    if not rows:
        return None
    order = [*sorted(measured.studies("batch"), key=measured.batch_of), *measured.studies("vision")]
    rows.sort(key=lambda row: (order.index(row[0]), row[2].mean))
    figure, axes = plt.subplots(figsize=(8.4, 1.4 + 0.27 * len(rows)), layout="constrained")
    for place, (_, label, one) in enumerate(rows):
        low, high = _bars(one)
        axes.errorbar(one.mean, place, xerr=[[low], [high]], marker="o", capsize=3, color=color(label))
    axes.axvline(1.0, color=COLORS["AdamW"], lw=1.4)
    axes.annotate(
        "AdamW", (1.0, -0.5), textcoords="offset points", xytext=(4, -9), fontsize=8, color=COLORS["AdamW"]
    )
    axes.set_yticks(
        range(len(rows)), [f"{measured.title(study)}: {label}" for study, label, _ in rows], fontsize=8
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(
        "steps to AdamW's loss, over AdamW's steps\n(left of the line: fewer; bars: 95% intervals over seeds;\n"
        "a claim is shown where 1 is further away than about 1.4 bars)"
    )
    _clean(axes)
    return figure


def loss_by_fraction(measured: Measured) -> Figure | None:
    """Held-out loss at equal steps against the rank or the fraction of slices, one panel a study."""
    studies = []
    for study in measured.studies("batch", "fraction", "width"):
        sizes: dict[str, int] = {}
        for result in measured.results:
            if result.task.study.name == study:
                name = family(result.task.entry.label)
                sizes[name] = sizes.get(name, 0) + 1
        if max(sizes.values()) >= 2:
            studies.append(study)
    if not studies:
        return None
    figure, grid = plt.subplots(
        1,
        len(studies),
        figsize=(1 + 4.2 * len(studies), 4.4),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, study in zip(grid[0], studies, strict=True):
        _fraction_panel(axes, measured, study)
    grid[0][0].set_ylabel(f"held-out loss, {measured.unit(studies[0])}; 95% intervals within seeds")
    return figure


def _fraction_panel(axes: Axes, measured: Measured, study: str) -> None:
    lines: dict[str, list[tuple[float, Interval]]] = {}
    within = measured.within(study)
    for result in measured.results:
        if result.task.study.name != study:
            continue
        label = result.task.entry.label
        found = within[label]
        tail = label.rpartition(" ")[2]
        if tail in FRACTIONS:
            lines.setdefault(family(label), []).append((FRACTIONS[tail], found))
        else:
            axes.axhline(found.mean, color=color(label), lw=1.4, ls="--", label=label)
            axes.axhspan(found.low, found.high, color=color(label), alpha=0.12, lw=0)
    for place, (name, points) in enumerate(lines.items()):
        points.sort()
        shift = 1 + 0.03 * place  # so that bars do not hide each other
        errors = list(zip(*(_bars(one) for _, one in points), strict=True))
        axes.errorbar(
            [x * shift for x, _ in points],
            [one.mean for _, one in points],
            yerr=errors,
            marker="o",
            capsize=3,
            color=COLORS.get(name, "#333333"),
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(FRACTIONS.values())))
    axes.set_xticklabels([mark for mark, _ in sorted(FRACTIONS.items(), key=lambda item: item[1])])
    axes.set_xlabel("rank or fraction of slices, of the short side")
    axes.set_title(measured.setting(study), fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    _clean(axes)


def error_feedback(measured: Measured) -> Figure | None:
    """Loss without error feedback minus loss with it."""
    rows = []
    for study in measured.studies("batch", "fraction", "width"):
        for mark in FRACTIONS:
            on = measured.get(study, f"Dion {mark}")
            off = measured.get(study, f"Dion without error feedback {mark}")
            if on and off:
                seeds = sorted(set(on.final) & set(off.final))
                gaps = [off.final[seed] - on.final[seed] for seed in seeds]
                rows.append((f"rank {mark}, {measured.setting(study)}", gaps, measured.unit(study)))
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8.4, 1.6 + 0.5 * len(rows)), layout="constrained")
    for place, (_, gaps, _) in enumerate(rows):
        one = interval(gaps)
        low, high = _bars(one)
        axes.errorbar(one.mean, place, xerr=[[low], [high]], marker="o", capsize=4, color=COLORS["Dion"])
        axes.plot(gaps, [place + 0.18] * len(gaps), "|", color="#888888", ms=7)
    axes.axvline(0.0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(
        f"loss without error feedback minus loss with it, {rows[0][2]} (right of 0: it pays)\n"
        "dot and bar: mean and 95% interval; ticks: seeds"
    )
    _clean(axes)
    return figure


def width_trend(measured: Measured) -> Figure | None:
    """Gap of a low rank or fraction to the full one, against the width."""
    studies = [*measured.studies("batch")[:1], *measured.studies("width")]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    drawn = 0
    widths: set[int] = set()
    for label, reference, style in (
        ("Dion 1/4", "Dion 1", "-"),
        ("Dion 1/16", "Dion 1", "--"),
        ("Dion2 1/4", "Muon", "-"),
        ("Muon", "AdamW", "-"),
        ("Dion 1", "AdamW", ":"),
    ):
        gaps = gaps_by_width(measured, studies, label, reference)
        if len(gaps) < 2:
            continue
        points = [(width, interval(list(gaps[width].values()))) for width in sorted(gaps)]
        drawn += 1
        widths |= set(gaps)
        errors = list(zip(*(_bars(one) for _, one in points), strict=True))
        axes.errorbar(
            [w * (1 + 0.008 * drawn) for w, _ in points],
            [one.mean for _, one in points],
            yerr=errors,
            marker="o",
            capsize=4,
            ls=style,
            color=color(label),
            label=f"{label} minus {reference}",
        )
    if not drawn:
        plt.close(figure)
        return None
    axes.axhline(0.0, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(widths)))
    axes.set_xticklabels([str(width) for width in sorted(widths)])
    axes.set_xlabel("width of the model")
    first = studies[0]
    axes.set_ylabel(f"held-out loss minus that of the reference, {measured.unit(first)}")
    axes.set_title(
        f"{measured.workload(first).partition(',')[0]}, batch {measured.batch_of(first)}, "
        f"{measured.budget_of(first)} steps. Bars: 95% intervals over seeds",
        fontsize=9,
        loc="left",
    )
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    _clean(axes)
    return figure


def singular_values(spectra: Mapping[str, Sequence[float]]) -> Figure:
    """Singular values of one update, largest first."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, values in spectra.items():
        shown = [value for value in values if value > 1e-9]
        rule = name.partition(",")[0]
        dashed = "Keller" in name or name == "Dion 1/4"
        own = "black" if name.startswith("exact") else color(rule)
        axes.plot(
            range(1, len(shown) + 1),
            shown,
            marker=".",
            ms=3,
            lw=1.2,
            color=own,
            ls="--" if dashed else "-",
            label=f"{name} (rank {len(shown)})",
        )
    axes.set_xlabel("singular value, largest first; those that are zero are not drawn")
    axes.set_ylabel("singular value of the update")
    axes.set_ylim(bottom=0)
    axes.set_title(
        "One update of one MLP matrix, after 60 steps of the same gradients", fontsize=10, loc="left"
    )
    axes.legend(frameon=False, fontsize=8)
    _clean(axes)
    return figure
