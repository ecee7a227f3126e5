"""The files of the vectors are as docs/porting.md describes them to readers without Python."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np

from conformance.vectors import load
from conformance.vectors.loader import FOLDER


def test_the_files_are_as_the_page_says_to_who_has_no_python() -> None:
    """Read by nothing but the page's words, they give what the loader gives."""
    folder, vectors = FOLDER, load()
    index = json.loads((folder / "index.json").read_text())
    for name, listed in index["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == listed
    assert set(index["files"]) | {"index.json"} == {path.name for path in folder.iterdir()}
    seen, used = set(), Counter[tuple[str, str]]()
    for algorithm in {case.algorithm for case in vectors}:
        content = (folder / f"{algorithm}.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header, body = json.loads(content[8 : 8 + size]), content[8 + size :]

        def tensor(name: str, header: Any = header, body: bytes = body) -> np.ndarray[Any, Any]:
            assert header[name]["dtype"] == "F64"
            begin, end = header[name]["data_offsets"]
            return np.frombuffer(body[begin:end], "<f8").reshape(header[name]["shape"])

        for entry in json.loads((folder / f"{algorithm}.json").read_text())["cases"]:
            case = vectors[entry["id"]]
            seen.add(case.id)
            assert case.algorithm == algorithm
            for field in ("inputs", "expected"):
                assert getattr(case, field).keys() == entry[field].keys()
                for key, name in entry[field].items():
                    np.testing.assert_array_equal(tensor(name), getattr(case, field)[key])
                    used[algorithm, name] += 1
            for given, (_, update) in zip(entry["acceptable"], case.acceptable, strict=True):
                np.testing.assert_array_equal(tensor(given["update"]), update)
            for key, values in entry["schedule"].items():
                assert len(values) == entry["steps"]
                assert [case.hyper_at(step)[key] for step in range(case.steps)] == values
            for dtype in ("float32", "bfloat16"):
                assert {value.dtype for value in case.cast(dtype).values()} == {np.dtype("float32")}
    assert seen == set(vectors.cases)
    assert max(used.values()) > 10  # shared
    entries = json.loads((folder / "muon.json").read_text())["cases"]
    weights = {one["id"]: one["inputs"].get("weight") for one in entries}
    assert weights["L1/muon/keller/24x8-warm"] == weights["L1/muon/dion/24x8-warm"]  # between dialects too
