"""Files to write, checked before anything is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def check_targets(paths: Sequence[Path]) -> None:
    """Refuses files that could not be written, before anything is run.

    Raises:
        OSError: the folder is missing or read-only, or two of them are one file.
    """
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise FileExistsError(f"{path} is named twice; what is written last would be all that is left")
    for path in paths:
        folder = path.absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; make it, or write elsewhere")
        if path.is_dir() or not os.access(folder, os.W_OK):
            raise PermissionError(f"{path} cannot be written; choose another file")
