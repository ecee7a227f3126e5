"""Makes the files of the set from the oracle, the same bytes on every machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance.vectors import oracle
from conformance.vectors.arithmetic import FixedOrder
from conformance.vectors.loader import SCHEMA, read_index
from conformance.vectors.plans import DIALECTS, FLAGS, VERSION, Plan, plans
from conformance.vectors.published import (
    check_kept,
    check_unchanged,
    digest,
    extend_published,
    read_published,
)
from conformance.vectors.tensors import VectorError, to_bytes
from conformance.vectors.tolerance import DERIVATION, tolerances

SUITE_LIMIT = 1e-2
"""A case whose float32 tolerance is larger is no good test: making it fails."""
GAP = 2.0**-7
"""Norms of a selection are further apart than this: a port may rank them in bfloat16."""
ATTEMPTS = 200
NAN_NOTE = "The NaN stays visible in the weight: nothing was hidden, though nothing was said."
OVERFLOW_NOTE = (
    "The norm overflowed in this dtype, so nothing but the decay was done: "
    "no bug of the rule, yet a step is lost in silence."
)
TIES_NOTE = "Another of the equal slices was chosen; without a rule for ties the choice depends on the sort."


class Arrays:
    """Tensors of a file by name; equal contents are kept once."""

    def __init__(self) -> None:
        self.by_name: dict[str, Any] = {}
        self._names: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> str:
        """Keeps a tensor; returns the name under which it is kept."""
        array = tensor.detach().contiguous().numpy().astype("<f8")
        digest = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
        if digest not in self._names:
            self._names[digest] = name
            self.by_name[name] = array
        return self._names[digest]


def make_case(plan: Plan, arrays: Arrays) -> dict[str, Any]:
    """The JSON of one case; its numbers go to `arrays`.

    Raises:
        ValueError: the case would not separate right from wrong (its inputs lie at a decision's edge).
    """
    drawn = _clear_inputs(plan)
    valid = plan.gradient != "nan"
    acceptable: list[tuple[str, Tensor]] = []
    expected: dict[str, Tensor] = {}
    tolerance: dict[str, dict[str, float | None]] = {name: {} for name in ("float64", "float32", "bfloat16")}
    with FixedOrder():  # type: ignore[no-untyped-call]
        if valid:
            expected = oracle.run(plan, drawn)
            tolerance = tolerances(plan, drawn, expected)
            if plan.gradient == "tied":
                acceptable.append((TIES_NOTE, _reversed_ties(plan, drawn)))
            if plan.gradient == "overflow" and plan.algorithm != "lion":
                acceptable.append((OVERFLOW_NOTE, _decay_alone(plan, drawn)))
        else:
            acceptable.append((NAN_NOTE, torch.full((1, *plan.shape), torch.nan, dtype=torch.float64)))
    limit = tolerance["float32"].get("update", 0.0)
    if plan.gradient != "nearly-low-rank" and (limit is None or limit > SUITE_LIMIT):
        raise ValueError(f"{plan.id}: a float32 tolerance of {limit} tests nothing; choose other inputs")
    return {
        "id": plan.id,
        "level": plan.level,
        "algorithm": plan.algorithm,
        "dialect": plan.dialect,
        "comment": plan.comment,
        "flags": list(plan.flags),
        "since": plan.since,
        "deprecated": plan.deprecated,
        "requires": _requires(plan, drawn),
        "shape": list(plan.shape),
        "split": oracle.split_as_data(plan.split),
        "hyper": oracle.hyper_as_data(plan),
        "derived": oracle.derived(plan),
        "schedule": {name: list(values) for name, values in plan.schedule.items()},
        "steps": plan.steps,
        "result": "valid" if valid else "error",
        "tolerance": tolerance,
        "inputs": {name: arrays.add(f"{plan.id}/{name}", value) for name, value in drawn.items()},
        "expected": {
            name: arrays.add(f"{plan.id}/expected/{name}", value) for name, value in expected.items()
        },
        "acceptable": [
            {"note": note, "update": arrays.add(f"{plan.id}/acceptable/{index}", value)}
            for index, (note, value) in enumerate(acceptable)
        ],
    }


def _requires(plan: Plan, drawn: Mapping[str, Tensor]) -> list[str]:
    found = []
    if plan.warm or any(key.startswith("state/Q") for key in drawn):
        found.append("state")
    if plan.split is not None:
        found.append(f"split:{type(plan.split).__name__}")
    if getattr(plan.hyper, "cautious", False):
        found.append("cautious")
    found += [f"schedule:{name}" for name in plan.schedule]
    return found


def _clear_inputs(plan: Plan) -> dict[str, Tensor]:
    """The first inputs on which no decision hangs on rounding: no near ties of a selection, no signs of nearly nothing.

    Raises:
        ValueError: none was found.
    """
    for attempt in range(ATTEMPTS):
        drawn = oracle.draw(plan, attempt)
        with FixedOrder():  # type: ignore[no-untyped-call]
            if _is_clear(plan, drawn):
                return drawn
    raise ValueError(f"{plan.id}: a decision hangs on rounding in {ATTEMPTS} draws; choose other shapes")


def _is_clear(plan: Plan, drawn: Mapping[str, Tensor]) -> bool:
    if plan.gradient == "nan":
        return True
    if plan.gradient == "tied":
        return oracle.least_gap(plan, drawn) == 0
    if plan.algorithm == "lion":
        b1, b2 = plan.hyper.betas
        average = drawn["state/exp_avg"]
        for grad in drawn["grads"]:
            mixed = (b1 * average + (1 - b1) * grad).abs()
            size = (b1 * average).abs() + (1 - b1) * grad.abs()
            if bool(((mixed < 1e-5 * size) & (size > 0)).any()):
                return False
            average = b2 * average + (1 - b2) * grad
    return plan.algorithm not in ("dion2", "dion3") or oracle.least_gap(plan, drawn) > GAP


def _reversed_ties(plan: Plan, drawn: Mapping[str, Tensor]) -> Tensor:
    """The update with ties to the highest index: the oracle on reversed rows and columns, reversed back."""
    turned = {
        name: value.flip(-2, -1) if value.ndim >= 2 and name != "state/variance" else value
        for name, value in drawn.items()
    }
    if "state/variance" in drawn:
        turned["state/variance"] = drawn["state/variance"].flip(-2)
    return oracle.run(plan, turned)["update"].flip(-2, -1)


def _decay_alone(plan: Plan, drawn: Mapping[str, Tensor]) -> Tensor:
    """The update of a port that divides by an infinite norm: nothing but the decay, and at L0 nothing at all."""
    if plan.level == "L0":
        return torch.zeros(1, *plan.shape, dtype=torch.float64)
    decay: Tensor = -(plan.hyper.lr * plan.hyper.weight_decay) * drawn["weight"]
    return decay.unsqueeze(0)


def make(
    folder: Path,
    chosen: Iterable[Plan] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    *,
    published: Path | None = None,
    extend: bool = False,
) -> dict[str, str]:
    """Writes the set to `folder`, whole or not at all; returns the SHA-256 of each file.

    Args:
        folder: replaced if it holds a set and nothing else; refused if it holds anything else.
        chosen: the plans; all of them by default.
        progress: called with each id.
        published: the list of published cases to hold the set to; by default the older set in `folder` alone.
        extend: append the new cases to that list.

    Raises:
        VectorError: a published case would change or vanish, or `folder` holds something else or cannot be written.
    """
    folder, planned = folder.resolve(), list(plans() if chosen is None else chosen)
    listed = read_published(published) if published is not None else {}
    check_kept({**_older_in(folder), **listed}, [plan.id for plan in planned])
    for plan in planned:
        if extend and plan.id not in listed and plan.since != VERSION:
            raise VectorError(f"{plan.id} is new: it appears in {VERSION}, not in {plan.since}")
    _check_writable(folder.parent)
    contents = contents_of(planned, progress)
    now = json.loads(contents["index.json"])["published"]
    check_unchanged({**_older_in(folder), **listed}, now)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if old.exists():
        shutil.rmtree(old)
    if published is not None and extend:
        extend_published(published, now)
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _check_writable(parent: Path) -> None:
    """A folder can be made in `parent`, or in the nearest folder above it that there is.

    Raises:
        VectorError: it can't.
    """
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise VectorError(f"{parent} is no folder; choose another place")
    try:
        tempfile.TemporaryDirectory(prefix=".vectors-", dir=parent).cleanup()
    except OSError as error:
        raise VectorError(f"{parent} cannot be written ({error.strerror}); choose another place") from error


def _older_in(folder: Path) -> dict[str, Any]:
    """What the set in `folder` has published in older versions; nothing where there is no set yet.

    Raises:
        VectorError: `folder` is no folder, or holds something else than a set.
    """
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise VectorError(f"{folder} is no folder; choose an empty folder")
    entries = list(folder.iterdir())
    if not entries:
        return {}
    if not (folder / "index.json").is_file():
        raise VectorError(f"{folder} holds no index.json; choose an empty folder")
    try:
        index = read_index(folder)
    except VectorError as error:
        raise VectorError(f"{error}; {folder} holds no set to replace, choose an empty folder") from error
    foreign = [
        one.name for one in entries if one.name not in {"index.json", *index["files"]} or not one.is_file()
    ]
    if foreign:
        raise VectorError(
            f"{folder} holds {sorted(foreign)[0]}, which is no part of its set; choose an empty folder"
        )
    return {case: entry for case, entry in index["published"].items() if entry["since"] != VERSION}


def contents_of(chosen: list[Plan], progress: Callable[[str], None] = lambda _: None) -> dict[str, bytes]:
    """The bytes of every file by name: two a algorithm, and index.json."""
    ids = [plan.id for plan in chosen]
    if len(set(ids)) != len(ids):
        raise VectorError(f"two cases have one id: {sorted(one for one in set(ids) if ids.count(one) > 1)}")
    contents: dict[str, bytes] = {}
    digests: dict[str, dict[str, str]] = {}
    for algorithm in dict.fromkeys(plan.algorithm for plan in chosen):
        arrays, cases = Arrays(), []
        for plan in (plan for plan in chosen if plan.algorithm == algorithm):
            progress(plan.id)
            cases.append(make_case(plan, arrays))
            digests[plan.id] = {"since": plan.since, "sha256": digest(cases[-1], arrays.by_name)}
        lines = ",\n".join(json.dumps(case, allow_nan=False) for case in cases)
        contents[f"{algorithm}.json"] = f'{{"schema": {SCHEMA}, "cases": [\n{lines}\n]}}\n'.encode()
        contents[f"{algorithm}.safetensors"] = to_bytes(arrays.by_name)
    index = {
        "schema": SCHEMA,
        "version": VERSION,
        "derivation": DERIVATION,
        "flags": dict(FLAGS),
        "dialects": {name: one.source for name, one in DIALECTS.items()},
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())},
        "published": digests,
    }
    contents["index.json"] = (json.dumps(index, indent=1, allow_nan=False) + "\n").encode()
    return contents
