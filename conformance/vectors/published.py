"""What has been published: the digest of every case, in a list beside the data that only grows.

A line of published.txt is a case: its id, the version of the set in which it appeared, and the SHA-256 of all that it
says. The data can be made anew from edited plans; this list can't, so an edit shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conformance.vectors.tensors import VectorError

PUBLISHED = Path(__file__).parent / "published.txt"
"""The list that belongs to the shipped set."""
LINE = re.compile(r"(\S+) (20\d\d\.\d+\.\d+) ([0-9a-f]{64})")

Entries = Mapping[str, Mapping[str, str]]
"""By id: "since" and "sha256", as index.json has them."""


def digest(case: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
    """SHA-256 of all that a case says and of its numbers, wherever these are kept; deprecation is no change."""
    said = {name: value for name, value in case.items() if name != "deprecated"}
    total = hashlib.sha256()
    for part in ("inputs", "expected"):
        said[part] = sorted(case[part])
        for name in sorted(case[part]):
            total.update(_bytes(arrays[case[part][name]]))
    said["acceptable"] = [other["note"] for other in case["acceptable"]]
    for other in case["acceptable"]:
        total.update(_bytes(arrays[other["update"]]))
    total.update(json.dumps(said, sort_keys=True).encode())
    return total.hexdigest()


def _bytes(array: Any) -> bytes:
    return np.ascontiguousarray(array, dtype="<f8").tobytes()


def read_published(path: Path = PUBLISHED) -> dict[str, dict[str, str]]:
    """The entries of a list, in its order.

    Raises:
        VectorError: it cannot be read, a line is none, or an id is there twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise VectorError(f"{path} cannot be read ({error}); install the package again") from error
    entries: dict[str, dict[str, str]] = {}
    for number, line in enumerate(lines, 1):
        found = LINE.fullmatch(line)
        if found is None:
            raise VectorError(f"{path}, line {number} is not an id, a version and a SHA-256")
        if found[1] in entries:
            raise VectorError(f"{path} has {found[1]} twice")
        entries[found[1]] = {"since": found[2], "sha256": found[3]}
    return entries


def extend_published(path: Path, now: Entries) -> None:
    """Appends what is not listed yet; the lines that are there stay as they are."""
    old = read_published(path)
    new = [f"{case} {entry['since']} {entry['sha256']}" for case, entry in now.items() if case not in old]
    if not new:
        return
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(path.read_text() + "".join(f"{line}\n" for line in new))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_kept(old: Entries, ids: Iterable[str]) -> None:
    """Every published case is still there.

    Raises:
        VectorError: one is not.
    """
    there = set(ids)
    for case, entry in old.items():
        if case not in there:
            raise VectorError(f"{case} was published in {entry['since']}; deprecate it, don't delete it")


def check_unchanged(old: Entries, now: Entries) -> None:
    """Every published case that is there says what it said.

    Raises:
        VectorError: one does not.
    """
    for case, entry in old.items():
        if case in now and dict(now[case]) != dict(entry):
            raise VectorError(f"{case} was published in {entry['since']}; add a case with a new id instead")


def check_set(version: str, now: Entries, *, shipped: bool, path: Path = PUBLISHED) -> None:
    """A set against the list: nothing changed, nothing gone.

    Args:
        version: of the set; what appeared later needn't be in it.
        now: the entries of its index.
        shipped: it is the set that the list belongs to: all of the list is in it, and nothing else.
        path: the list.

    Raises:
        VectorError: a case was edited or deleted, or is not listed.
    """
    listed = read_published(path)
    check_unchanged(listed, now)
    due = {
        case: entry for case, entry in listed.items() if shipped or _order(entry["since"]) <= _order(version)
    }
    check_kept(due, now)
    for case in now:
        if shipped and case not in listed:
            raise VectorError(f"{case} is not listed in {path}; `conformance vectors make` lists it")


def _order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
