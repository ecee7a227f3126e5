"""`conformance converge`: the sweep; `converge gate`: level L5; `converge bands`: the gate's data."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from conformance.named import look_here

converge = typer.Typer(help="The public claims, measured by training here; and the convergence gate.")


@converge.callback(invoke_without_command=True)
def sweep(
    context: typer.Context,
    budget: Annotated[
        float | None, typer.Option(min=0.1, help="Minutes; what does not fit is dropped, and named.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Finished runs and the report; a sweep goes on with what is there.")
    ] = Path("converge"),
    preset: Annotated[
        str, typer.Option(help="tiny (0.1M parameters), small (0.9M), or 160m (needs a GPU).")
    ] = "tiny",
    width: Annotated[int | None, typer.Option(min=32, help="Width of the core's GPT.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Its blocks.")] = None,
    seeds: Annotated[int, typer.Option(min=3, max=10, help="Seeds of every reported number.")] = 4,
    task: Annotated[
        str, typer.Option(help="gpt, or teacher: a student of a random teacher, which needs no data.")
    ] = "gpt",
    text: Annotated[
        str,
        typer.Option(
            help="shakespeare, king-james, new-testament, or a file.  [default: the largest installed]"
        ),
    ] = "",
    images: Annotated[str, typer.Option(help="Folder of Fashion-MNIST.  [default: the usual places]")] = "",
    device: Annotated[str, typer.Option(help="cpu, or cuda (bfloat16 autocast, compiled steps).")] = "cpu",
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            metavar="MODULE:FUNCTION",
            help="Instead of the public claims: an optimizer of yours, made of pairs (name, matrix) and, if the "
            "function takes them, mu or betas, which are tuned as the rate is (repeatable).",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE", help="Rules that the contenders meet besides AdamW (repeatable).  [default: Muon]"
        ),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Measure step times, print the plan and stop.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Tune, train and compare the optimizers on real data; say for each public claim whether it shows here."""
    if context.invoked_subcommand is not None:
        return
    from conformance.convergence.studies import ENTRIES, SCALES, contender

    if against and not contenders:
        raise typer.BadParameter("--against names the rules that a --contender meets; there is none")
    for rule in against or ():
        if rule not in ENTRIES:
            raise typer.BadParameter(f"{rule!r} is no rule; choose from {', '.join(ENTRIES)}")
    if preset not in SCALES:
        raise typer.BadParameter(f"{preset!r} is no preset; choose from {', '.join(SCALES)}")
    scale = SCALES[preset]
    from conformance.convergence.data import TEXTS, largest_text, usual_images
    from conformance.convergence.job import run_sweep

    if task not in ("gpt", "teacher"):
        raise typer.BadParameter(f"{task!r} is no task; choose gpt or teacher")
    if text and text not in TEXTS and not Path(text).is_file():
        raise typer.BadParameter(f"{text!r} is neither a file nor one of {', '.join(TEXTS)}")
    # by name, so that stored runs stay apart when another text or other images are installed later
    spec = replace(scale.spec, width=width or scale.spec.width, layers=layers or scale.spec.layers)
    spec = replace(spec, kind=task, data="" if task == "teacher" else text or largest_text())
    scale = replace(scale, spec=spec, seeds=seeds, images=images or usual_images())

    if contenders:
        look_here()
    try:
        own = [contender(text) for text in contenders or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if len({entry.label for entry in own}) < len(own):
        raise typer.BadParameter("two contenders have functions of the same name; rename one")
    with TemporaryDirectory() as nowhere:  # a plan alone leaves nothing behind
        status = run_sweep(
            scale,
            Path(nowhere) if plan_only and not folder.exists() else folder,
            budget,
            device,
            contenders=own,
            against=against or ("Muon",),
            plan_only=plan_only,
            json_file=json_file,
        )
    raise typer.Exit(status)


@converge.command("gate")
def gate(
    port: Annotated[str, typer.Option(help="ours (dion_dtensor) or oracle (dion_ref).")] = "ours",
    part: Annotated[
        list[str] | None, typer.Option(help="Only this part (repeatable): facts, regression, gpt.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=100_000, help="Fresh problems for every seed.")] = 0,
    inject: Annotated[
        bool, typer.Option("--inject", help="Show that the gate catches every injected bug.")
    ] = False,
    clean: Annotated[int, typer.Option(min=0, help="Run the oracle with this many fresh seeds instead.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all checks to this file.")] = None,
) -> None:
    """Level L5: does dion_dtensor learn as the oracle does?  (Your port: `conformance port --level L5`.)"""
    from conformance.convergence import terminal
    from conformance.convergence.drivers import OraclePort, Port, ProductionPort
    from conformance.convergence.gate import PARTS, Gate

    if port not in ("ours", "oracle"):
        raise typer.BadParameter(
            f"{port!r} is neither ours nor oracle; an adapter of yours is held to this level by "
            "`conformance port MODULE:NAME --level L5`"
        )
    for one in part or ():
        if one not in PARTS:
            raise typer.BadParameter(f"{one!r} is no part; choose from {', '.join(PARTS)}")
    if inject:
        rows = terminal.show_injections(seed)
        _write(json_file, {"injections": rows})
        raise typer.Exit(0 if all(row["seen_by"] for row in rows) else 1)
    if clean:
        alarms = terminal.show_clean_runs(range(seed, seed + clean), tuple(part or ("facts", "regression")))
        _write(json_file, {"runs": clean, "alarms": alarms})
        raise typer.Exit(1 if alarms else 0)
    chosen: Port = ProductionPort() if port == "ours" else OraclePort()
    result = terminal.show_gate(Gate(parts=tuple(part or PARTS), seed=seed), chosen)
    _write(json_file, {**asdict(result), "passed": result.passed})
    raise typer.Exit(0 if result.passed else 1)


@converge.command("bands")
def bands(
    file: Annotated[Path | None, typer.Option(help="Where they go.  [default: the file that ships]")] = None,
    algorithm: Annotated[list[str] | None, typer.Option(help="Only this one (repeatable).")] = None,
) -> None:
    """Measure the gate's bands: 50 seeds of the oracle on every problem; about five minutes."""
    from rich.progress import track

    from conformance.convergence.bands import FILE, SEEDS, SETTINGS, make
    from conformance.convergence.regression import PROBLEMS

    for one in algorithm or ():
        if one not in SETTINGS:
            raise typer.BadParameter(f"{one!r} is no algorithm; choose from {', '.join(SETTINGS)}")
    path = file or Path(str(resources.files("conformance.convergence").joinpath(FILE)))
    chosen = tuple(algorithm or SETTINGS)
    runs = make(path, chosen)
    for _ in track(runs, description="bands", total=len(chosen) * len(PROBLEMS) * SEEDS):
        pass
    typer.echo(f"wrote {path}")


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **content}, indent=1) + "\n")
