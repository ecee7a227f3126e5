"""Making the set: the oracle in a fixed order of sums, the same bytes again, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conformance.cli import app
from conformance.vectors import VectorError, load, oracle, tolerance
from conformance.vectors.arithmetic import FixedOrder, matmul, total
from conformance.vectors.loader import FOLDER
from conformance.vectors.make import Arrays, contents_of, make, make_case
from conformance.vectors.plans import VERSION, Plan, hyper_of, plans
from dion_ref import Precision

EVERY = {plan.id: plan for plan in plans()}
SAMPLE = (
    *("L0/orthonormalize/polar_express/7x1", "L0/orthonormalize/exact/8x8", "L1/muon/optax/13x10-warm"),
    *("L1/normuon/dion/8x24-fresh", "L1/dion/dion/13x10-rank-deficient", "L1/orth_dion/dion/24x8-fresh"),
    *(
        "L1/dion2/dion/9x12-tied",
        "L1/dion3/dion/25x26-count",
        "L1/muon/dion/3x6x8-experts",
        "L2/lion/dion/13x10-10",
    ),
    *("L1/dion/dion/24x8-overflow", "L1/adamw/dion/13x10-cautious", "L1/muon/torch/8x8-nan"),
)
OTHER_KERNELS = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
"""Another order of sums in BLAS and LAPACK, no vector instructions in torch: another machine, as far as bits go."""
REMADE = """
import json, sys
from conformance.vectors.make import contents_of
from conformance.vectors.plans import plans
chosen = [plan for plan in plans() if plan.id in sys.argv[1:]]
print(json.dumps(json.loads(contents_of(chosen)["index.json"])["published"]))
"""


@pytest.mark.parametrize("environment", [{}, OTHER_KERNELS], ids=["as is", "other kernels"])
def test_cases_are_made_again_bit_by_bit(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REMADE, *SAMPLE], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip
    remade = json.loads(done.stdout)
    shipped = json.loads((FOLDER / "index.json").read_bytes())["published"]
    assert remade == {name: shipped[name] for name in SAMPLE}


@pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="MKL alone can be told to use other kernels"
)
def test_other_kernels_do_give_other_bits_without_the_fixed_order() -> None:
    """Or the test above would show nothing."""
    code = (
        "import torch; g = torch.Generator().manual_seed(0); x = torch.randn(13, 10, generator=g, dtype=torch.float64);"
        "print((x @ x.mT).numpy().tobytes().hex())"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, **more},
        ).stdout
        for more in ({}, OTHER_KERNELS)
    ]
    assert said[0] != said[1]


@pytest.mark.parametrize("name", SAMPLE[:-1])
def test_the_fixed_order_is_the_oracle(name: str) -> None:
    plan = EVERY[name]
    drawn = oracle.draw(plan)
    usual = oracle.run(plan, drawn)
    with FixedOrder():
        fixed = oracle.run(plan, drawn)
    for quantity, value in usual.items():
        assert tolerance.error(quantity, fixed[quantity], value) < 2e-13, quantity


def test_what_is_not_known_to_be_exact_is_refused() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with FixedOrder(), pytest.raises(NotImplementedError, match="exp"):
        torch.exp(x)
    with FixedOrder(), pytest.raises(NotImplementedError, match="addmm"):
        torch.addmm(x.view(3, 1), x.view(3, 1), x.view(3, 1)[:1])


def test_sums_of_any_length_and_half_precision() -> None:
    x = torch.arange(7, dtype=torch.float64)
    assert total(x, 0) == 21
    assert total(torch.zeros(0, 3), 0).shape == (3,)
    ones = torch.ones(1, 1000, dtype=torch.bfloat16)
    assert float(matmul(ones, ones.mT)) == 1000  # summed in bfloat16 it would stop at 256


def test_tolerances_hold_the_rerun_and_would_not_hold_twice_the_factor() -> None:
    plan = EVERY["L1/muon/torch/24x8-warm"]
    drawn = oracle.draw(plan)
    expected = oracle.run(plan, drawn)
    found = tolerance.tolerances(plan, drawn, expected)
    for dtype, precision in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        again = oracle.run(plan, drawn, Precision(torch.float32, precision))
        error = tolerance.error("update", again["update"], expected["update"])
        allowed = found[dtype]["update"]
        assert allowed is not None
        assert error < allowed < 40 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_matrices_are_factored_in_the_fixed_order_as_small_ones(dtype: torch.dtype) -> None:
    A = oracle.draw(EVERY["L0/orthonormalize/exact/13x10"])["matrix"].to(dtype)
    with FixedOrder():
        small, large = torch.linalg.qr(A), torch.linalg.qr(A * 2.0**66)
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        other = torch.linalg.svd(A * 2.0**66, full_matrices=False)
    assert torch.equal(small[0], large[0])
    assert torch.equal(small[1] * 2.0**66, large[1])
    assert torch.equal(S * 2.0**66, other[1])
    assert torch.equal(U, other[0])
    assert torch.equal(Vh, other[2])


def test_a_nan_is_an_error_and_makes_a_tolerance_useless() -> None:
    worst = {"update": 0.0}
    tolerance._keep_worst(worst, {"update": torch.full((1, 2), torch.nan)}, {"update": torch.ones(1, 2)})
    assert worst == {"update": float("inf")}


def test_tolerances_are_rounded_up_and_useless_ones_are_null() -> None:
    assert tolerance._rounded(1.01e-5) == 1.1e-5
    assert tolerance._rounded(0.51) is None
    assert tolerance._rounded(float("inf")) is None


def test_a_case_on_the_edge_is_not_made() -> None:
    plan = Plan(
        "L1", "muon", "dion-cans", "edge", (7, 1), hyper_of("muon", "dion-cans"), "a singular value of 1", ()
    )
    with pytest.raises(ValueError, match="tests nothing"):
        make_case(plan, Arrays())


def some() -> list[Plan]:
    """Two cases that are not published yet."""
    return [replace(EVERY[f"L1/{name}/dion/8x8-warm"], since=VERSION) for name in ("lion", "adamw")]


def test_a_published_case_is_never_edited(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    old = [replace(plan, since="2026.1.1") for plan in some()]
    make(folder, old)
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    make(folder, old)  # the same again is no edit
    edited = [replace(old[0], comment="another comment"), old[1]]
    with pytest.raises(VectorError, match="new id"):
        make(folder, edited)
    with pytest.raises(VectorError, match="deprecate"):
        make(folder, old[:1])
    harder = [replace(old[0], hyper=replace(old[0].hyper, lr=0.06)), old[1]]
    with pytest.raises(VectorError, match=r"2026\.1\.1"):
        make(folder, harder)
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


INDEX = {"schema": 1, "version": "2026.1.1", "derivation": "", "flags": {}, "dialects": {}, "published": {}}
FOREIGN: dict[str, dict[str, str]] = {
    "something else": {"thesis.tex": ""},
    "index of something else": {"index.json": '{"name": "my site", "pages": []}'},
    "index that is no JSON": {"index.json": "<html>"},
    "index without the files": {"index.json": json.dumps(INDEX)},
    "index of the future": {"index.json": json.dumps({**INDEX, "files": {}, "schema": 2})},
    "a file beside the set": {"index.json": json.dumps({**INDEX, "files": {}}), "thesis.tex": ""},
    "a folder beside the set": {"index.json": json.dumps({**INDEX, "files": {}}), "src/code.py": ""},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_something_else_is_refused_before_anything_is_computed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    for path, content in FOREIGN[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    before = contents(tmp_path)
    monkeypatch.setattr("conformance.vectors.make.contents_of", lambda *_: pytest.fail("computed"))
    with pytest.raises(VectorError, match="choose an empty folder"):
        make(folder, some())
    done = CliRunner().invoke(app, ["vectors", "make", str(folder)])
    assert done.exit_code == 2, done.output
    assert "choose an empty folder" in done.stderr
    assert contents(tmp_path) == before


PARENTS: dict[str, Callable[[Path], object]] = {
    "a file": lambda parent: parent.write_text("x"),
    "read-only": lambda parent: parent.mkdir(mode=0o555),
}


@pytest.mark.parametrize("below", ["set", "more/set"])
@pytest.mark.parametrize("kind", PARENTS)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(
    kind: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PARENTS[kind](tmp_path / "parent")
    if kind == "read-only" and os.access(tmp_path / "parent", os.W_OK):  # as for root
        monkeypatch.setattr("tempfile.TemporaryDirectory", _refused)
    monkeypatch.setattr("conformance.vectors.make.contents_of", lambda *_: pytest.fail("computed"))
    done = CliRunner().invoke(app, ["vectors", "make", str(tmp_path / "parent" / below)])
    assert done.exit_code == 2, done.output
    assert done.stderr.strip().startswith(f"error: {tmp_path / 'parent'} ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["parent"]


def _refused(**_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    make(folder, some())
    before = contents(tmp_path)
    replace_ = os.replace

    def full(source: Path, target: Path) -> None:
        if target == folder:
            raise OSError("disk full")
        replace_(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        make(folder, some()[:1])
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    monkeypatch.undo()
    make(folder, some())
    assert contents(tmp_path) == before


def test_two_cases_of_one_id_are_refused() -> None:
    with pytest.raises(VectorError, match="one id"):
        contents_of([some()[0], some()[0]])


def test_a_made_set_can_be_loaded(tmp_path: Path) -> None:
    make(tmp_path / "set", some())
    found = load(tmp_path / "set")
    assert sorted(found.cases) == sorted(plan.id for plan in some())
    np.testing.assert_array_equal(
        found["L1/lion/dion/8x8-warm"].expected["update"], load()["L1/lion/dion/8x8-warm"].expected["update"]
    )


@pytest.mark.slow
def test_the_whole_set_is_made_again_byte_by_byte() -> None:
    for name, content in contents_of(list(plans())).items():
        assert (FOLDER / name).read_bytes() == content, name
