"""A run as a table on the terminal, as JSON and as JUnit XML."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.port.grading import (
    ACCEPTABLE,
    BAD,
    ERROR,
    FAIL,
    PASS,
    SKIP,
    UNCLAIMED,
    UNDECIDED,
    XFAIL,
    XPASS,
    Verdict,
)
from conformance.port.runner import Run

STATUSES = (PASS, ACCEPTABLE, FAIL, ERROR, XFAIL, XPASS, SKIP, UNDECIDED)
"""In the order of the columns; what is not claimed is counted apart."""
OPEN = (ACCEPTABLE, UNDECIDED, SKIP)
"""Neither passed nor failed: the reasons are told."""
ORDINARY = re.compile(r"/(?!1x|\d+x1-)\d+x\d+-(warm|fresh)$")
"""Ids of cases with nothing special about them."""
ROOM = (
    "bfloat16 leaves room: what changes an update by less than 1 to 50 % passes. "
    "If the port can compute in float32, claim that as well."
)
NO_MOMENTUM = (
    "no case with momentum was run, so a port without any would pass: "
    "claim the feature 'state', 'schedule:lr' or 'schedule:mu'"
)


def command_of(run: Run, adapter: str, verdict: Verdict) -> str:
    """The command that runs one verdict's case again, with the options of this run that are not the defaults."""
    words = ["conformance", run.command]
    if run.command == "port":
        words.append(adapter)
    words += ["--level", verdict.level, "--case", verdict.id, *run.options]
    if verdict.status == XPASS:
        words += run.xfail  # without the file it would pass
    return shlex.join([*words, "--traceback"] if run.command == "port" else words)


def changed(options: Mapping[str, tuple[object, object]]) -> tuple[str, ...]:
    """The command line of those options, given as value and default, whose value is another."""
    words: list[str] = []
    for name, (value, default) in options.items():
        if value is True:
            words.append(name)
        elif value not in (None, default):
            words += [name, f"{value:g}" if isinstance(value, float) else str(value)]
    return tuple(words)


def rows(run: Run) -> list[tuple[tuple[str, str, str, str], Counter[str], float]]:
    """By (algorithm, dialect, level, dtype): how often each status, and the largest share of a tolerance."""
    counted: dict[tuple[str, str, str, str], Counter[str]] = {}
    used: dict[tuple[str, str, str, str], float] = {}
    for one in run.verdicts:
        if one.status == UNCLAIMED:
            continue
        key = (one.algorithm, one.dialect, one.level, one.dtype)
        counted.setdefault(key, Counter())[one.status] += 1
        # What is acceptable lies outside of a tolerance that is not its own.
        used[key] = max(used.get(key, 0.0), 0.0 if one.status == ACCEPTABLE else one.used)
    return [(key, counts, used[key]) for key, counts in counted.items()]


