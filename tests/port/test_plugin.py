"""The plugin is never green when nothing is tested, and runs every level."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conformance import plugin
from tests.port.test_command import ROOT, run_pytest

GIVEN: dict[str, Any] = {
    "--port": "conformance.adapters.oracle:adapter",
    "--port-level": "L0-L2",
    "--port-dtype": None,
    "--port-case": None,
    "--port-skip": None,
    "--port-xfail": None,
    "--port-timeout": 60.0,
    "--port-vectors": None,
    "--port-device": "cpu",
    "--port-nproc": 4,
    "--port-backend": None,
}


def config(**options: Any) -> Any:
    given = {**GIVEN, **{f"--port-{name}": value for name, value in options.items()}}
    return SimpleNamespace(
        getoption=lambda name, default=None: given.get(name, default), stash=pytest.Stash()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "L5"}, "is selected"),
        ({"level": "L3"}, "no case that conformance.adapters.oracle:adapter claims is selected"),
        ({"case": ["nosuch"]}, "--port-case 'nosuch' matches no case of L0, L1, L2; an id is like L1/"),
        ({"level": "L3", "case": ["L1/*"]}, r"'L1/\*' matches no case of L3"),
        ({"backend": "nccl"}, "on cpu the backend is gloo or threads, not 'nccl'"),
    ],
)
def test_nothing_to_test_is_a_usage_error(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _claims(monkeypatch)
    with pytest.raises(pytest.UsageError, match=message):
        plugin.pytest_report_header(config(**options))


def test_claims_that_select_nothing_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _claims(monkeypatch, levels=("L5",))
    with pytest.raises(pytest.UsageError, match="is selected"):
        plugin.pytest_report_header(config())


def _claims(monkeypatch: pytest.MonkeyPatch, levels: tuple[str, ...] = ("L0", "L1", "L2", "L4")) -> None:
    from conformance.adapters import Capabilities

    claims = Capabilities("port", {"muon": ("*",)}, levels)
    monkeypatch.setattr("conformance.port.command.claims_of", lambda *_: claims)


SUITE = ("--pyargs", "conformance.port.suite")


@pytest.mark.parametrize("more", [(), ("-n", "2")])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--port", "nope:adapter"), "ERROR: 'nope:adapter': nope cannot be imported"),
        (
            ("--port", "tests.port.ports:perfect", "--port-case", "L1/moun/*"),
            "ERROR: --port-case 'L1/moun/*' matches no case of L0, L1, L2",
        ),
    ],
)
def test_a_bad_option_is_one_line_without_the_header_too(
    options: tuple[str, ...], said: str, more: tuple[str, ...]
) -> None:
    out = run_pytest("-q", *SUITE, *options, *more, cwd=ROOT)
    assert next(line for line in out.splitlines() if line).startswith(said), out
    assert "INTERNALERROR" not in out


def test_the_suite_without_a_port_is_an_error() -> None:
    out = run_pytest(*SUITE, cwd=ROOT)
    assert "conformance.port.suite tests a port: give it with --port package.module:object" in out
    assert "1 error" in out
    assert "skipped" not in out


def test_ranks_may_be_threads_and_the_command_says_so(tmp_path: Path) -> None:
    options = ("--port", "tests.port.ports:idle_on_ranks", "--port-level", "L4", "--port-backend", "threads")
    out = run_pytest(*SUITE, *options, "--port-case", "L4/muon/dion/2-S0", cwd=tmp_path)
    assert re.search(
        r"run it alone: .* --case L4/muon/dion/2-S0@float64 --backend threads --traceback", out
    ), out


def test_the_backend_is_that_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ran(*_: Any, **options: Any) -> list[str]:
        asked.append(options["backend"])
        return ["verdict"]

    _claims(monkeypatch)
    monkeypatch.setattr("conformance.port.meshes.run_meshes", ran)
    for backend in (None, "threads"):
        plugin._on_ranks(config(level="L4", backend=backend), "L4/muon/dion/2-S0", "float64")
    assert asked == [None, "threads"]


def test_what_a_failing_port_follows_is_said_at_the_end() -> None:
    options = ("--port", "tests.port.ports:mislabelled", "--port-dtype", "float32")
    options += ("--port-case", "L?/muon/torch/13x10*")
    out = run_pytest("-q", *SUITE, *options, cwd=ROOT)
    assert "claimed torch (muon, float32): matches moonlight within tolerance in all " in out, out
    out = run_pytest("-q", *SUITE, *options, "-n", "2", cwd=ROOT)
    assert (
        "this says it: conformance port tests.port.ports:mislabelled --level L1-L2 --dtype float32" in out
    ), out
    assert "claimed torch" not in out
