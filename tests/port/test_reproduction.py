"""The printed command runs a failing case as it was run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conformance.adapters import Capabilities, find
from conformance.cli import app
from conformance.port.grading import ERROR, Verdict
from conformance.port.runner import Run, Selection, run_vectors

CLAIMS = Capabilities("port", {"muon": ("*",)}, ("L1", "L4"))
BAD = Verdict("L4/muon/dion/2-S0", "L4", "muon", "dion", "float64", ERROR)
ALL = Capabilities("port", {"muon": ("*",)}, ("L4",))


def ran(adapter: object, claims: Capabilities, vectors: Any, selection: Selection, **_: Any) -> Run:
    """`run_vectors` of a port that claims meshes alone."""
    return run_vectors(find("tests.port.ports:perfect"), claims, vectors, selection)


def reproduced(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def failed(*_: Any, **__: Any) -> Run:
        return Run(CLAIMS, [BAD])

    monkeypatch.setattr("conformance.port.command.claims_of", lambda *_: CLAIMS)
    monkeypatch.setattr("conformance.port.command.run_port", failed)
    monkeypatch.setattr("conformance.port.meshes.run_meshes", lambda *_, **__: [BAD])
    monkeypatch.setenv("CONFORMANCE_COMPILE", "")
    done = CliRunner().invoke(app, [*arguments, "--json", str(folder / "out")])
    assert done.exit_code == 1, done.output
    (verdict,) = json.loads((folder / "out").read_text())["verdicts"]
    assert verdict["command"] in done.output
    return shlex.split(verdict["command"])


CASE = ["--level", "L4", "--case", "L4/muon/dion/2-S0@float64"]
CUDA = ["--device", "cuda", "--backend", "nccl", "--nproc", "8"]


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (["port", "a:b"], ["port", "a:b", *CASE, "--traceback"]),
        (["port", "a:b", *CUDA, "--timeout", "7.5"],
         ["port", "a:b", *CASE, *CUDA, "--timeout", "7.5", "--traceback"]),
        (["meshes"], ["meshes", *CASE]),
        (["meshes", "--adapter", "a:b", "--device", "cuda", "--nproc", "2", "--compile", "--timeout", "300"],
         ["meshes", *CASE, "--adapter", "a:b", "--device", "cuda", "--nproc", "2", "--compile", "--timeout", "300"]),
    ],
)  # fmt: skip
def test_options_that_are_not_the_defaults_are_given_again(
    given: list[str], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reproduced(given, tmp_path, monkeypatch) == ["conformance", *command]


def test_the_set_of_vectors_is_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conformance.vectors.loader import FOLDER

    said = reproduced(["port", "a:b", "--vectors", str(FOLDER)], tmp_path, monkeypatch)
    assert said[-3:] == ["--vectors", str(FOLDER), "--traceback"]


def test_what_passed_in_spite_of_the_file_is_run_again_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    known = tmp_path / "known failures"
    known.write_text("L1/muon/dion/8x8-warm  # not any more\nL1/muon/dion/13x10-warm  # it is, here\n")
    arguments = ["port", "tests.port.ports:wrong_shape", "--level", "L1", "--dtype", "float64"]
    arguments += ["--case", "L1/muon/dion/8x8-warm", "--case", "L1/muon/dion/7x1-warm"]
    done = CliRunner().invoke(app, [*arguments, "--xfail", str(known), "--json", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    verdicts = {one["status"]: one for one in json.loads((tmp_path / "out").read_text())["verdicts"]}
    assert verdicts.keys() == {"xpass", "error"}
    assert "--xfail" not in verdicts["error"]["command"]
    again = CliRunner().invoke(app, shlex.split(verdicts["xpass"]["command"])[1:])
    assert again.exit_code == 1, again.output
    assert "1 xpass" in again.output


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["port", "a:b"], "\neverything is claimed\n"),
        (["port", "a:b", "--case", "L4/*"], "\neverything selected is claimed\n"),
        (["meshes"], "\neverything is claimed\n"),
        (["meshes", "--case", "L4/*"], "\neverything selected is claimed\n"),
    ],
)
def test_everything_is_claimed_only_where_everything_was_asked_for(
    command: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conformance.port.command.claims_of", lambda *_: ALL)
    monkeypatch.setattr("conformance.port.command.run_vectors", ran)
    monkeypatch.setattr("conformance.port.meshes.run_meshes", lambda *_, **__: [BAD])
    done = CliRunner().invoke(app, [*command, "--level", "L4"])
    assert said in done.output, done.output