def table(run: Run) -> Table:
    """One line an (algorithm, dialect, level, dtype)."""
    made = Table(title=f"{run.port.name} against the oracle", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("algorithm", "dialect", "level", "dtype"):
        made.add_column(name)
    shown = [status for status in STATUSES if run.count(status)]
    for name in (*shown, "of tolerance"):
        made.add_column(name, justify="right")
    for key, counts, used in rows(run):
        numbers = [
            Text(str(counts[status] or "-"), style="bold red" if status in BAD and counts[status] else "")
            for status in shown
        ]
        share = (
            "-" if counts[PASS] + counts[FAIL] == 0 else f"{100 * used:.0f} %" if used < 100 else "> 9999 %"
        )
        made.add_row(*key, *numbers, share)
    return made


def not_claimed(run: Run) -> str:
    """What the port does not claim, in one line."""
    named: dict[str, list[str]] = {}
    for level in run.levels:
        if level not in run.port.levels:
            named.setdefault("levels", []).append(level)
    unclaimed = [one for one in run.verdicts if one.status == UNCLAIMED]
    for message in dict.fromkeys(one.message for one in unclaimed):
        kind, _, what = message.partition(" ")
        if kind == "dialect":
            dialect, _, algorithm = what.partition(" of ")
            kind, what = f"other dialects of {algorithm}", dialect
        kind = {"level": "levels", "algorithm": "algorithms", "dtype": "dtypes", "feature": "features"}.get(
            kind, kind
        )
        listed = named.setdefault(kind, [])
        listed += [one for one in what.split(", ") if one not in listed]
    if states := dict.fromkeys(key for one in run.verdicts for key in one.ungraded):
        named["states"] = list(states)
    if not named:
        return "everything selected is claimed" if run.only else "everything is claimed"
    parts = [
        f"{kind} ({len(listed)})" if kind.startswith("other") else f"{kind} {', '.join(listed)}"
        for kind, listed in named.items()
    ]
    return "not claimed: " + "; ".join(parts)


def summary(run: Run, seconds: float) -> str:
    """The last line."""
    parts = [f"{run.count(status)} {status}" for status in (*STATUSES, UNCLAIMED) if run.count(status)]
    return f"{'pass' if run.passed else 'FAIL'}: {', '.join(parts) or 'nothing was run'}; {seconds:.0f} s"


def show(
    run: Run, adapter: str, console: Console, seconds: float, *, limit: int = 10, details: bool = False
) -> None:
    """Table, failures with their commands, what explains them, what was left open, and the last line."""
    console.print(table(run))
    bad = alike([one for one in run.verdicts if one.status in BAD])
    for one, others in bad[:limit]:
        console.print(f"{one.status}: {one.id} on {one.layout}: {one.message}", style="red", **_PLAIN)
        if one.about:
            console.print(f"    the case: {one.about}", **_PLAIN)
        if others:
            console.print(f"    and {len(others)} more like it, such as {others[0].id}", **_PLAIN)
        console.print(f"    {command_of(run, adapter, one)}", **_PLAIN)
        if details and one.details:
            console.print(one.details, **_PLAIN)
    if len(bad) > limit:
        console.print(f"... and {len(bad) - limit} more kinds; see --json, --junit or --html", **_PLAIN)
    for fit in run.fits:
        console.print(f"claimed {fit.claimed} ({fit.algorithm}, {fit.dtype}): {fit}", **_PLAIN)
    for one, others in alike([one for one in run.verdicts if one.status in OPEN]):
        more = f" and {len(others)} more" if others else ""
        console.print(f"{one.status}: {one.id}{more}: {one.message}", **_PLAIN)
    console.print(not_claimed(run), **_PLAIN)
    for what in run.without_momentum:
        console.print(f"{what}: {NO_MOMENTUM}", **_PLAIN)
    if run.passed and {one.dtype for one in run.verdicts if one.status == PASS} == {"bfloat16"}:
        console.print(ROOM, **_PLAIN)
    console.print(summary(run, seconds), **_PLAIN)


def alike(verdicts: Sequence[Verdict]) -> list[tuple[Verdict, list[Verdict]]]:
    """Verdicts whose messages differ in numbers alone, put together: one to show, and the others.

    Shown is the one furthest off of the ordinary cases, or of all where there is none: an exotic one needs explaining.
    """
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for one in verdicts:
        groups.setdefault((one.status, re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", one.message)), []).append(one)
    found = []
    for group in groups.values():
        shown = max(group, key=lambda one: (ORDINARY.search(one.case) is not None, one.used))
        found.append((shown, [one for one in group if one is not shown]))
    return found


_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


def facts(run: Run, adapter: str, vectors: str, seconds: float) -> dict[str, str]:
    """What was run, when and on what."""
    try:
        own = metadata.version("dion-conformance")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "port": f"{run.port.name} {run.port.version()}",
        "adapter": adapter,
        "vectors": vectors,
        "suite": f"dion-conformance {own}, Python {platform.python_version()}",
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "took": f"{seconds:.0f} s",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def as_json(run: Run, about: dict[str, str], adapter: str) -> dict[str, Any]:
    """Everything, JSON-ready."""
    return {
        "passed": run.passed,
        "run": about,
        "counts": {status: run.count(status) for status in (*STATUSES, UNCLAIMED)},
        "fits": [{**vars(fit), "error": number(fit.error), "text": str(fit)} for fit in run.fits],
        "verdicts": [
            {
                "case": one.case,
                "level": one.level,
                "algorithm": one.algorithm,
                "dialect": one.dialect,
                "dtype": one.dtype,
                "layout": one.layout,
                "status": one.status,
                "message": one.message,
                "about": one.about,
                "errors": {name: [number(error), allowed] for name, (error, allowed) in one.errors.items()},
                "seconds": round(one.seconds, 4),
                **({"command": command_of(run, adapter, one)} if one.status in BAD else {}),
            }
            for one in run.verdicts
        ],
    }


def number(value: float) -> float | str:
    """Four digits; a string where JSON has no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def as_junit(run: Run, adapter: str) -> bytes:
    """One testcase a verdict; not claimed, skipped, xfailed and undecided ones are skipped there."""
    suite = ElementTree.Element("testsuite", name=f"conformance {run.port.name}")
    counts: Counter[str] = Counter()
    for one in run.verdicts:
        name = f"{one.level}.{one.algorithm}.{one.dialect}"
        case = ElementTree.SubElement(
            suite, "testcase", classname=name, name=one.id, time=f"{one.seconds:.4f}"
        )
        counts["tests"] += 1
        if one.status in BAD:
            kind = "error" if one.status == ERROR else "failure"
            counts["errors" if one.status == ERROR else "failures"] += 1
            element = ElementTree.SubElement(case, kind, message=_printable(one.message))
            text = [
                command_of(run, adapter, one),
                *([f"the case: {one.about}"] if one.about else []),
                one.details,
            ]
            element.text = _printable("\n".join(text))
        elif one.status not in (PASS, ACCEPTABLE):
            counts["skipped"] += 1
            ElementTree.SubElement(case, "skipped", message=_printable(f"{one.status}: {one.message}"))
    for key in ("tests", "failures", "errors", "skipped"):
        suite.set(key, str(counts[key]))
    written: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return written


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def json_bytes(data: object) -> bytes:
    """JSON with a line a value."""
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def layouts(verdicts: Sequence[Verdict]) -> list[str]:
    """The layouts in order of appearance."""
    return list(dict.fromkeys(one.layout for one in verdicts))
