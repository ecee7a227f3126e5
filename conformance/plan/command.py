"""`conformance plan`: what an optimizer step costs on a mesh that need not be there."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from conformance.named import look_here
from conformance.report.live import live_bar

if TYPE_CHECKING:
    from conformance.plan.estimate import Estimate
    from dion_dtensor.planning import Hardware

WITH_GRADIENTS = (
    *("adamw", "muon", "dion:1/4", "dion:1/4:unaveraged", "dion:1/16", "dion:1/16:unaveraged"),
    *("dion:1/64", "dion:1/64:unaveraged", "dion2:1/4", "dion2:1/8"),
)
USUAL = (
    *("adamw", "muon"),
    *(f"dion:1/{2**k}" if k else "dion" for k in range(7)),
    *(f"dion2:1/{2**k}" if k else "dion2" for k in range(4)),
)


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="gpt-160m, llama3-8b, llama3-70b, llama3-405b, mixtral-8x7b, a config.json of Hugging Face, or"
            " package.module:function that builds an nn.Module."
        ),
    ] = "llama3-405b",
    mesh: Annotated[
        str, typer.Option(help="Sizes of the axes: fsdp, fsdp x tp, or dp x fsdp x tp.")
    ] = "16x64x8",
    axes: Annotated[str | None, typer.Option(help="Their names, as dp,fsdp,tp.")] = None,
    shard: Annotated[
        list[str] | None,
        typer.Option(
            help="AXIS=DIM, 0 for rows, 1 for columns, of every weight (repeatable).  [default: as the axes do it]"
        ),
    ] = None,
    optimizers: Annotated[
        list[str] | None,
        typer.Option(
            "--optimizer",
            help="adamw, muon, normuon, dion:1/4, dion:1/4:unaveraged, dion2:1/4, dion3:1/4 (repeatable).",
        ),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also count what averages the gradients over dp.")
    ] = False,
    ranks: Annotated[
        str,
        typer.Option(
            "--hardware",
            help="h100: hosts of eight; here: this CPU, its products timed one by one, links left out.",
        ),
    ] = "h100",
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the orthonormalization.  [default: as the optimizers': bfloat16, float32 for here]"
        ),
    ] = None,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of an H100's peaks that is reached.")
    ] = 0.6,
    flops: Annotated[
        list[str] | None, typer.Option(help="DTYPE=FLOP/s of a rank, as bfloat16=989e12 (repeatable).")
    ] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Bytes/s of a rank on each axis, by commas.")] = None,
    latency: Annotated[
        str | None, typer.Option(help="Seconds of a collective on each axis, by commas.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the bars to this PNG.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Count what one optimizer step launches on each rank, and price it.

    The step of dion_dtensor itself runs on tensors without data and on a process group of as many fake ranks: FLOPs,
    bytes by axis and peak memory are counted, passes through memory are in closed form. Where nothing else is said,
    ranks are H100s in hosts of eight. Exit status 0 if all was counted.
    """
    # Imported here: `--help` need not wait for torch.
    import torch

    from conformance.plan.estimate import MESH_AXES, candidate, estimates
    from conformance.plan.figure import draw
    from conformance.plan.hardware import h100, this_machine
    from conformance.plan.models import model_of
    from conformance.plan.operators import Stopwatch
    from conformance.port.output import json_bytes, write_whole

    sizes = _sizes(mesh)
    names = tuple(axes.split(",")) if axes else MESH_AXES.get(len(sizes), ())
    if len(names) != len(sizes) or not set(names) <= {"dp", "fsdp", "tp"} or len(set(names)) < len(names):
        raise typer.BadParameter(
            f"mesh {mesh} needs {len(sizes)} names of dp, fsdp, tp in --axes, not {axes!r}"
        )
    dims = {}
    for text in shard or ():
        name, _, dim = text.partition("=")
        if name not in names or name == "dp" or dim not in ("0", "1"):
            raise typer.BadParameter(
                f"--shard {text!r} must be AXIS=0 or AXIS=1, of the axes {', '.join(names)} but dp"
            )
        dims[name] = int(dim)
    try:
        chosen = [candidate(text) for text in optimizers or (WITH_GRADIENTS if gradients else USUAL)]
        look_here()
        built = model_of(model)
        if ranks not in ("h100", "here"):
            raise ValueError(f"--hardware {ranks!r} must be h100 or here")
        dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        if compute_dtype not in (None, *dtypes):
            raise ValueError(f"--compute-dtype {compute_dtype!r} must be one of {', '.join(dtypes)}")
        computed = dtypes[compute_dtype or ("float32" if ranks == "here" else "bfloat16")]
        known = h100(sizes, efficiency) if ranks == "h100" else this_machine(sizes)
        hardware = _with(known, flops, bandwidth, latency, len(sizes))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console() if sys.stdout.isatty() else Console(width=150)
    with live_bar(console) as progress:
        task = progress.add_task("", total=len(chosen) * len(built.weights))

        def told(said: str) -> None:
            progress.update(task, description=said[:40].ljust(40), advance=1)

        stopwatch = Stopwatch(hardware.flops, frozenset(_stated(flops))) if ranks == "here" else None
        done = estimates(
            built,
            sizes,
            names,
            chosen,
            hardware,
            gradients=gradients,
            dims=dims,
            compute_dtype=computed,
            stopwatch=stopwatch,
            told=told,
        )
    what = "Optimizer step and averages of gradients" if gradients else "Optimizer step"
    title = f"{built.name} ({built.size / 1e9:.3g}B parameters) on {'x'.join(map(str, sizes))} ({', '.join(names)})"
    console.print(_table(f"{what}, {title}", done, names))
    console.print(LEGEND, highlight=False)
    console.print(f"{hardware.name}; {hardware.source}", highlight=False)
    if stopwatch is not None and stopwatch.priced:
        priced, timed = len(stopwatch.priced), len(stopwatch.known)
        console.print(
            f"{priced} kinds of operators by their FLOPs at the rate, not timed; {timed} times measured",
            highlight=False,
        )
    parts = [_parts(one, names, hardware) for one in done]
    if picture is not None:
        draw(done, names, f"{what}, {title}", parts, picture)
    if json_file is not None:
        rows = [_row(one, part, names) for one, part in zip(done, parts, strict=True)]
        about: dict[str, Any] = {
            "model": built.name,
            "parameters": built.size,
            "mesh": dict(zip(names, sizes, strict=True)),
            "compute dtype": str(computed).removeprefix("torch."),
            "operators": "timed" if stopwatch is not None else "by their FLOPs",
        }
        about["hardware"] = {
            "name": hardware.name,
            "flops": dict(hardware.flops),
            "source": hardware.source,
            "memory bandwidth": hardware.memory_bandwidth,
            # None where links cost nothing: JSON has no infinity.
            "bandwidth": [value if math.isfinite(value) else None for value in hardware.bandwidth],
            "latency": list(hardware.latency),
        }
        write_whole(json_file, json_bytes(about | {"optimizers": rows}))


