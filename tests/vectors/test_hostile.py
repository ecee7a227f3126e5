"""Files that cannot be trusted: a clear error that names the file, and exit status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from conformance.cli import app
from conformance.vectors import VectorError, load
from conformance.vectors.loader import FOLDER
from conformance.vectors.tensors import from_bytes, to_bytes

Damage = Callable[[Path], object]


def truncate(folder: Path) -> None:
    path = folder / "muon.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def tamper(folder: Path) -> None:
    path = folder / "muon.json"
    path.write_bytes(path.read_bytes().replace(b'"nesterov": true', b'"nesterov": false', 1))


def from_the_future(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate, r"muon\.safetensors is not the file that index\.json lists"),
    "tampered": (tamper, r"muon\.json is not the file"),
    "renamed": (lambda f: (f / "dion.json").rename(f / "dion_.json"), r"dion\.json cannot be read"),
    "schema from the future": (from_the_future, "schema 99, this loader reads up to 1; install a newer"),
    "no index": (lambda f: (f / "index.json").unlink(), r"index\.json cannot be read"),
    "index is no JSON": (lambda f: (f / "index.json").write_text("{"), r"index\.json is no JSON"),
    "index of something else": (lambda f: (f / "index.json").write_text("[]"), "no integer schema version"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    folder = tmp_path / "set"
    shutil.copytree(FOLDER, folder)
    load(folder)
    damage(folder)
    with pytest.raises(VectorError, match=message):
        load(folder)
    result = CliRunner().invoke(app, ["vectors", "check", "--no-remake", str(folder)])
    assert result.exit_code == 2
    assert "error:" in result.stderr
    assert "Traceback" not in result.output
    port = CliRunner().invoke(app, ["port", "conformance.adapters.oracle:adapter", "--vectors", str(folder)])
    assert port.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\xff" * 16, "header should have"),
        ((2).to_bytes(8, "little") + b"{]", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "no safetensors file"),
        (to_bytes({"x": np.zeros(4)})[:-8], "x lies beyond its end"),
    ],
)
def test_bytes_that_are_no_safetensors(content: bytes, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        from_bytes(content, "file")


def test_the_shipped_set_is_as_listed() -> None:
    result = CliRunner().invoke(app, ["vectors", "check", "--no-remake"])
    assert result.exit_code == 0, result.output
    assert "hashes as listed" in result.output
