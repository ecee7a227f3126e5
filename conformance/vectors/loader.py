"""Reads the vectors with numpy and the standard library alone: no torch, no jax."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance.vectors.checks import SCHEMA, check_numbers, checked_cases, checked_index
from conformance.vectors.published import digest
from conformance.vectors.tensors import VectorError, from_bytes

__all__ = ["FOLDER", "SCHEMA", "STORAGE", "Case", "VectorSet", "load", "read_index"]

FOLDER = Path(__file__).parent / "data"
"""The shipped set."""
STORAGE = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}
"""By compute dtype: the dtype of weights, gradients and states."""

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Case:
    """One vector. Everything that a port has to know is in it; nothing is left to a default.

    Attributes:
        id: stable, e.g. "L1/muon/keller/13x10-warm"; never reused and never edited once published.
        level: "L0" (orthonormalizer), "L1" (one step) or "L2" (ten chained steps).
        algorithm: a key of the oracle's ALGORITHMS, or "orthonormalize" at L0.
        dialect: name of the convention; a preset's name where it is one.
        comment: what the case is there for.
        flags: kinds of bugs that it shows; VectorSet.flags has a note on each.
        since: version of the set in which it appeared.
        deprecated: why it should not be used any more, or None.
        requires: features that a port has to claim beyond algorithm, dialect and level.
        shape: of the parameter.
        split: how the parameter is cut into pieces, each a logical matrix or a stack of equal ones: "kind" ("Rows",
            "Heads", "InterleavedRows", "Experts" or "Flatten") and the split's fields; or None.
        hyper: all hyperparameters; a polynomial by its coefficients (or "exact"). `hyper_at` has those of a step.
        derived: what follows from them, lists with an entry a piece: matrices (shapes), scale_factor, and rank or
            count where the algorithm has it; empty at L0 and for adamw and lion.
        schedule: by hyperparameter that changes, its value at each step.
        steps: number of steps.
        result: "valid" (expected holds) or "error" (the step has to be refused; expected and tolerances are empty).
        tolerance: by compute dtype and key of `expected`, the largest error that passes; None where that dtype decides
            nothing. The error is ``||value - expected|| / ||expected||`` over all elements: the largest over the steps
            for the update, and for Q with each column turned to the sign that agrees.
        inputs: "matrix" at L0, else "weight", "grads" ``[steps, *shape]`` and "state/<key>"; float64 and read-only
            (see `cast`), exact in float32 too wherever float32 has a tolerance. Momenta have the parameter's shape;
            "state/Q" ``[min(m, n), rank]`` and "state/variance" ``[m, 1]`` become "state/Q/0", "state/Q/1" and so on
            where `split` is given, ``[N, ...]`` for stacks; "state/step" is 0-d, the number of steps made before.
        expected: "update" ``[steps, *shape]`` (new weight minus old, by step; at L0 the orthonormalized matrix) and
            "state/<key>" after the last step, but for "step".
        acceptable: other results that are no bug: note and update, held to the update's tolerance and 16 roundings of
            the weight; with "error" an update of NaN, which stands for any that has one.
    """

    id: str
    level: str
    algorithm: str
    dialect: str
    comment: str
    flags: tuple[str, ...]
    since: str
    deprecated: str | None
    requires: tuple[str, ...]
    shape: tuple[int, ...]
    split: Mapping[str, Any] | None
    hyper: Mapping[str, Any]
    derived: Mapping[str, Any]
    schedule: Mapping[str, list[float]]
    steps: int
    result: str
    tolerance: Mapping[str, Mapping[str, float] | None]
    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]
    acceptable: tuple[tuple[str, Array], ...] = ()

    def hyper_at(self, step: int) -> dict[str, Any]:
        """The hyperparameters of a step, counted from 0."""
        return {**self.hyper, **{name: values[step] for name, values in self.schedule.items()}}

    def cast(self, compute_dtype: str) -> dict[str, Array]:
        """The inputs in the storage dtype that goes with a compute dtype, as fresh arrays."""
        storage = np.dtype(STORAGE[compute_dtype])
        return {name: np.array(value, dtype=storage) for name, value in self.inputs.items()}


@dataclass(frozen=True, eq=False)
class VectorSet:
    """All cases of a folder, by id, in order.

    Attributes:
        version: calendar version of the set.
        cases: by id.
        flags: note on every flag.
        derivation: how tolerances were derived.
    """

    version: str
    cases: Mapping[str, Case]
    flags: Mapping[str, str]
    derivation: str
    folder: Path = field(default=FOLDER)

    def __iter__(self) -> Iterator[Case]:
        return iter(self.cases.values())

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, case: str) -> Case:
        return self.cases[case]


def load(folder: Path | str = FOLDER) -> VectorSet:
    """Reads a set of vectors and checks every file and every case against the index.

    Args:
        folder: where index.json lies; the shipped set by default.

    Raises:
        VectorError: a missing, renamed, truncated or changed file, one of another structure or schema, or an empty set.
    """
    folder = Path(folder)
    index = read_index(folder)
    content: dict[str, bytes] = {}
    for name, listed in index["files"].items():
        content[name] = _read(folder / name)
        if hashlib.sha256(content[name]).hexdigest() != listed:
            raise VectorError(f"{folder / name} is not the file that index.json lists: its SHA-256 differs")
    cases: dict[str, Case] = {}
    for name in (name for name in index["files"] if name.endswith(".json")):
        numbers = name.removesuffix(".json") + ".safetensors"
        arrays = from_bytes(content[numbers], str(folder / numbers))
        for entry in checked_cases(_json(content[name], folder / name), folder / name):
            check_numbers(entry, arrays, folder / name)
            _check_digest(entry, arrays, index["published"], folder / name)
            case = _case(entry, arrays)
            if case.id in cases:
                raise VectorError(f"{folder / name} has {case.id}, which another file has already")
            cases[case.id] = case
    if not cases:
        raise VectorError(f"{folder} has no cases: it is an empty set")
    if missing := index["published"].keys() - cases.keys():
        raise VectorError(f"{folder / 'index.json'} lists {min(missing)}, which no file has")
    return VectorSet(index["version"], cases, index["flags"], index["derivation"], folder)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder's set.

    Raises:
        VectorError: none there, or something else than an index of vectors.
    """
    path = folder / "index.json"
    return checked_index(_json(_read(path), path), path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if path.parent.resolve() == FOLDER.resolve():
            remedy = "install the package again"
        elif path.name == "index.json":
            raise VectorError(
                f"{path.parent} is no folder of vectors: index.json cannot be read there ({error.strerror}); "
                "`conformance vectors make FOLDER` writes a set"
            ) from error
        else:
            remedy = "make or copy the set again"
        raise VectorError(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def _json(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise VectorError(f"{path} is no JSON: {error}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"it has {name}")


def _check_digest(
    entry: Mapping[str, Any], arrays: Mapping[str, Array], published: Mapping[str, Any], path: Path
) -> None:
    """A case is the one that the index lists."""
    listed = published.get(entry["id"])
    if listed is None or listed != {"since": entry["since"], "sha256": digest(entry, arrays)}:
        raise VectorError(f"{path}: case {entry['id']} is not the one that index.json lists as published")


def _case(entry: Mapping[str, Any], arrays: Mapping[str, Array]) -> Case:
    return Case(
        **{name: entry[name] for name in PLAIN},
        flags=tuple(entry["flags"]),
        requires=tuple(entry["requires"]),
        shape=tuple(entry["shape"]),
        inputs={name: arrays[key] for name, key in entry["inputs"].items()},
        expected={name: arrays[key] for name, key in entry["expected"].items()},
        acceptable=tuple((other["note"], arrays[other["update"]]) for other in entry["acceptable"]),
    )


PLAIN = (
    *("id", "level", "algorithm", "dialect", "comment", "since", "deprecated", "split", "hyper", "derived"),
    *("schedule", "steps", "result", "tolerance"),
)
"""Fields of a case that JSON holds as they are."""
