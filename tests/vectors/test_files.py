"""The shipped set: complete, small, valid by its schema, readable without torch, and what it says is never edited."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import safetensors.numpy

from conformance.vectors import VectorSet, load
from conformance.vectors.loader import FOLDER
from conformance.vectors.plans import DIALECTS, EXPRESSIBLE, FLAGS, SHAPES, plans
from dion_ref import ALGORITHMS, PRESETS


@pytest.fixture(scope="module")
def vectors() -> VectorSet:
    return load()


def test_every_planned_case_is_there_and_no_other(vectors: VectorSet) -> None:
    assert sorted(vectors.cases) == sorted(plan.id for plan in plans())


def test_files_fit_the_schema() -> None:
    schema = json.loads(resources.files("conformance.vectors").joinpath("schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in sorted(FOLDER.glob("*.json")):
        jsonschema.validate(json.loads(path.read_bytes()), schema)


def test_the_set_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6e6


def test_expressible_dialects_are_those_that_the_oracle_accepts() -> None:
    for algorithm in ALGORITHMS:
        for name, convention in PRESETS.items():
            if algorithm in ("adamw", "lion"):
                continue
            if name in EXPRESSIBLE[algorithm]:
                convention.hyper(algorithm)
            else:
                with pytest.raises(ValueError, match="can't express"):
                    convention.hyper(algorithm)
    assert set(EXPRESSIBLE["muon"]) == set(DIALECTS)


def test_every_algorithm_and_preset_has_the_shapes_and_the_special_values(vectors: VectorSet) -> None:
    for algorithm, dialects in EXPRESSIBLE.items():
        for dialect in (name for name in dialects if name in PRESETS):
            cases = [one for one in vectors if (one.algorithm, one.dialect) == (algorithm, dialect)]
            assert {one.shape for one in cases} >= set(SHAPES)
            flags = {flag for one in cases for flag in one.flags}
            needed = {
                "zero-gradient",
                "tiny",
                "huge",
                "not-a-number",
                "trajectory",
                "weight-decay",
                "no-decay",
            }
            needed |= {"cautious", "fresh-state", "warm-state"}
            if algorithm != "adamw":
                needed |= {"overflow"}
            if algorithm not in ("adamw", "lion"):
                needed |= {"rank-deficient", "momentum-warmup", "fused", "heads", "experts", "convolution"}
            assert flags >= needed, (algorithm, dialect, needed - flags)
            assert {one.steps for one in cases} == {1, 10}
    everything = {flag for one in vectors for flag in one.flags}
    assert everything == set(vectors.flags) == set(FLAGS)


def test_a_case_leaves_nothing_to_a_default(vectors: VectorSet) -> None:
    case = vectors["L1/muon/torch/24x8-warm"]
    assert case.hyper["polynomial"] == [[3.4445, -4.775, 2.0315]] * 5
    assert case.hyper["norm_factor"] == 1.0
    assert case.hyper["epsilon_rule"] == "clamp"
    assert case.derived["scale_factor"] == [3.0**0.5]
    assert set(case.tolerance) == {"float64", "float32", "bfloat16"}
    assert vectors["L1/dion2/dion/25x26-count"].derived["count"] == [7]
    assert vectors["L1/dion/dion/25x26-count"].derived["rank"] == [7]


def test_inputs_are_exact_in_float32(vectors: VectorSet) -> None:
    for case in vectors:
        if "nearly-dependent" in case.flags:
            continue
        for name, value in case.inputs.items():
            np.testing.assert_array_equal(
                value.astype(np.float32).astype(np.float64), value, err_msg=f"{case.id} {name}"
            )


def test_squares_overflow_where_the_flag_says_so(vectors: VectorSet) -> None:
    cases = [case for case in vectors if "overflow" in case.flags]
    assert len(cases) == 6 + 17
    limit = float(np.finfo(np.float32).max)
    for case in cases:
        (given,) = (case.inputs[name] for name in ("matrix", "grads") if name in case.inputs)
        assert np.square(given).max() > limit, case.id
        assert np.abs(given).sum() < limit / 2**20, case.id
        assert all(np.isfinite(value).all() for value in case.expected.values()), case.id
        assert case.tolerance["float32"]["update"] < 1e-4, case.id


def test_the_safetensors_library_reads_the_same(vectors: VectorSet) -> None:
    for path in sorted(FOLDER.glob("*.safetensors")):
        theirs = safetensors.numpy.load(path.read_bytes())
        ours = _arrays(path)
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(value, ours[name])


def _arrays(path: Path) -> dict[str, np.ndarray]:
    from conformance.vectors.tensors import from_bytes

    return from_bytes(path.read_bytes(), path.name)


def test_loading_needs_numpy_alone() -> None:
    code = """
import sys
blocked = ["torch", "jax", "rich", "typer", "safetensors", "jsonschema", "matplotlib", "dion_ref", "dion_dtensor"]
sys.modules.update(dict.fromkeys(blocked))
from conformance.vectors import load
vectors = load()
assert vectors["L2/muon/optax/13x10-10"].expected["update"].shape == (10, 13, 10)
foreign = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - set(blocked)
assert {one for one in foreign if not one.startswith("_")} <= {"numpy", "conformance"}, foreign
"""
    subprocess.run([sys.executable, "-S", "-c", _with_path(code)], check=True, timeout=60)


def _with_path(code: str) -> str:
    """Without `site`, so that nothing but what is asked for is imported."""
    return f"import sys\nsys.path[:] = {sys.path!r}\n{code}"
