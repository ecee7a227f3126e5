"""Finished runs on disk, one file each: a killed sweep goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conformance.convergence.training import Outcome, Run

VERSION = 1
"""Raise it when a change of this package changes what a run gives; older files are then trained again."""


class Store:
    """A folder of finished runs."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes the folder.

        Raises:
            OSError: it cannot be written.
        """
        self.folder = folder
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def get(self, run: Run) -> Outcome | None:
        """What the run gave, or None if it is not here (or was cut off while it was written)."""
        found = self.read(f"runs/{run.key}.json")
        if found is None or found.get("version") != VERSION:
            return None
        outcome = found["outcome"]
        held_out = math.inf if outcome["held_out"] is None else outcome["held_out"]
        return Outcome(**{**outcome, "losses": tuple(outcome["losses"]), "held_out": held_out})

    def put(self, run: Run, outcome: Outcome) -> None:
        """Keeps the outcome, in one move."""
        entry = asdict(outcome)
        entry["losses"] = [float(f"{one:.6g}") for one in outcome.losses if math.isfinite(one)]
        entry["held_out"] = outcome.held_out if math.isfinite(outcome.held_out) else None
        self.write(f"runs/{run.key}.json", {"version": VERSION, "run": asdict(run), "outcome": entry})

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None."""
        try:
            found: dict[str, Any] = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file of the folder, whole or not at all."""
        path = self.folder / name
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(path)
