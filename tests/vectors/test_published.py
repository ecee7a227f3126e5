"""What is published stays as it is: the list of digests, which only grows, and the one change that is allowed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conformance.adapters import Capabilities
from conformance.cli import app
from conformance.port.runner import Selection, jobs
from conformance.vectors import VectorError, load, published
from conformance.vectors.loader import FOLDER
from conformance.vectors.make import make
from conformance.vectors.plans import DEPRECATED, VERSION, Plan, plans
from conformance.vectors.tensors import from_bytes

EVERY = {plan.id: plan for plan in plans()}
FIRST = 588, "236bbb5ae0a854c3f165a3c176349b8d37f0552bc71502916d96cf8dbc1aaac8"
"""Lines of published.txt when it was begun, and their SHA-256. Add the same of later releases; change nothing."""


def some() -> list[Plan]:
    return [replace(EVERY[f"L1/{name}/dion/8x8-warm"], since=VERSION) for name in ("lion", "adamw")]


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """The list of a set that was made from `some`."""
    path = tmp_path / "published.txt"
    path.touch()
    make(tmp_path / "set", some(), published=path, extend=True)
    return path


def test_the_list_only_grows() -> None:
    count, digest = FIRST
    lines = published.PUBLISHED.read_bytes().splitlines(keepends=True)
    assert hashlib.sha256(b"".join(lines[:count])).hexdigest() == digest


def test_the_shipped_set_is_listed_and_no_other_case() -> None:
    index = json.loads((FOLDER / "index.json").read_bytes())
    assert published.read_published() == index["published"]


def test_new_cases_are_appended(listed: Path, tmp_path: Path) -> None:
    before = listed.read_text()
    assert [line.split()[0] for line in before.splitlines()] == [plan.id for plan in some()]
    new = replace(EVERY["L1/lion/dion/8x8-nan"], since=VERSION)
    make(tmp_path / "trial", [new, *some()], published=listed)
    assert listed.read_text() == before
    make(tmp_path / "set", [new, *some()], published=listed, extend=True)
    after = listed.read_text()
    assert after.startswith(before)
    assert [line.split()[0] for line in after.removeprefix(before).splitlines()] == [new.id]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published.txt", "set", "trial"]


def test_a_new_case_is_of_this_version(listed: Path, tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="L1/lion/dion/8x8-nan is new: it appears in"):
        make(tmp_path / "set", [EVERY["L1/lion/dion/8x8-nan"], *some()], published=listed, extend=True)


EDITS: dict[str, tuple[Callable[[list[Plan]], list[Plan]], str]] = {
    "another number": (lambda p: [replace(p[0], hyper=replace(p[0].hyper, lr=0.06)), p[1]], "new id"),
    "another comment": (lambda p: [replace(p[0], comment="other"), p[1]], "new id"),
    "another version": (lambda p: [replace(p[0], since="2026.1.1"), p[1]], "new id"),
    "none": (lambda p: p[1:], "deprecate it"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_shows_where_the_data_are_made_anew(name: str, listed: Path, tmp_path: Path) -> None:
    edit, message = EDITS[name]
    before = listed.read_text()
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(VectorError, match=message):
        make(tmp_path / "set", edit(some()), published=listed, extend=True)
    assert listed.read_text() == before
    assert not (tmp_path / "set").exists()


def test_the_command_refuses_what_vanished_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("conformance.vectors.plans.plans", lambda: list(EVERY.values())[1:])
    monkeypatch.setattr("conformance.vectors.make.plans", lambda: list(EVERY.values())[1:])
    monkeypatch.setattr("conformance.vectors.make.contents_of", lambda *_: pytest.fail("computed"))
    done = CliRunner().invoke(app, ["vectors", "make", str(tmp_path / "set")])
    assert done.exit_code == 2
    assert "deprecate it" in done.stderr


def _edited(folder: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    """Edits the cases of muon.json, and lists the file's new hash and all digests anew."""
    data = json.loads((folder / "muon.json").read_bytes())
    edit(data["cases"])
    (folder / "muon.json").write_text(json.dumps(data))
    index = json.loads((folder / "index.json").read_bytes())
    index["files"]["muon.json"] = hashlib.sha256((folder / "muon.json").read_bytes()).hexdigest()
    numbers = from_bytes((folder / "muon.safetensors").read_bytes(), "muon.safetensors")
    others = {case: entry for case, entry in index["published"].items() if case.split("/")[1] != "muon"}
    edited = {
        case["id"]: {"since": case["since"], "sha256": published.digest(case, numbers)}
        for case in data["cases"]
    }
    index["published"] = {**others, **edited}
    (folder / "index.json").write_text(json.dumps(index))


SETS: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "edited": (lambda cases: [case["hyper"].update(nesterov=False) for case in cases], "new id"),
    "deleted": (lambda cases: cases.pop(0), "deprecate it"),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_with_edited_cases_fails_the_check(name: str, tmp_path: Path) -> None:
    edit, message = SETS[name]
    folder = tmp_path / "set"
    shutil.copytree(FOLDER, folder)
    _edited(folder, edit)
    load(folder)  # in itself it is right
    done = CliRunner().invoke(app, ["vectors", "check", "--no-remake", str(folder)])
    assert done.exit_code == 2
    assert message in done.stderr


def test_sets_of_other_versions_pass_the_check() -> None:
    now = published.read_published()
    old = {case: entry for case, entry in now.items() if entry["since"] == "2026.11.1"}
    published.check_set("2026.11.1", old, shipped=False)
    new = {**now, "L1/x": {"since": "2027.1.1", "sha256": "0" * 64}}
    published.check_set("2027.1.1", new, shipped=False)
    with pytest.raises(VectorError, match="deprecate it"):
        published.check_set(VERSION, old, shipped=False)
    with pytest.raises(VectorError, match="deprecate it"):
        published.check_set("2026.11.1", old, shipped=True)
    with pytest.raises(VectorError, match="L1/x is not listed"):
        published.check_set("2027.1.1", new, shipped=True)


def test_deprecation_keeps_the_numbers_and_holds_no_port_to_them(listed: Path, tmp_path: Path) -> None:
    before, list_before = load(tmp_path / "set"), listed.read_text()
    first, second = some()
    make(tmp_path / "set", [replace(first, deprecated="ill-posed"), second], published=listed, extend=True)
    after = load(tmp_path / "set")
    assert listed.read_text() == list_before
    assert [after[plan.id].deprecated for plan in some()] == ["ill-posed", None]
    np.testing.assert_array_equal(after[first.id].expected["update"], before[first.id].expected["update"])
    port = Capabilities("any", {"lion": ("*",), "adamw": ("*",)}, features=("state",))
    assert {case.id for case, _, _ in jobs(port, after, Selection(levels=("L1",)))} == {second.id}


def test_reasons_are_given_for_cases_that_there_are() -> None:
    assert DEPRECATED.keys() <= EVERY.keys()
    assert all(DEPRECATED.values())


def test_the_plans_take_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.vectors.plans.DEPRECATED", {"L1/lion/dion/8x8-warm": "ill-posed"})
    assert [plan.id for plan in plans() if plan.deprecated == "ill-posed"] == ["L1/lion/dion/8x8-warm"]


@pytest.mark.parametrize("text", ["L1/x 2026.1.1\n", f"L1/x 2026.1.1 {'0' * 64}\n" * 2, "\n"])
def test_a_list_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "published.txt").write_text(text)
    with pytest.raises(VectorError, match=r"published\.txt"):
        published.read_published(tmp_path / "published.txt")


def test_a_list_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="cannot be read"):
        make(tmp_path / "set", some(), published=tmp_path / "published.txt")
