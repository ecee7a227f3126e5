"""The HTML report: one page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections import Counter
from importlib import resources

from jinja2 import Environment
from matplotlib.figure import Figure

from conformance.port.grading import ACCEPTABLE, BAD, PASS, SKIP, UNCLAIMED, UNDECIDED, XFAIL, Verdict
from conformance.port.output import OPEN, command_of, not_claimed, number, summary
from conformance.port.runner import Run

WORST = 8
FLOOR = 1e-18


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


def worst(run: Run) -> list[Verdict]:
    """What failed, then what came closest to its tolerance."""
    measured = [one for one in run.verdicts if one.errors and one.spectrum]
    return sorted(measured, key=lambda one: (one.status not in BAD, -one.used))[:WORST]


def render(run: Run, about: dict[str, str], adapter: str, seconds: float) -> str:
    """The page."""
    template = resources.files("conformance.port").joinpath("template.html").read_text(encoding="utf-8")
    columns, lines = matrix(run)
    closest = worst(run)
    bad = [one for one in run.verdicts if one.status in BAD]
    other = [one for one in run.verdicts if one.status in (XFAIL, *OPEN)]
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        run=run, facts=about, summary=summary(run, seconds), columns=columns, lines=lines, bad=bad, other=other,
        commands={one.id: command_of(run, adapter, one) for one in bad}, not_claimed=not_claimed(run), closest=closest,
        picture=base64.b64encode(_spectra(closest)).decode() if closest else None, number=number,
    )  # fmt: skip


def _spectra(verdicts: list[Verdict]) -> bytes:
    """For each verdict, its error along the singular directions of the expected update, as a PNG."""
    columns = min(4, len(verdicts))
    lines = -(-len(verdicts) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, one in zip(grid.flat, verdicts, strict=False):
        directions = range(1, len(one.spectrum) + 1)
        errors = [abs(found - length) / (length or 1.0) for length, found in one.spectrum]
        axes.semilogy(directions, [max(error, FLOOR) for error in errors], "o-", ms=3, lw=1, color="#1f5fa8")
        allowed = one.errors.get("update", (0.0, None))[1]
        if allowed:
            axes.axhline(allowed, color="#c0392b", lw=1)
        axes.set_title(f"{one.case}\n{one.dtype}: {one.status}", fontsize=7, loc="left")
        axes.tick_params(labelsize=7)
        axes.grid(True, color="#e6e6e6", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(verdicts) :]:
        axes.set_visible(False)
    figure.supxlabel("singular direction of the expected update, longest first", fontsize=8)
    figure.supylabel("relative error along it", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
