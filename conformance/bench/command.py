"""`conformance bench`: one command, one run, everything in pairs."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from conformance.named import look_here
from conformance.report.live import live_bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from conformance.bench.contenders import Case

ALGORITHMS = ("muon", "muon_torch", "normuon", "dion", "dion2", "dion3", "adamw")


def bench(
    only: Annotated[
        list[str] | None, typer.Option("--algorithm", help=f"Of {', '.join(ALGORITHMS)} (repeatable).")
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="COUNTxMxN (repeatable); 12x256x1024 and 12x512x512.")
    ] = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            metavar="MODULE:FUNCTION",
            help="Also an optimizer of yours, made of pairs (name, parameter) and a Case (repeatable).",
        ),
    ] = None,
    compute_dtype: Annotated[
        str, typer.Option(help="Of the orthonormalization: float32 or bfloat16.")
    ] = "float32",
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of each contender: a step, or the median of those of 0.3 s.")
    ] = 7,
    ranks: Annotated[
        int, typer.Option(min=0, help="Also count what a step sends on so many gloo ranks; 0 for none.")
    ] = 0,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="First steps at a time, with every contender there at once; for GPUs."),
    ] = 1,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds for a contender's answer; who takes longer has failed.")
    ] = 3600.0,
    growth: Annotated[
        bool, typer.Option(help="Also measure how ours grows with N, m, n, r, and its bytes with the ranks.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Also predict steps of ours on this CPU as `conformance plan` does."),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Write the page to this Markdown file, and its picture to a folder of its name."),
    ] = None,
) -> None:
    """Time the optimizers of dion_dtensor beside every peer that can be imported, and beside the bare products.

    Peers: microsoft/dion (its package `dion` on PYTHONPATH), torch.optim.Muon, torch.optim.AdamW(fused), and what
    --contender names. Exit status 0 if every contender ran.
    """
    chosen = only or list(ALGORITHMS)
    if unknown := [name for name in chosen if name not in ALGORITHMS]:
        raise typer.BadParameter(f"algorithm {unknown[0]!r} is unknown; choose from {', '.join(ALGORITHMS)}")
    if compute_dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"compute dtype {compute_dtype!r} must be float32 or bfloat16")
    sizes = [_parsed(shape) for shape in shapes or ("12x256x1024", "12x512x512")]

    # Imported here: `--help` need not wait for torch.
    import torch

    from conformance.bench import page as pages
    from conformance.bench.contenders import Case, builder_of
    from conformance.bench.growth import RANKS, Line, lines, sent_lines
    from conformance.bench.measure import Entry, measure_all
    from conformance.bench.products import peak
    from conformance.bench.traffic import Traffic, traffic
    from conformance.port.output import json_bytes, write_whole

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"device {device!r} is not here")
    further = tuple(contenders or ())
    if further:
        look_here()
    for name in further:
        try:
            builder_of(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    if plan and device != "cpu":
        raise typer.BadParameter("--plan times operators on the CPU alone")
    console = Console() if sys.stdout.isatty() else Console(width=150)
    cases = [
        Case(name, count, (m, n), compute_dtype=compute_dtype, device=device, threads=threads)
        for count, m, n in sizes
        for name in chosen
    ]
    entries: list[Entry] = []
    grown: list[Line] = []
    sent: list[Traffic] = []
    about = pages.machine(device, threads)
    highest = peak(cases[0].dtype) if device == "cuda" else 0.0
    if highest:
        about[f"{compute_dtype} peak, one product of 8192"] = f"{highest / 1e12:.0f} TFLOP/s"
    if jobs > 1:
        about["first steps at a time"] = str(jobs)

    def save() -> None:
        """After every case, so that a run that is ended leaves what it has."""
        if json_file is not None:
            write_whole(json_file, json_bytes(pages.as_json(entries, grown, sent, about)))
        if page is not None:
            picture = page.with_suffix("") / "growth.png"
            if grown:
                picture.parent.mkdir(exist_ok=True)
                pages.draw_growth(grown, picture)
            words = ["conformance", *sys.argv[1:]]
            if "--json" in words:  # where else the numbers went is nobody's concern
                del words[words.index("--json") : words.index("--json") + 2]
            text = pages.markdown(
                entries, grown, sent, about, shlex.join(words), f"{page.stem}/{picture.name}"
            )
            write_whole(page, text.encode())

    foreseen = _forecast(threads) if plan else None
    with live_bar(console) as progress:
        task = progress.add_task("", total=len(cases) * (2 if ranks else 1) + growth)

        def tell(said: str) -> None:
            progress.update(task, description=said[:70].ljust(70))

        for batch in [cases] if jobs > 1 else [[case] for case in cases]:
            for found in measure_all(batch, rounds, jobs=jobs, patience=patience, further=further, told=tell):
                ours = found[0]
                if foreseen is not None and not ours.failure and ours.case.algorithm != "muon_torch":
                    tell(f"{ours.case}: planned")
                    ours.planned = foreseen(ours.case)
                entries += [replace(entry, peak=highest) for entry in found]
                progress.advance(task)
                save()
        for case in cases if ranks else ():
            if case.algorithm != "adamw":
                sent += traffic(case, ranks, tell, further=further)
                save()
            progress.advance(task)
        if growth:
            base = Case("muon", 4, (512, 512), compute_dtype=compute_dtype, device=device, threads=threads)
            some = [name for name in chosen if name not in ("adamw", "muon_torch")]
            wide = replace(base, shape=(1024, 1024))  # of smaller ones other ways cost less on other ranks
            for line in chain(lines(base, some, rounds, tell), sent_lines(wide, some, tell)):
                grown.append(line)
                save()
    for title, columns, rows in (
        ("Step times", pages.COLUMNS, [pages.cells(entry) for entry in entries]),
        (f"Bytes a step, {ranks} ranks", pages.SENT_COLUMNS, pages.sent_cells(sent)),
    ):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, name in enumerate(columns):
            table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        if rows:
            console.print(table)
            console.print(pages.LEGENDS[columns], highlight=False)
    for line in grown:
        what = "bytes of a rank" if line.quantity == RANKS else "time"
        console.print(
            f"{line.algorithm}: {what} ~ {line.quantity}^{line.slope:.2f}, in theory {line.theory:.2f}",
            highlight=False,
        )
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    failed = [one.failure for one in entries if one.failure] + [one.failure for one in sent if one.failure]
    for said in failed:
        console.print(said, style="red", highlight=False)
    raise typer.Exit(1 if failed else 0)


def _forecast(threads: int) -> Callable[[Case], float]:
    """Seconds of a step of ours, from what is timed in this process."""
    import torch

    from conformance.bench.planned import planned
    from conformance.bench.timing import keep_freed_memory
    from conformance.plan.hardware import this_machine
    from conformance.plan.operators import Stopwatch

    torch.set_num_threads(threads)
    keep_freed_memory()
    hardware = this_machine((1,))
    stopwatch = Stopwatch(hardware.flops)
    return lambda case: planned(case, hardware, stopwatch)


def _parsed(shape: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape)
    if found is None or not all(int(size) for size in found.groups()):
        raise typer.BadParameter(f"shape {shape!r} must be COUNTxMxN, as 12x1024x4096")
    count, m, n = (int(size) for size in found.groups())
    return count, m, n
