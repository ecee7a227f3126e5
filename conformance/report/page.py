"""The report's folder: results.json, the pictures, and one page that holds them all."""

from __future__ import annotations

import base64
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment

from conformance.job.results import Row, all_passed
from conformance.report.plots import draw
from conformance.report.terminal import CAPTION, summary


def facts_of_run(options: Mapping[str, Any], seconds: float) -> dict[str, str]:
    """When, with what and where the job ran, in words."""
    try:
        version = metadata.version("dion-conformance")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "took": f"{seconds:.0f} s",
        "versions": f"dion-conformance {version}, torch {torch.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        **{key: str(value) for key, value in options.items()},
    }


def results_of(rows: Sequence[Row], expected: int, facts: Mapping[str, str]) -> dict[str, Any]:
    """All results, JSON-ready."""
    return {
        "passed": all_passed(rows, expected),
        "expected_rows": expected,
        "run": dict(facts),
        "rows": [row.to_json() for row in rows],
    }


def render(rows: Sequence[Row], expected: int, facts: Mapping[str, str], pictures: Mapping[str, Path]) -> str:
    """The page as HTML that needs no other file."""
    template = resources.files("conformance.report").joinpath("template.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    embedded = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    passed = all_passed(rows, expected)
    shown = {key: value for key, value in facts.items() if key != "seconds"}
    count = summary(rows, expected, 0.0).rsplit(" in ", 1)[0]
    return page.render(
        rows=rows,
        passed=passed,
        verdict=f"{'pass' if passed else 'FAIL'}: {count}",
        facts=shown,
        pictures=embedded,
        caption=CAPTION,
        meshes={row.mesh: row.layouts for row in rows},
    )


def write(folder: Path, rows: Sequence[Row], expected: int, facts: Mapping[str, str]) -> Path:
    """Writes results.json, the PNGs and index.html to `folder`, replacing an older report; returns the page.

    The folder appears whole or not at all: everything is written beside it first, then renamed.

    Raises:
        FileExistsError: `folder` holds something that is no report.
    """
    folder = folder.absolute()
    if folder.exists() and not (folder / "results.json").is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is neither empty nor a report; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        pictures = draw(rows, temporary)
        (temporary / "results.json").write_text(json.dumps(results_of(rows, expected, facts), indent=1))
        (temporary / "index.html").write_text(render(rows, expected, facts, pictures), encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder / "index.html"


def write_json(path: Path, rows: Sequence[Row], expected: int, facts: Mapping[str, str]) -> None:
    """Writes the results to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results_of(rows, expected, facts), indent=1))
    temporary.replace(path)
