"""`conformance run`: the main job from the command line to the exit status."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from conformance import launch
from conformance.job.settings import DTYPES, OPTIMIZERS, USUAL, Settings
from conformance.meshes import SIMULATED

MATRIX_OPTIMIZERS = tuple(name for name, one in OPTIMIZERS.items() if one.algorithm != one.scalar)
QUICK = Settings(dtypes=("float64",), steps=3, compile=False, meshes=("8x8",))
INDUCTOR = ("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.codegen.cpp")


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
    report: Annotated[
        Path, typer.Option(help="Folder of the report; an older report there is replaced.")
    ] = Path("report"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of every run.  [default: 20]")
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(help=f"This one (repeatable): {', '.join(OPTIMIZERS)}.  [default: {', '.join(USUAL)}]"),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Only this one (repeatable): {', '.join(DTYPES)}.")
    ] = None,
    mesh: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this simulated mesh (repeatable): {', '.join(SIMULATED)}, none."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL, one rank a GPU).")] = "cpu",
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Local processes.  [default: 4, or all GPUs]")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="3 steps in float64, eager, one simulated mesh.")
    ] = False,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Run the optimizer steps eagerly.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Print a failing rank's traceback.")] = False,
    inject_nan: Annotated[str | None, typer.Option(hidden=True, metavar="STEP:PARAMETER")] = None,
    mutate: Annotated[list[str] | None, typer.Option(hidden=True, metavar="NAME=NUMBER")] = None,
) -> None:
    """Train a small GPT on real text, sharded, and hold every optimizer step to the oracle.

    One row an (optimizer, dtype, mesh). The report's folder gets index.html, the plots and results.json.
    Exit status 0 only if every row passed.
    """
    settings = QUICK if quick else Settings(meshes=tuple(SIMULATED))
    changes: dict[str, Any] = {"device": device, "ranks": ranks or _default_ranks(device)}
    if optimizer:
        changes["optimizers"] = _known("optimizer", optimizer, list(OPTIMIZERS))
    if dtype:
        changes["dtypes"] = _known("dtype", dtype, list(DTYPES))
    if mesh:
        changes["meshes"] = () if mesh == ["none"] else _known("mesh", mesh, list(SIMULATED))
    if steps:
        changes["steps"] = steps
    if no_compile:
        changes["compile"] = False
    if inject_nan:
        changes["nan_at"] = _nan_at(inject_nan)
    if mutate:
        changes["mutation"] = dict(_assignment(one) for one in mutate)
    raise typer.Exit(run_job(replace(settings, **changes), report, json_file, traceback=traceback))


def run_job(
    settings: Settings, report: Path, json_file: Path | None = None, *, traceback: bool = False
) -> int:
    """Runs the job, prints its table and writes its report.

    Args:
        settings: what to run.
        report: folder of the report.
        json_file: where the results go as well.
        traceback: print a failing rank's traceback.

    Returns:
        The exit status: 0 all passed, 1 something failed, 130 interrupted. When a rank fails nothing is written.
    """
    _compiler_environment()
    # Imported here: `--help` and wrong options need not wait for torch's compiler and matplotlib.
    from conformance.job.simulated import cases, simulate
    from conformance.job.training import train
    from conformance.report.page import facts_of_run, write, write_json
    from conformance.report.terminal import CAPTION, Monitor, make_console, summary, table

    console = make_console(quiet=not launch.is_main())
    began = time.monotonic()
    simulated = cases(settings)
    expected = len(settings.optimizers) * len(settings.dtypes) + len(simulated)
    try:
        _check_folder(report)
        with Monitor(console, expected - len(simulated), settings.steps, len(simulated)) as monitor:
            preload = ["conformance.job.training", "conformance.job.simulated"]
            launch.run(
                train,
                settings,
                ranks=settings.ranks,
                device=settings.device,
                on_event=monitor,
                preload=preload + (list(INDUCTOR) if settings.compile else []),
            )
            if simulated and launch.is_main():
                workers = min(len(simulated), os.cpu_count() or 1, 4)
                launch.run(
                    simulate, settings, ranks=workers, on_event=monitor, process_group=False, preload=preload
                )
    except launch.RankFailedError as failure:
        console.print(f"stopped: {failure}", style="red", highlight=False, markup=False, soft_wrap=True)
        if traceback:
            console.print(failure.details, highlight=False, markup=False)
        console.print("nothing was written", highlight=False)
        return 1
    except FileExistsError as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written", highlight=False)
        return 130
    if not launch.is_main():
        return 0
    rows, seconds = monitor.in_order(), time.monotonic() - began
    console.print(table(rows))
    console.print(CAPTION, highlight=False, markup=False)
    facts = facts_of_run(_facts(settings), seconds)
    page = write(report, rows, expected, facts)
    if json_file is not None:
        write_json(json_file, rows, expected, facts)
    console.print(f"{summary(rows, expected, seconds)}; report: {page}", highlight=False, soft_wrap=True)
    return 0 if len(rows) == expected and all(row.passed for row in rows) else 1


def _compiler_environment() -> None:
    """For the ranks: one cache of compiled code for all runs, and no pool of compile processes in each."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dion-conformance" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _check_folder(report: Path) -> None:
    """Refuses a folder that the report may not replace, before anything is run."""
    if report.exists() and not (report / "results.json").is_file() and any(report.iterdir()):
        raise FileExistsError(f"{report} is neither empty nor a report; choose another folder with --report")


def _facts(settings: Settings) -> dict[str, str]:
    shape = settings.shape
    steps = "compiled" if settings.compile else "eager"
    return {
        "model": f"byte-level GPT, width {shape.width}, {shape.layers} layers, {shape.heads} heads, "
        f"sequence {shape.length}, fused QKV",
        "text": "New Testament, King James Version, 974,298 bytes (public domain)",
        "run": f"{settings.steps} steps of {settings.sequences} sequences, {settings.device}, {steps} steps",
    }


def _default_ranks(device: str) -> int:
    if device != "cuda":
        return 4
    import torch

    return max(1, torch.cuda.device_count())


def _known(what: str, given: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    for one in given:
        if one not in known:
            raise typer.BadParameter(f"{one!r} is no {what}; choose from {', '.join(known)}")
    return tuple(one for one in known if one in given)


def _nan_at(text: str) -> tuple[int, str]:
    step, _, parameter = text.partition(":")
    if not step.isdigit() or not parameter:
        raise typer.BadParameter(f"{text!r} is not STEP:PARAMETER")
    return int(step), parameter


def _assignment(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not NAME=NUMBER") from None
