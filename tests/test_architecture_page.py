"""docs/architecture.md names every file of the production code, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PRODUCTION, SUITE = ROOT / "dion_dtensor", ROOT / "conformance"
NAMED = set(re.findall(r"`([\w/]+(?:\.py|/))`", PAGE))


def test_every_file_of_the_production_code_is_named() -> None:
    files = {path.relative_to(PRODUCTION) for path in PRODUCTION.rglob("*.py") if path.name != "__init__.py"}
    left = {file.as_posix() for file in files if not {file.as_posix(), f"{file.parent.as_posix()}/"} & NAMED}
    assert not left


def test_what_is_named_is_there() -> None:
    assert len(NAMED) > 40
    for name in NAMED:
        assert any((folder / name).exists() for folder in (ROOT, PRODUCTION, SUITE)), name
    for folder in re.findall(r"`((?:conformance|tests|ci)/\w+)`", PAGE):
        assert (ROOT / folder).exists(), folder
