"""The printed command runs a failing case as it was run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conformance.adapters import Capabilities
from conformance.cli import app
from conformance.port.grading import ERROR, Verdict
from conformance.port.runner import Run

CLAIMS = Capabilities("port", {"muon": ("*",)}, ("L1", "L4"))
BAD = Verdict("L4/muon/dion/2-S0", "L4", "muon", "dion", "float64", ERROR)


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
