"""The stacked bars of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from conformance.plan.estimate import Estimate

__all__ = ["draw"]

COLORS = {"products": "#4c72b0", "memory": "#55a868", "host": "#937860"}
LINKS = ("#dd8452", "#c0392b", "#8172b3")


def draw(
    estimates: Sequence[Estimate],
    names: Sequence[str],
    title: str,
    parts: Sequence[dict[str, float]],
    file: Path,
) -> None:
    """A bar an optimizer: products, passes through memory, and what each axis of the mesh carries.

    Args:
        estimates: the bars.
        names: of the mesh axes.
        title: what is priced, model and mesh.
        parts: seconds of each bar by part.
        file: a PNG.
    """
    totals = sorted(1e3 * one.time.serial for one in estimates)
    limits = [1.15 * totals[-1]]
    if totals[-1] > 5 * totals[len(totals) // 2]:  # the short bars once more, large enough to be read
        limits.append(1.15 * totals[len(totals) // 2])
    width = max(7.0, 0.75 * len(estimates) + 2.5)
    figure, plots = plt.subplots(len(limits), figsize=(width, 4.2 * len(limits) + 0.8), squeeze=False)
    for plot, limit in zip(plots[:, 0], limits, strict=True):
        _bars(plot, estimates, names, parts, limit)
    plots[0, 0].set_title(f"{title}\n(in brackets: communication behind computation)", fontsize=10)
    plots[0, 0].legend()
    if len(limits) > 1:
        plots[1, 0].set_title(f"the same, up to {limits[1]:.0f} ms", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _bars(
    plot: Any,
    estimates: Sequence[Estimate],
    names: Sequence[str],
    parts: Sequence[dict[str, float]],
    limit: float,
) -> None:
    """Bars up to ``limit`` ms; those that leave the picture have no number."""
    labels = [str(one.candidate) for one in estimates]
    bottom = [0.0] * len(labels)
    order = [*COLORS, *(f"links of {name}" for name in names)]
    for index, part in enumerate(order):
        heights = [1e3 * one[part] for one in parts]
        if part == "host" and not any(heights):  # not known
            continue
        color = COLORS.get(part) or LINKS[(index - len(COLORS)) % len(LINKS)]
        plot.bar(labels, heights, bottom=bottom, color=color, label=part)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    for index, (height, one) in enumerate(zip(bottom, estimates, strict=True)):
        if height > limit:
            continue
        text = f"{height:.0f}" if height >= 10 else f"{height:.1f}"
        plot.text(
            index, height, f"{text}\n({1e3 * one.time.overlapped:.0f})", ha="center", va="bottom", fontsize=8
        )
    plot.set_ylabel("optimizer step (ms)")
    plot.set_ylim(0, limit)
    plot.tick_params(axis="x", rotation=45)
    plot.grid(axis="y", alpha=0.3)
