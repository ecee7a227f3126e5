"""The HTML report: one page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections import Counter
from importlib import resources

from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from conformance.port.grading import (
    ACCEPTABLE,
    BAD,
    PASS,
    SKIP,
    UNCLAIMED,
    UNDECIDED,
    XFAIL,
    Spectrum,
    Verdict,
)
from conformance.port.output import OPEN, command_of, not_claimed, number, summary
from conformance.port.runner import Run

WORST = 8
BLUE = "#1f5fa8"
FLOOR = 1e-18
SHORT = 1e-3
"""Directions of less than this share of the longest are next to nothing: an error there is relative to the longest."""


def matrix(run: Run) -> tuple[list[tuple[str, str]], list[tuple[str, str, list[tuple[str, str]]]]]:
    """Columns (level, layout) and lines (algorithm, dialect, cells); a cell is its text and its CSS class."""
    claimed = [one for one in run.verdicts if one.status != UNCLAIMED]
    columns = sorted({(one.level, one.layout) for one in claimed}, key=lambda c: (c[0], len(c[1]), c[1]))
    lines = []
    for algorithm, dialect in dict.fromkeys((one.algorithm, one.dialect) for one in claimed):
        cells = []
        for level, layout in columns:
            counts = Counter(
                one.status
                for one in claimed
                if (one.algorithm, one.dialect, one.level, one.layout) == (algorithm, dialect, level, layout)
            )
            bad = sum(counts[s] for s in BAD)
            if not counts:
                cells.append(("", "none"))
            elif bad:
                cells.append((f"{bad} of {counts.total()} bad", "fail"))
            else:
                shown = [f"{counts[s]} {s}" for s in (PASS, ACCEPTABLE, XFAIL, UNDECIDED, SKIP) if counts[s]]
                cells.append((", ".join(shown), "pass" if counts[PASS] + counts[ACCEPTABLE] else "none"))
        lines.append((algorithm, dialect, cells))
    return columns, lines


def worst(run: Run) -> tuple[list[Verdict], list[Verdict]]:
    """What failed, then what came closest to its tolerance: those to list, and those to draw, which have a spectrum."""
    shown = [one for one in run.verdicts if one.status in BAD or (one.errors and one.spectrum)]
    order = sorted(shown, key=lambda one: (one.status not in BAD, -one.used))
    drawn = [one for one in order if one.spectrum][:WORST]
    return [one for one in order if one in order[:WORST] or one in drawn], drawn


def points(spectrum: Spectrum) -> list[tuple[float, bool]]:
    """By direction: the relative error over it, and whether it is short, so relative to the longest."""
    longest = max((length for length, _ in spectrum), default=0.0)
    return [
        (error / (longest if length < SHORT * longest else length), length < SHORT * longest)
        for length, error in spectrum
    ]


def render(run: Run, about: dict[str, str], adapter: str, seconds: float) -> str:
    """The page."""
    template = resources.files("conformance.port").joinpath("template.html").read_text(encoding="utf-8")
    columns, lines = matrix(run)
    closest, drawn = worst(run)
    bad = [one for one in run.verdicts if one.status in BAD]
    other = [one for one in run.verdicts if one.status in (XFAIL, *OPEN)]
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        run=run, facts=about, summary=summary(run, seconds), columns=columns, lines=lines, bad=bad, other=other,
        commands={one.id: command_of(run, adapter, one) for one in bad}, not_claimed=not_claimed(run), closest=closest,
        picture=base64.b64encode(_spectra(drawn)).decode() if drawn else None, number=number,
    )  # fmt: skip


def _spectra(verdicts: list[Verdict]) -> bytes:
    """For each verdict, its error over the singular directions of the expected update, as a PNG."""
    columns = min(4, len(verdicts))
    lines = -(-len(verdicts) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, one in zip(grid.flat, verdicts, strict=False):
        found = points(one.spectrum)
        heights = [max(error, FLOOR) for error, _ in found]
        axes.semilogy(range(1, len(heights) + 1), heights, "o-", ms=3.5, lw=1, color=BLUE)
        hollow = [index for index, (_, short) in enumerate(found) if short]
        axes.plot(
            [1 + index for index in hollow],
            [heights[index] for index in hollow],
            "o",
            ms=3.5,
            mfc="w",
            mec=BLUE,
        )
        error, allowed = one.errors.get("update", (0.0, None))
        if allowed:
            axes.axhline(allowed, color="#c0392b", lw=1)
        whole = f"update off by {error:.2g}, allowed {f'{allowed:.2g}' if allowed else '-'}"
        axes.set_title(f"{one.case}\n{one.dtype}: {one.status}; {whole}", fontsize=7, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.tick_params(which="both", labelsize=7)
        axes.grid(True, color="#e6e6e6", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(verdicts) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "singular direction s u vᵀ of the expected update, longest first\n"
        "(hollow: next to nothing, relative to the longest)",
        fontsize=8,
    )
    figure.supylabel("relative error over it:\nmax(|E v|, |Eᵀ u|) / s", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
