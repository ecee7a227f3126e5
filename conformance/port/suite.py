"""The one test that `pytest --pyargs conformance.port.suite --port ...` needs."""

from __future__ import annotations

from collections.abc import Callable


def test_port(conformance_case: Callable[[], None]) -> None:
    """A case, on the port."""
    conformance_case()
