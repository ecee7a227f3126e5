"""`conformance meshes`: L3 and L4 of our own optimizers on real ranks, and `ci/gpu`'s half of the work on GPUs."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from conformance import launch
from conformance.adapters import DTYPES, AdapterError, check_dialects
from conformance.named import look_here
from conformance.port import output
from conformance.port.grading import ERROR, FAIL, Verdict
from conformance.port.runner import Run
from conformance.port.selection import SelectionError
from conformance.ranks import BACKENDS, THREADS

PORT = "conformance.adapters.ours:adapter"
RANKS, SECONDS = 4, 120.0
"""Defaults of --nproc and --timeout."""


def meshes(
    adapter: Annotated[str, typer.Option(help="Another port than dion_dtensor.")] = PORT,
    level: Annotated[str, typer.Option(help="L3 (save and resume), L4 (meshes), or both.")] = "L3-L4",
    case: Annotated[
        list[str] | None, typer.Option(help="Only ids that match this glob (repeatable).")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Only this one (repeatable): {', '.join(DTYPES)}.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL, one rank a GPU).")] = "cpu",
    backend: Annotated[
        str | None,
        typer.Option(
            help="gloo on cuda: ranks share GPUs; threads on cpu: ranks are threads.  [default: by device]"
        ),
    ] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Local ranks; those of torchrun or Slurm are taken.")
    ] = RANKS,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile dion_dtensor's steps; on fewer shapes.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a case may take.")] = SECONDS,
    save: Annotated[
        Path | None, typer.Option(help="Write all results, to be compared with --against.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Compare with the results of another run, such as gloo's.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all verdicts to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
) -> None:
    """Step dion_dtensor on every mesh that fits, and hold weights and states to the oracle on the CPU.

    All ranks must hold the same bits of what is replicated. Exit status 0 only if nothing failed.
    """
    # Imported here: `--help` need not wait for DTensor.
    from conformance.port.command import check_backend, claims_of, selection_of
    from conformance.port.compare import Kept, compare, read, write
    from conformance.port.listing import check_only
    from conformance.port.meshes import run_meshes
    from conformance.port.targets import check_targets
    from conformance.vectors import VectorError, load

    console = Console(quiet=not launch.is_main(), width=None if sys.stdout.isatty() else 120)
    began = time.monotonic()
    look_here()
    if compiled:
        os.environ["CONFORMANCE_COMPILE"] = "1"  # read by the ranks when they build the optimizer
    kept = Kept()
    try:
        targets = [path for path in (json_file, junit, html, save) if path is not None]
        check_targets(targets if launch.is_main() else [])
        other = read(against) if against is not None else None
        vectors, claims = load(), claims_of(adapter, timeout)
        check_dialects(claims, vectors, adapter)
        selection = selection_of(level, dtype, case, None, None)
        check_backend(device, backend)
        check_only(claims, vectors, selection, _ranks(nproc))
        if compiled and backend == THREADS:
            raise SelectionError("--compile needs ranks that are processes: threads share one compiler")

        def line(verdict: Verdict) -> None:
            if verdict.status not in ("skip", "not claimed"):
                console.print(
                    f"{verdict.status}: {verdict.id} {verdict.message}", highlight=False, markup=False
                )

        options = output.changed(
            {
                "--adapter": (adapter, PORT), "--device": (device, "cpu"), "--backend": (backend, None),
                "--nproc": (_ranks(nproc), RANKS),
                "--compile": (compiled, False), "--timeout": (timeout, SECONDS), "--against": (against, None),
            }
        )  # fmt: skip
        run = Run(claims, levels=selection.levels, only=selection.only, command="meshes", options=options)
        run.verdicts = run_meshes(
            adapter, claims, vectors, selection, ranks=_ranks(nproc), device=device, backend=backend,
            timeout=timeout, compiled=compiled, on_verdict=line, keep=kept,
        )  # fmt: skip
    except (AdapterError, SelectionError, VectorError, OSError, ValueError) as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        raise typer.Exit(2) from None
    if not launch.is_main():
        raise typer.Exit(1 if any(one.status == ERROR for one in run.verdicts) else 0)
    if other is not None:
        run.verdicts = [compare(one, kept, other) for one in run.verdicts]
        for one in run.verdicts:
            if one.status == FAIL and "other run" in one.message:
                line(one)
    seconds = time.monotonic() - began
    about = output.facts(run, adapter, f"meshes, {backend or BACKENDS[device][0]} on {device}", seconds)
    output.show(run, adapter, console, seconds)
    if save is not None:
        write(save, kept)
    _write(run, about, adapter, seconds, json_file, junit, html)
    raise typer.Exit(run.exit_status)


def _ranks(nproc: int) -> int:
    """Those of another launcher, if there is one."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if launch.joined() and name in os.environ:
            return int(os.environ[name])
    return nproc


def _write(
    run: Run, about: dict[str, str], adapter: str, seconds: float,
    json_file: Path | None, junit: Path | None, html: Path | None,
) -> None:  # fmt: skip
    if json_file is not None:
        data: dict[str, Any] = output.as_json(run, about, adapter)
        output.write_whole(json_file, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
    if junit is not None:
        output.write_whole(junit, output.as_junit(run, adapter))
    if html is not None:
        from conformance.port.page import render

        output.write_whole(html, render(run, about, adapter, seconds).encode())
