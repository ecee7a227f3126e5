"""Which cases are run: levels, patterns, and the files of what is known to fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from conformance.adapters import LEVELS


class SelectionError(ValueError):
    """A level, pattern or file that means nothing; the message says what is wrong with it."""


def levels_of(text: str) -> tuple[str, ...]:
    """ "L0-L2", "L1,L4" or "L3" as levels, in order.

    Raises:
        SelectionError: no such level.
    """
    chosen: set[str] = set()
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if first not in LEVELS or (last or first) not in LEVELS:
            raise SelectionError(f"{part!r} is no level; give one of {', '.join(LEVELS)}, or L0-L2, or L1,L4")
        chosen |= set(LEVELS[LEVELS.index(first) : LEVELS.index(last or first) + 1])
    return tuple(level for level in LEVELS if level in chosen)


def matches(case: str, dtype: str, pattern: str) -> bool:
    """True where a pattern is the id or matches it as a glob, with or without "@dtype"."""
    return any(name == pattern or fnmatchcase(name, pattern) for name in (case, f"{case}@{dtype}"))


@dataclass(frozen=True)
class Known:
    """A line of a skip or xfail file: a pattern and why."""

    pattern: str
    reason: str
    where: str


def read_known(path: Path | None) -> tuple[Known, ...]:
    """Reads a skip or xfail file: one `pattern  # reason` a line; empty lines and lines of # alone are comments.

    Raises:
        SelectionError: no such file, or a line without a reason.
    """
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SelectionError(f"{path} cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = re.split(r"\s+#\s*", line.strip(), maxsplit=1)
        if len(parts) != 2 or not parts[1].strip():
            raise SelectionError(f"{path}:{number}: {parts[0]!r} has no reason; write `pattern  # reason`")
        found.append(Known(parts[0], parts[1].strip(), f"{path}:{number}"))
    return tuple(found)


def check_known(known: Sequence[Known], claimed: Callable[[], Sequence[tuple[str, str]]]) -> None:
    """Refuses entries that match nothing of what the port claims; `claimed` is asked only if there are entries.

    Args:
        known: the entries.
        claimed: gives the ids and dtypes of all cases that the port claims.

    Raises:
        SelectionError: names the line.
    """
    cases = claimed() if known else ()
    for one in known:
        if not any(matches(case, dtype, one.pattern) for case, dtype in cases):
            raise SelectionError(
                f"{one.where}: {one.pattern!r} matches no case that the port claims; remove it or correct it"
            )


def reason(known: Iterable[Known], case: str, dtype: str) -> str | None:
    """The reason of the first entry that matches."""
    return next((one.reason for one in known if matches(case, dtype, one.pattern)), None)
