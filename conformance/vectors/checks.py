"""What the JSON of a set has to be, checked with numpy and the standard library alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from conformance.vectors.tensors import VectorError

SCHEMA = 1
"""The one schema version that there is, and that the loader understands."""
LEVELS = ("L0", "L1", "L2")
DTYPES = ("float64", "float32", "bfloat16")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(json|safetensors)")
"""Of a file of the set: no folder, nothing hidden."""

Check = Callable[[Any], bool]


def is_count(value: Any) -> bool:
    """A positive integer; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    """A finite number; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def list_of(check: Check) -> Check:
    """A JSON array whose values pass."""
    return lambda value: isinstance(value, list) and all(check(one) for one in value)


def dict_of(check: Check) -> Check:
    """A JSON object whose values pass."""
    return lambda value: isinstance(value, dict) and all(check(one) for one in value.values())


def fields(**checks: Check) -> Check:
    """A JSON object that has these keys, with values that pass."""
    return lambda value: (
        isinstance(value, dict)
        and all(name in value and check(value[name]) for name, check in checks.items())
    )


def anything(_: Any) -> bool:
    """Whatever JSON holds."""
    return True


def _one_of(*allowed: str) -> Check:
    return lambda value: isinstance(value, str) and value in allowed


def _tolerance(value: Any) -> bool:
    return value is None or (is_number(value) and value > 0)


INDEX: dict[str, Check] = {
    "version": is_text,
    "derivation": is_text,
    "flags": dict_of(is_text),
    "dialects": dict_of(is_text),
    "files": dict_of(is_text),
    "published": dict_of(fields(since=is_text, sha256=is_text)),
}
CASE: dict[str, Check] = {
    **dict.fromkeys(("id", "algorithm", "dialect", "comment", "since"), is_text),
    "level": _one_of(*LEVELS),
    "flags": list_of(is_text),
    "deprecated": lambda value: value is None or isinstance(value, str),
    "requires": list_of(is_text),
    "shape": list_of(is_count),
    "split": lambda value: value is None or fields(kind=is_text)(value),
    "hyper": dict_of(anything),
    "derived": dict_of(anything),
    "schedule": dict_of(list_of(is_number)),
    "steps": is_count,
    "result": _one_of("valid", "error"),
    "tolerance": fields(**dict.fromkeys(DTYPES, dict_of(_tolerance))),
    "inputs": dict_of(is_text),
    "expected": dict_of(is_text),
    "acceptable": list_of(fields(note=is_text, update=is_text)),
}


def check_schema(data: Any, path: Path) -> None:
    """The schema version of a JSON file of the set.

    Raises:
        VectorError: no JSON object, or none of the known version.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise VectorError(f"{path} has no integer schema version; is it a file of vectors?")
    if schema > SCHEMA:
        raise VectorError(
            f"{path} has schema {schema}, this loader reads up to {SCHEMA}; install a newer dion-conformance"
        )
    if schema != SCHEMA:
        raise VectorError(f"{path} has schema {schema}, which there never was; this loader reads {SCHEMA}")


def checked_index(data: Any, path: Path) -> dict[str, Any]:
    """An index.json as it has to be.

    Raises:
        VectorError: another schema, a key that is missing or of the wrong type, or a file elsewhere.
    """
    check_schema(data, path)
    _check(data, INDEX, str(path))
    for name in data["files"]:
        if not NAME.fullmatch(name) or name == "index.json":
            raise VectorError(f"{path} lists {name!r}, which is no file of vectors in its folder")
        for kind in ("json", "safetensors"):
            if (other := f"{name.rpartition('.')[0]}.{kind}") not in data["files"]:
                raise VectorError(f"{path} lists {name}, but not {other}, which belongs to it")
    found: dict[str, Any] = data
    return found


def checked_cases(data: Any, path: Path) -> list[dict[str, Any]]:
    """The cases of a data file.

    Raises:
        VectorError: another schema, or a case with a key that is missing or of the wrong type.
    """
    check_schema(data, path)
    if not list_of(dict_of(anything))(data.get("cases")):
        raise VectorError(f"{path} has no list of cases")
    cases: list[dict[str, Any]] = data["cases"]
    for case in cases:
        _check(case, CASE, f"{path}: case {case.get('id', 'without id')}")
    return cases


def check_numbers(case: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    """The arrays and tolerances that a case needs are there, in its shape.

    Raises:
        VectorError: one is missing or of another shape.
    """
    where, shape = f"{path}: case {case['id']}", tuple(case["shape"])
    steps = (case["steps"], *shape)
    wanted = {"matrix": shape} if case["level"] == "L0" else {"weight": shape, "grads": steps}
    _check_arrays(case["inputs"], wanted, arrays, f"{where}, inputs")
    _check_arrays(case["expected"], {"update": steps} if case["result"] == "valid" else {}, arrays, where)
    for other in case["acceptable"]:
        _check_arrays(other, {"update": steps}, arrays, f"{where}, acceptable", others=False)
    for dtype in DTYPES:
        if missing := case["expected"].keys() - case["tolerance"][dtype].keys():
            raise VectorError(f"{where} has no {dtype} tolerance of {', '.join(sorted(missing))}")
    for name, values in case["schedule"].items():
        if len(values) != case["steps"]:
            raise VectorError(f"{where} has {len(values)} values of {name} for {case['steps']} steps")


def _check_arrays(
    names: Mapping[str, str], wanted: Mapping[str, tuple[int, ...]], arrays: Mapping[str, NDArray[Any]],
    where: str, *, others: bool = True,
) -> None:  # fmt: skip
    for name in dict.fromkeys((*wanted, *(names if others else ()))):
        if name not in names or names[name] not in arrays:
            raise VectorError(f"{where}: there is no array {names.get(name, name)!r}")
        found = arrays[names[name]].shape
        if name in wanted and found != wanted[name]:
            raise VectorError(f"{where}: {name} has shape {list(found)}, not {list(wanted[name])}")


def _check(data: Mapping[str, Any], checks: Mapping[str, Check], where: str) -> None:
    for name, check in checks.items():
        if name not in data:
            raise VectorError(f"{where} has no {name!r}")
        if not check(data[name]):
            raise VectorError(f"{where} has a {name!r} of the wrong kind: {str(data[name])[:80]}")