LEGEND = (
    "compute: products and passes through memory; links: bytes between ranks; in turn: one after the other; "
    "overlapped: at once, the longer of the two; of Muon's: times in turn."
)


def _sizes(mesh: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", mesh):
        raise typer.BadParameter(f"mesh {mesh!r} must be one to three sizes, as 16x64x8")
    return tuple(int(size) for size in mesh.split("x"))


def _with(
    hardware: Hardware, flops: Sequence[str] | None, bandwidth: str | None, latency: str | None, axes: int
) -> Hardware:
    from dataclasses import replace

    changes: dict[str, Any] = {}
    if flops:
        changes["flops"] = {**hardware.flops, **_stated(flops)}
    for name, text in (("bandwidth", bandwidth), ("latency", latency)):
        if text is not None:
            changes[name] = [float(value) for value in text.split(",")]
            if len(changes[name]) != axes:
                raise ValueError(f"{name}={text!r} must have {axes} numbers, one an axis")
    if changes:
        changes |= {"name": f"{hardware.name}, with what was stated", "source": f"{hardware.source}; stated"}
    return replace(hardware, **changes)


def _stated(flops: Sequence[str] | None) -> dict[str, float]:
    """FLOP/s by dtype."""
    return {name: float(value) for name, _, value in (text.partition("=") for text in flops or ())}


def _table(title: str, done: Sequence[Estimate], names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("optimizer")
    sent = [f"MB on {name}" for name in names]
    for name in ("TFLOP", *sent, "peak GB", "compute", "links", "in turn", "overlapped", "of Muon's"):
        table.add_column(name, justify="right")
    muon = next((one.time.serial for one in done if one.candidate.algorithm == "muon"), math.nan)
    for one in done:
        relative = one.time.serial / muon
        table.add_row(
            str(one.candidate),
            f"{sum(one.cost.flops.values()) / 1e12:.3g}",
            *(f"{one.cost.bytes(axis) / 1e6:.4g}" for axis in range(len(names))),
            f"{one.cost.memory / 1e9:.3g}",
            *(f"{1e3 * value:.4g} ms" for value in (one.time.compute, one.time.communicate, one.time.serial)),
            f"{1e3 * one.time.overlapped:.4g} ms",
            "" if math.isnan(relative) else f"{relative:.3f}",
        )
    return table


def _parts(one: Estimate, names: Sequence[str], hardware: Hardware) -> dict[str, float]:
    """Seconds of products, of passes through memory, and of each axis."""
    memory = one.cost.touched / hardware.memory_bandwidth
    parts = {"products": one.time.compute - memory - one.host, "memory": memory, "host": one.host}
    for axis, name in enumerate(names):
        parts[f"links of {name}"] = sum(
            t.bytes / hardware.bandwidth[axis] + hardware.latency[axis]
            for t in one.cost.transfers
            if t.axis == axis
        )
    return parts


def _row(one: Estimate, parts: dict[str, float], names: Sequence[str]) -> dict[str, Any]:
    return {
        "optimizer": str(one.candidate),
        "flops": one.cost.flops,
        "bytes": {
            name: {
                kind: sum(t.bytes for t in one.cost.transfers if t.axis == axis and t.collective == kind)
                for kind in sorted({t.collective for t in one.cost.transfers if t.axis == axis})
            }
            for axis, name in enumerate(names)
        },
        "peak memory": one.cost.memory,
        "seconds": parts | {"in turn": one.time.serial, "overlapped": one.time.overlapped},
        "closed form": {"flops": one.predicted[0], "bytes": one.predicted[1]},
    }
