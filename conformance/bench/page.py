"""The measurements as a table, as JSON, as a page of the documentation, and the growth as a picture."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from conformance.bench.contenders import BARE, OURS
from conformance.bench.growth import RANKS, Line
from conformance.bench.measure import Entry
from conformance.bench.traffic import Traffic

__all__ = ["COLUMNS", "SENT_COLUMNS", "as_json", "cells", "draw_growth", "machine", "markdown", "sent_cells"]

SENT_COLUMNS = ("case", "contender", "sent by a rank", "collectives", "ours / it")
COLUMNS = (
    "case",
    "contender",
    "step",
    "spread",
    "first step",
    "peak memory",
    "GFLOP/s",
    "roofline",
    "ours / it",
    "planned / it",
)

LEGENDS = {
    COLUMNS: "ours / it: our step over this one's, median (and quartiles) of the rounds; below 1 ours is faster. "
    "roofline: share of a step that the bare products take. planned / it: what --plan foresees over what was measured.",
    SENT_COLUMNS: "sent by a rank: mean over the ranks. ours / it: our bytes over this one's; below 1 ours sends less.",
}
"""What stands under each table on a terminal."""


def machine(device: str, threads: int) -> dict[str, str]:
    """What the numbers depend on."""
    versions = {}
    for name in ("torch", "dion"):
        if importlib.util.find_spec(name) is not None:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "from a checkout"
    processor = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "processor": processor,
        "threads": str(threads),
        "bfloat16 units": "yes" if device == "cuda" or _has_bfloat16() else "no",
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def _has_bfloat16() -> bool:
    from dion_dtensor.orthonormalize.gram import CPU_HAS_BF16

    return CPU_HAS_BF16


def cells(entry: Entry) -> tuple[str, ...]:
    """A row of the table; see :data:`COLUMNS`."""
    if entry.failure:
        return (str(entry.case), entry.name, "failed", "", "", "", "", "", entry.failure[:60], "")
    return (
        str(entry.case),
        entry.name,
        f"{1e3 * entry.median:.{1 if entry.median > 0.01 else 2}f} ms",
        f"{entry.spread:.0%}",
        "" if entry.name == BARE else f"{entry.first:.1f} s",
        f"{entry.memory / 1e6:.0f} MB" if entry.memory else "",
        "" if entry.case.algorithm == "adamw" else _rate(entry),
        f"{entry.roofline:.0%}" if entry.bare and entry.name != BARE else "",
        "{:.2f} ({:.2f} to {:.2f})".format(entry.ratio, *entry.ratio_range) if entry.ratios else "",
        f"{entry.planned / entry.median:.2f}" if entry.planned else "",
    )


def _rate(entry: Entry) -> str:
    share = f" ({entry.rate / entry.peak:.0%} of peak)" if entry.peak else ""
    return f"{entry.rate / 1e9:.0f}{share}"


def sent_cells(rows: Sequence[Traffic]) -> list[tuple[str, ...]]:
    """The rows of the second table; see :data:`SENT_COLUMNS`."""
    found: list[tuple[str, ...]] = []
    for row in rows:
        if row.failure:
            found.append((str(row.case), row.name, "failed", "", row.failure.partition(" ranks: ")[2][:60]))
            continue
        ours = next((one for one in rows if one.case == row.case and one.name == OURS), None)
        ratio = (
            ours.bytes / row.bytes if ours and ours is not row and row.bytes and not ours.failure else None
        )
        text = "" if ratio is None else f"{ratio:.2f}"
        found.append((str(row.case), row.name, f"{row.bytes / 1e6:.3g} MB", str(row.collectives), text))
    return found


def as_json(
    entries: Sequence[Entry], growth: Sequence[Line], sent: Sequence[Traffic], about: dict[str, str]
) -> dict[str, Any]:
    """All of it."""
    return {
        "machine": about,
        "steps": [
            asdict(entry) | ({"median": entry.median} if not entry.failure else {}) for entry in entries
        ],
        "growth": [asdict(line) | {"slope": line.slope, "theory": line.theory} for line in growth],
        "sent": [asdict(row) for row in sent],
    }


def draw_growth(growth: Sequence[Line], file: Path) -> None:
    """Step time, or bytes, against each quantity, log-log, with the slope of theory beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    titles = {"N": "matrices", "m": "rows", "n": "columns", "r": "rank, or chosen slices", RANKS: "processes"}
    quantities = [quantity for quantity in titles if any(line.quantity == quantity for line in growth)]
    figure, axes = plt.subplots(1, len(quantities), figsize=(3.8 * len(quantities), 5.2), squeeze=False)
    names = list(dict.fromkeys(line.algorithm for line in growth))
    for plot, quantity in zip(axes[0], quantities, strict=True):
        unit = 1e-6 if quantity == RANKS else 1e3
        for line in growth:
            if line.quantity != quantity:
                continue
            color = f"C{names.index(line.algorithm)}"
            label = f"{line.algorithm}: {line.slope:.2f} (theory {line.theory:.2f})"
            plot.plot(line.values, [unit * one for one in line.measured], "o-", color=color, label=label)
            # Bytes are bytes; of FLOPs only the growth can be compared.
            scale = unit if quantity == RANKS else unit * line.measured[-1] / line.expected[-1]
            plot.plot(line.values, [scale * one for one in line.expected], ":", color=color, alpha=0.6)
        values = sorted({value for line in growth if line.quantity == quantity for value in line.values})
        plot.set(xscale="log", yscale="log", xlabel=f"{titles[quantity]} ({quantity})")
        plot.xaxis.set_major_formatter(ScalarFormatter())
        plot.xaxis.set_minor_formatter(NullFormatter())
        plot.set_xticks(values)  # after the scale, which has ticks of its own
        plot.set_xticks([], minor=True)
        plot.set_ylabel("MB that a rank sends" if quantity == RANKS else "step of dion_dtensor (ms)")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        plot.legend(title="exponent measured (of theory)", fontsize=8, title_fontsize=8, **below)
        plot.grid(alpha=0.3)
    figure.suptitle(
        "Growth of a step. Dotted: the textbook's FLOPs through the last point; bytes in closed form"
    )
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def markdown(
    entries: Sequence[Entry],
    growth: Sequence[Line],
    sent: Sequence[Traffic],
    about: dict[str, str],
    command: str,
    picture: str,
) -> str:
    """A page of the documentation; made again by ``command``."""
    lines = [
        "# Step times",
        "",
        "Made by one run of",
        "",
        "```",
        command,
        "```",
        "",
        "on " + ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
        "",
        "Each contender runs in a process of its own with nothing compiled before, whose C library keeps freed memory"
        " as it does in one that trains. All step in turns, a"
        " round at a time; a turn is one step, or the median of those of 0.3 s."
        " The ratio is the median (and the quartiles) over the rounds of ours divided by it, so below"
        " 1 ours is faster."
        f' "{BARE}" are the products of the textbook\'s form alone, with the QR of Dion: no momentum, no normalization,'
        " no update; the roofline is the share of a step that they would take."
        " GFLOP/s count the textbook's products whoever runs: symmetric products by halves and the Gram"
        " form do with fewer. Peak memory is what a step holds beyond parameters, gradients and state."
        " `muon_torch` is Muon by the conventions of torch.optim.Muon. Peers whose polynomial knows bfloat16 alone"
        " are given it in float32 where the case says so. Planned is what `conformance plan --hardware here` says.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(cells(entry)) + " |" for entry in entries]
    if sent:
        lines += ["", "## Bytes", ""]
        lines += [
            "What a rank sends in a step, the mean over the ranks, every matrix sharded by rows over all of them: the"
            " collectives that torch's profiler saw asked for, by the ring's count.",
            "",
            "| " + " | ".join(SENT_COLUMNS) + " |",
            "|" + "---|" * len(SENT_COLUMNS),
        ]
        lines += ["| " + " | ".join(row) + " |" for row in sent_cells(sent)]
    if growth:
        lines += ["", "## Growth", "", f"![Growth of a step]({picture})", ""]
        lines += [
            "Of the step time with N matrices of m rows and n columns and with the rank r; of the bytes that a rank"
            f" sends with the number of {RANKS}, every matrix sharded by rows. Exponents of powers by least squares;"
            " theory is the textbook's FLOPs, or the bytes in closed form. Times of steps as short as these grow more"
            " slowly than their FLOPs, for passes through memory and the host take their share.",
            "",
            "| algorithm | quantity | values | exponent | in theory |",
            "|---|---|---|---|---|",
        ]
        for line in growth:
            values = ", ".join(f"{value:g}" for value in line.values)
            lines.append(
                f"| {line.algorithm} | {line.quantity} | {values} | {line.slope:.2f} | {line.theory:.2f} |"
            )
    return "\n".join(lines) + "\n"
