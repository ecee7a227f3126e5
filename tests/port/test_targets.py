"""Files that cannot be written, or are named twice, are refused before anything is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.cli import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["port", "no.such:adapter", "--json", "x", "--html", "./x"], "x is named twice"),
        (["port", "no.such:adapter", "--junit", "x", "--html", "x"], "x is named twice"),
        (["meshes", "--json", "x", "--junit", "x"], "x is named twice"),
        (["mutants", "--json", "/no/such/dir/x"], "does not exist"),
        (["vectors", "check", "--json", "/no/such/dir/x"], "/no/such/dir does not exist"),
    ],
)
def test_refused_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mutants.hunt.hunt", "port.command.claims_of", "vectors.command.load"):
        monkeypatch.setattr(f"conformance.{name}", lambda *_, **__: pytest.fail("it ran"))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
