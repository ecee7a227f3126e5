"""The plugin is never green when nothing is tested, and runs every level."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from conformance import plugin

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
        ({"case": ["nosuch"]}, "no case that conformance.adapters.oracle:adapter claims is selected"),
        ({"level": "L3", "case": ["L1/*"]}, "is selected"),
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
