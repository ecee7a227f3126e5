"""`conformance mutants`: a table of mistakes and of the levels that notice them."""

from __future__ import annotations

import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.report.live import live_bar


def mutants(
    only: Annotated[
        list[str] | None, typer.Option(help="Only names that match this glob (repeatable).")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Only those of L0 to L2, without ranks.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table to this file.")] = None,
) -> None:
    """Put mistakes into the oracle and into ports, and see whether the suite notices at the level that should.

    L3 and L4 run on four local ranks. Exit status 0 only if every mutant is caught there; one that no longer fits the
    code is not.
    """
    # Imported here: `--help` need not wait for torch.
    from conformance.mutants.catalogue import mutants as every
    from conformance.mutants.hunt import LOCAL, Catch, hunt
    from conformance.port.output import json_bytes, write_whole
    from conformance.port.targets import check_targets
    from conformance.vectors import load

    console = Console() if sys.stdout.isatty() else Console(width=160)
    began = time.monotonic()
    known = [one for one in every() if not local or one.level in LOCAL]
    for pattern in only or ():
        if not any(fnmatchcase(one.name, pattern) for one in known):
            names = "".join(f"\n  {name}" for name in dict.fromkeys(one.name for one in known))
            typer.echo(f"error: --only {pattern!r} matches no mutant; there are{names}", err=True)
            raise typer.Exit(2)
    chosen = [one for one in known if not only or any(fnmatchcase(one.name, pattern) for pattern in only)]
    try:
        check_targets([json_file] if json_file is not None else [])
    except OSError as error:
        raise typer.BadParameter(str(error)) from None
    with live_bar(console) as progress:
        task = progress.add_task("", total=len(chosen))

        def following(catch: Catch) -> None:
            progress.update(task, description=catch.mutant.name[:48].ljust(48), advance=1)

        catches = hunt(load(), chosen, following)
    made = Table(title="Mistakes, and the levels that notice them", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("mistake", "in", "should notice", "noticed", "first case", "what it says"):
        made.add_column(name, overflow="fold")
    for one in catches:
        level = one.mutant.level if one.right else next(iter(one.caught), "-")
        case, said = one.caught.get(level, ("-", f"does not apply: {one.unfit}" if one.unfit else "nothing"))
        style = "" if one.right else "bold red"
        made.add_row(
            one.mutant.name, one.mutant.subject, one.mutant.level, Text(level, style), case, said[:80]
        )
    console.print(made)
    caught = sum(one.right for one in catches)
    for one in catches:
        if one.unfit:
            console.print(
                f"does not apply: {one.mutant.name} ({one.mutant.subject}): {one.unfit}",
                style="red", highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        elif not one.right:
            console.print(
                f"survived at {one.mutant.level}: {one.mutant.name} ({one.mutant.subject})", style="red"
            )
    console.print(f"{caught} of {len(catches)} caught in {time.monotonic() - began:.0f} s", highlight=False)
    if json_file is not None:
        rows = [
            {
                "mistake": one.mutant.name,
                "in": one.mutant.subject,
                "level": one.mutant.level,
                "caught": {level: {"case": case, "says": said} for level, (case, said) in one.caught.items()},
                "missed": one.missed,
                "unfit": one.unfit,
                "seconds": round(one.seconds, 2),
            }
            for one in catches
        ]
        write_whole(json_file, json_bytes({"caught": caught, "mutants": rows}))
    raise typer.Exit(0 if caught == len(catches) else 1)
