"""`conformance port`: from an adapter to verdicts, files and an exit status."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from conformance.adapters import DTYPES, AdapterError, Capabilities, check_dialects
from conformance.named import look_here
from conformance.port import output
from conformance.port.grading import Verdict
from conformance.port.runner import Run, Selection, jobs, run_vectors
from conformance.port.selection import SelectionError, check_known, levels_of, read_known
from conformance.port.targets import check_targets
from conformance.port.worker import Worker
from conformance.ranks import BACKENDS
from conformance.report.live import live_bar
from conformance.vectors import VectorError, VectorSet, load

RANKS, SECONDS = 4, 60.0
"""Defaults of --nproc and --timeout."""
ASK_SECONDS = 60.0
"""At least so long may it take to import a port: its framework may be large."""


def port(
    adapter: Annotated[str, typer.Argument(help="package.module:object, or a registered adapter's name.")],
    level: Annotated[
        str, typer.Option(help="Levels: L0-L2, or L1,L4. Those not claimed are listed.")
    ] = "L0-L4",
    case: Annotated[
        list[str] | None, typer.Option(help="Only ids that match this glob (repeatable).")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Only this one (repeatable): {', '.join(DTYPES)}.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[
        str | None,
        typer.Option(
            help="gloo (on cuda: ranks share GPUs), nccl (cuda), or threads (cpu): ranks are threads of one process,"
            " 64 if you like.  [default: by device]"
        ),
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Local ranks for L3 and L4.")] = RANKS,
    skip: Annotated[
        Path | None, typer.Option(help="File of cases not to run: `pattern  # reason` a line.")
    ] = None,
    xfail: Annotated[Path | None, typer.Option(help="File of cases that have to fail, likewise.")] = None,
    vectors: Annotated[Path | None, typer.Option(help="Folder of another set of vectors.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a case may take.")] = SECONDS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all verdicts to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Print what failing cases raised.")] = False,
) -> None:
    """Hold a port to the oracle: L0 orthonormalizer, L1 one step, L2 ten steps, L3 resume, L4 meshes, L5 convergence.

    L5 takes two minutes and more, and is run when asked for.

    Exit status 0: something passed and nothing failed; 1: something failed; 2: nothing could be run.
    """
    console = Console() if sys.stdout.isatty() else Console(width=120)
    began = time.monotonic()
    look_here()
    from conformance.port.listing import check_only, claimed_cases  # `--help` need not wait for DTensor

    try:
        check_targets([path for path in (json_file, junit, html) if path is not None])
        selection = selection_of(level, dtype, case, skip, xfail)
        check_backend(device, backend)
        found = load(vectors) if vectors else load()
        claims = claims_of(adapter, timeout, device)
        check_dialects(claims, found, adapter)
        check_known((*selection.skip, *selection.xfail), lambda: claimed_cases(claims, found))
        check_only(claims, found, selection, nproc)
        run = run_port(
            adapter, claims, found, selection, console, timeout, nproc=nproc, device=device, backend=backend
        )
    except (AdapterError, SelectionError, VectorError, OSError) as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        raise typer.Exit(2) from None
    run.options = output.changed(
        {
            "--device": (device, "cpu"), "--backend": (backend, None), "--nproc": (nproc, RANKS),
            "--vectors": (vectors, None), "--timeout": (timeout, SECONDS),
        }
    )  # fmt: skip
    run.xfail = output.changed({"--xfail": (xfail, None)})
    seconds = time.monotonic() - began
    about = output.facts(run, adapter, f"{found.version}, {len(found)} cases", seconds)
    output.show(run, adapter, console, seconds, details=traceback)
    if json_file is not None:
        output.write_whole(json_file, output.json_bytes(output.as_json(run, about, adapter)))
    if junit is not None:
        output.write_whole(junit, output.as_junit(run, adapter))
    if html is not None:
        from conformance.port.page import render

        output.write_whole(html, render(run, about, adapter, seconds).encode())
    raise typer.Exit(run.exit_status)


def claims_of(adapter: str, timeout: float, device: str = "cpu") -> Capabilities:
    """What the port claims, asked in a process of its own: what ends or hangs there does not end this one.

    Raises:
        AdapterError: it cannot be found, `capabilities` raises or gives something else, there is no such device, or the
            process ends or hangs.
    """
    worker = Worker(adapter, timeout, device)
    try:
        return worker.start(max(timeout, ASK_SECONDS))
    finally:
        worker.close()


def selection_of(
    level: str, dtype: Sequence[str] | None, case: Sequence[str] | None, skip: Path | None, xfail: Path | None
) -> Selection:
    """The command line's selection.

    Raises:
        SelectionError: an unknown level or dtype, or a bad file.
    """
    for one in dtype or ():
        if one not in DTYPES:
            raise SelectionError(f"{one!r} is no compute dtype; choose from {', '.join(DTYPES)}")
    return Selection(
        levels_of(level), tuple(dtype or ()), tuple(case or ()), read_known(skip), read_known(xfail)
    )


def check_backend(device: str, backend: str | None) -> None:
    """Refuses a backend that the device's ranks cannot use.

    Raises:
        SelectionError: another device or backend.
    """
    if device not in BACKENDS:
        raise SelectionError(f"{device!r} is no device; choose from {', '.join(BACKENDS)}")
    if backend not in (None, *BACKENDS[device]):
        raise SelectionError(
            f"on {device} the backend is {' or '.join(BACKENDS[device])}, not {backend!r}; give --device as well"
        )


def run_port(
    adapter: str,
    claims: Capabilities,
    vectors: VectorSet,
    selection: Selection,
    console: Console,
    timeout: float,
    *,
    nproc: int,
    device: str,
    backend: str | None = None,
) -> Run:
    """All selected levels, with a bar on a terminal."""
    total = sum(known is None for _, _, known in jobs(claims, vectors, selection))
    with live_bar(console) as progress:
        task = progress.add_task("", total=total)

        def following(verdict: Verdict) -> None:
            progress.update(task, description=verdict.id[:60].ljust(60))
            if verdict.seconds or verdict.errors:
                progress.advance(task)

        run = run_vectors(
            adapter, claims, vectors, selection, timeout=timeout, device=device, on_verdict=following
        )
        if {"L3", "L4"} & set(selection.levels) & set(claims.levels):
            from conformance.port.meshes import run_meshes

            run.verdicts += run_meshes(
                adapter, claims, vectors, selection,
                ranks=nproc, device=device, backend=backend, timeout=timeout, on_verdict=following,
            )  # fmt: skip
        if "L5" in selection.levels and "L5" in claims.levels:
            from conformance.port.convergence import run_gate

            run.verdicts += run_gate(
                adapter, claims, vectors, selection, timeout=timeout, device=device, on_verdict=following
            )
    return run
