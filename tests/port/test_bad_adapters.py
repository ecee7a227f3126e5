"""Adapters that cannot be imported, made or asked: one line that names them, and exit status 2."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conformance import adapters
from conformance.adapters import AdapterError, Capabilities, check_dialects, checked_claims, find
from conformance.cli import app
from conformance.vectors import load

SOURCES = {
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "raises": ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
    "syntax": ("def :", "SyntaxError"),
    "factory": ("def x(): raise OSError('no file')", "OSError: no file"),
    "exiting_factory": ("def x(): raise SystemExit(0)", "SystemExit: 0"),
    "arguments": ("def x(device): pass", "TypeError"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_code_that_fails_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, message = SOURCES[name]
    (tmp_path / f"bad_{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(AdapterError, match=message) as raised:
        find(f"bad_{name}:x")
    assert f"bad_{name}:x" in str(raised.value)
    sys.modules.pop(f"bad_{name}", None)


def test_relative_paths_and_libraries_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match=r"is not package\.module:object"):
        find("..:x")
    entry = importlib.metadata.EntryPoint("gone", "no.such.library:x", "conformance.adapters")
    found = importlib.metadata.EntryPoints([entry])
    monkeypatch.setattr(adapters.importlib.metadata, "entry_points", lambda **_: found)
    with pytest.raises(AdapterError, match="'gone': it cannot be loaded: ModuleNotFoundError"):
        find("gone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithms": None}, "algorithms must be a dict"),
        ({"algorithms": ["muon"]}, "algorithms must be a dict"),
        ({"algorithms": {"muon": "torch"}}, "must be a tuple of strings, not 'torch'"),
        ({"algorithms": {"mouon": ("*",)}}, "has 'mouon'; known are muon, "),
        ({"levels": "L1"}, "levels must be a tuple"),
        ({"levels": ("L9",)}, "has 'L9'; known are L0"),
        ({"states": ("momentun",)}, "has 'momentun'; known are \\*, momentum"),
        ({"dtypes": ("float16",)}, "has 'float16'; known are float64"),
        ({"features": ("split:Row",)}, "has 'split:Row'; known are state"),
        ({"states": "*"}, "states must be a tuple"),
        ({"name": None}, "name must be a string"),
    ],
)
def test_claims_of_the_wrong_kind(change: dict[str, Any], message: str) -> None:
    class Port:
        def capabilities(self) -> Capabilities:
            return replace(Capabilities("port", {"muon": ("*",)}), **change)

    with pytest.raises(AdapterError, match=message):
        checked_claims(Port(), "some:port")  # type: ignore[arg-type]


def test_the_known_algorithms_are_the_oracle_s() -> None:
    from dion_ref import ALGORITHMS

    assert set(adapters.ALGORITHMS) == {*ALGORITHMS, "orthonormalize"}


@pytest.mark.parametrize(
    ("source", "message"),
    [("import os; os._exit(0)", "ended with exit code 0"), ("import sys; sys.exit(0)", "SystemExit: 0")],
)
def test_a_port_that_ends_the_process_ends_with_status_two(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_leaves.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    done = CliRunner().invoke(app, ["port", "bad_leaves:x"])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "bad_leaves:x" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["ours", "oracle", "torch_muon"])
def test_what_shipped_ports_claim_is_known(name: str) -> None:
    path = f"conformance.adapters.{name}:adapter"
    check_dialects(checked_claims(find(path), path), load(), path)
