"""`conformance vectors make` and `conformance vectors check`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from conformance.report.live import live_bar
from conformance.vectors.loader import FOLDER, VectorSet, load, read_index
from conformance.vectors.published import PUBLISHED, check_set
from conformance.vectors.tensors import VectorError

app = typer.Typer(
    help="The test vectors: make them from the oracle, or check those that are there.", no_args_is_help=True
)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    console = Console(stderr=True)
    with live_bar(console) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, description=name[:48].ljust(48), advance=1)


@contextmanager
def _errors() -> Iterator[None]:
    """Bad files and folders end with one line and status 2."""
    try:
        yield
    except (VectorError, OSError) as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        raise typer.Exit(2) from None


@app.command("make")
def make(
    folder: Annotated[
        Path, typer.Argument(help="Where the set is written; an older set there is replaced.")
    ] = FOLDER,
) -> None:
    """Write the set anew from the oracle: the same bytes on every machine.

    A published case that would change or vanish is refused; then nothing is written. New cases of the shipped set are
    appended to published.txt; a set elsewhere is a trial.
    """
    from conformance.vectors.make import make as make_set
    from conformance.vectors.plans import plans

    with _errors(), _progress(len(list(plans()))) as progress:
        hashes = make_set(folder, progress=progress, published=PUBLISHED, extend=_is_shipped(folder))
    for name, digest in sorted(hashes.items()):
        typer.echo(f"{digest}  {name}")


@app.command("check")
def check(
    folder: Annotated[Path, typer.Argument(help="The set to check.")] = FOLDER,
    remake: Annotated[
        bool, typer.Option("--remake/--no-remake", help="Make the set again and compare the bytes.")
    ] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Check every file and case against the index and published.txt, and make the set again to compare it byte by byte.

    Exit status 0: all as it should be; 1: other bytes; 2: a file that cannot be read or trusted.
    """
    from conformance.port.targets import check_targets

    with _errors():
        check_targets([json_file] if json_file is not None else [])
        found = load(folder)
        check_set(found.version, read_index(folder)["published"], shipped=_is_shipped(folder))
    different = _different(folder) if remake else []
    for name in different:
        typer.echo(f"{name}: other bytes than the oracle gives")
    result = "made again, byte for byte" if remake and not different else f"{len(different)} files differ"
    typer.echo(f"{len(found)} cases of {found.version}: {result if remake else 'hashes as listed'}")
    if json_file is not None:
        summary = {
            "cases": len(found),
            "version": found.version,
            "levels": _levels(found),
            "different": different,
        }
        json_file.write_text(json.dumps(summary, indent=1) + "\n")
    if different:
        raise typer.Exit(1)


def _is_shipped(folder: Path) -> bool:
    return folder.resolve() == FOLDER.resolve()


def _different(folder: Path) -> list[str]:
    from conformance.vectors.make import contents_of
    from conformance.vectors.plans import plans

    chosen = list(plans())
    with _errors(), _progress(len(chosen)) as progress:
        contents = contents_of(chosen, progress)
    return [
        name
        for name, content in contents.items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != content
    ]


def _levels(found: VectorSet) -> dict[str, int]:
    levels = [case.level for case in found]
    return {level: levels.count(level) for level in sorted(set(levels))}
