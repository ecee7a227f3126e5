"""Files that cannot be trusted: a clear error that names the file, and exit status 2."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conformance.cli import app
from conformance.vectors import VectorError, load
from conformance.vectors.loader import FOLDER
from conformance.vectors.make import make
from conformance.vectors.plans import plans
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
    "no index": (
        lambda f: (f / "index.json").unlink(),
        r"is no folder of vectors: index\.json cannot be read there",
    ),
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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "set"
    make(folder, [plan for plan in plans() if plan.id == "L1/lion/dion/8x8-warm"])
    return folder


def in_index(key: str, value: object) -> Damage:
    """Sets a key of the index, or removes it."""
    return lambda folder: _edit(folder, "index.json", lambda data: _set(data, key, value))


def in_file(key: str, value: object) -> Damage:
    return lambda folder: _edit(folder, "lion.json", lambda data: _set(data, key, value))


def in_case(key: str, value: object) -> Damage:
    return lambda folder: _edit(folder, "lion.json", lambda data: _set(data["cases"][0], key, value))


def in_tolerance(value: object) -> Damage:
    return lambda folder: _edit(
        folder, "lion.json", lambda data: _set(data["cases"][0]["tolerance"]["float32"], "update", value)
    )


def _set(data: dict[str, object], key: str, value: object) -> None:
    data[key] = value
    if value is ...:
        del data[key]


def _edit(folder: Path, name: str, edit: Callable[[Any], None]) -> None:
    """Edits a JSON file and lists its new hash, as someone would who makes a set by hand."""
    data = json.loads((folder / name).read_bytes())
    edit(data)
    (folder / name).write_text(json.dumps(data))
    _list(folder, name)


def _list(folder: Path, name: str) -> None:
    if name != "index.json":
        index = json.loads((folder / "index.json").read_bytes())
        index["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "index.json").write_text(json.dumps(index))


def no_dict(folder: Path) -> None:
    (folder / "lion.json").write_text("[1]")
    _list(folder, "lion.json")


def outside(folder: Path) -> None:
    for name in ("lion.json", "lion.safetensors"):
        shutil.copy(folder / name, folder.parent / name)
    _edit(
        folder,
        "index.json",
        lambda data: _set(data, "files", {f"../{k}": v for k, v in data["files"].items()}),
    )


STRUCTURES: dict[str, tuple[Damage, str]] = {
    **{f"index without {key}": (in_index(key, ...), f"has no '{key}'") for key in ("files", "version", "published")},
    "index with a list of files": (in_index("files", ["lion.json"]), "'files' of the wrong kind"),
    "index with a number as version": (in_index("version", 1), "'version' of the wrong kind"),
    **{f"index of schema {value}": (in_index("schema", value), "schema") for value in (True, 0, -1, 2, "1", 1.0)},
    **{f"file of schema {value}": (in_file("schema", value), r"lion\.json has .*schema") for value in (True, 0, 2)},
    "file that is a list": (no_dict, r"lion\.json has no integer schema"),
    "file without cases": (in_file("cases", ...), "no list of cases"),
    "file with cases that are none": (in_file("cases", [1]), "no list of cases"),
    "no cases": (in_file("cases", []), "empty set"),
    "no files": (in_index("files", {}), "empty set"),
    "file elsewhere": (outside, "which is no file of vectors in its folder"),
    "numbers that are not listed": (in_index("files", {"lion.json": ""}), r"not lion\.safetensors"),
    **{f"case without {key}": (in_case(key, ...), f"has no '{key}'") for key in ("id", "hyper", "tolerance")},
    "case with a shape of text": (in_case("shape", "8x8"), "'shape' of the wrong kind"),
    "case with another shape": (in_case("shape", [8, 9]), r"weight has shape \[8, 8\]"),
    "case with other steps": (in_case("steps", 2), "has shape"),
    "case with a list as hyper": (in_case("hyper", []), "'hyper' of the wrong kind"),
    "case with inputs that are not there": (in_case("inputs", {"weight": "x", "grads": "x"}), "no array 'x'"),
    "case without tolerance of a quantity": (in_tolerance(...), "no float32 tolerance of update"),
    "case that was edited": (in_case("comment", "another"), "not the one that index.json lists as published"),
    "case of another version": (in_case("since", "2026.1.1"), "not the one that index.json lists"),
    "case that is not listed": (in_index("published", {}), "not the one that index.json lists"),
    "listed case that is not there": (
        lambda f: _edit(f, "index.json", lambda data: _set(data["published"], "L1/x", {"since": "", "sha256": ""})),
        r"index\.json lists L1/x, which no file has",
    ),
    "NaN": (in_tolerance(float("nan")), "is no JSON: it has NaN"),
    **{f"tolerance of {v}": (in_tolerance(v), "'tolerance' of the wrong kind") for v in (0, -1.0, True, "1", [])},
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_files_of_another_structure(name: str, small: Path, tmp_path: Path) -> None:
    damage, message = STRUCTURES[name]
    folder = tmp_path / "set"
    shutil.copytree(small, folder)
    assert len(load(folder)) == 1
    damage(folder)
    with pytest.raises(VectorError, match=message):
        load(folder)
    result = CliRunner().invoke(app, ["vectors", "check", "--no-remake", str(folder)])
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.output


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
