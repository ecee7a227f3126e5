"""The results of one run of the meshes against those of another: NCCL against gloo, compiled against eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance.port.grading import FAIL, PASS, Verdict, relative_error
from conformance.port.mesh_cases import MeshCase
from conformance.port.mesh_program import Finished
from conformance.port.output import write_whole
from conformance.vectors.tensors import VectorError, from_bytes, to_bytes


class Kept:
    """All results by "<case>@<dtype>/<parameter>/<quantity>"."""

    def __init__(self) -> None:
        self.values: dict[str, NDArray[Any]] = {}

    def __call__(self, job: tuple[MeshCase, str], finished: Finished) -> None:
        """Takes the results of a case."""
        case, dtype = job
        for name, value in finished.values.items():
            self.values[f"{case.id}@{dtype}/{name}"] = np.asarray(value, dtype=np.float64)


def write(path: Path, kept: Kept) -> None:
    """Writes all results as safetensors."""
    write_whole(path, to_bytes(kept.values))


def read(path: Path) -> Kept:
    """Reads what `write` wrote.

    Raises:
        VectorError: no such file, or another one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VectorError(f"{path} cannot be read: {error.strerror}") from error
    kept = Kept()
    kept.values = from_bytes(content, str(path))
    return kept


def compare(verdict: Verdict, own: Kept, other: Kept) -> Verdict:
    """The verdict, failed where the other run's results are further away than both may be from the oracle."""
    if verdict.status != PASS:
        return verdict
    for name, value in own.values.items():
        if not name.startswith(f"{verdict.id}/"):
            continue
        if name not in other.values:
            return verdict.with_status(FAIL, f"the other run has no {name}")
        key = name.rsplit("/", 1)[1]
        allowed = verdict.errors.get(key if key == "update" else f"state/{key}", (0.0, None))[1]
        theirs = other.values[name]
        if key == "Q":  # the signs of its columns are free
            turn = np.sign((value * theirs).sum(axis=-2, keepdims=True))
            value = value * np.where(turn == 0, 1.0, turn)
        error = relative_error(value, theirs)
        if allowed is not None and not error <= 2 * allowed:
            return verdict.with_status(
                FAIL, f"{name} differs from the other run by {error:.2g}, allowed {2 * allowed:.2g}"
            )
    return verdict
