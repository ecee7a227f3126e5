"""The certificate: a sample of the cases, a few mutants, a wrong oracle, the command."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import dion_ref
from conformance.certify import inputs
from conformance.certify.cases import Case
from conformance.certify.chain import StepCase
from conformance.certify.command import certify
from conformance.certify.mutants import mutants, replaced
from conformance.certify.output import Output
from conformance.certify.precise import fifty_digits, from_tensor
from conformance.certify.runner import all_cases, run, run_case, run_mutant, sample
from dion_ref import linalg, update

FEW = (
    "ties to the highest index",
    "Q: epsilon inside the root",
    "EMA for sum (Muon)",
    "polar_express: 13th digit of a coefficient",
)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return all_cases()


def test_ids_are_unique_and_there_are_enough(cases: list[Case]) -> None:
    assert len({case.id for case in cases}) == len(cases) >= 200
    groups = {case.group for case in cases}
    assert {f"muon, {preset}" for preset in dion_ref.PRESETS} <= groups
    assert {"normuon", "dion", "orth-dion", "dion2", "dion3", "adamw", "adamw, cautious", "lion"} <= groups
    assert len(mutants()) >= 12


def test_every_algorithm_has_a_chain_of_five(cases: list[Case]) -> None:
    chained = {case.algorithm for case in cases if isinstance(case, StepCase) and len(case.gradients) == 5}
    assert chained == set(dion_ref.ALGORITHMS)


def test_the_recomputation_never_sees_the_oracle() -> None:
    names = (
        "conditions",
        "dion_steps",
        "generator",
        "inputs",
        "matrix_steps",
        "output",
        "precise",
        "primitives",
        "scalar_steps",
        "tables",
    )
    program = "import sys\n" + "\n".join(f"import conformance.certify.{name}" for name in names)
    program += "\nsys.exit('dion_ref' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_a_sample_passes(cases: list[Case]) -> None:
    small = [case for case in cases if "24x40" not in case.id and "40x24" not in case.id]
    failed = [result for result in map(run_case, sample(small, 40)) if result.failed]
    assert failed == []


@pytest.mark.parametrize("name", FEW)
def test_mutants_are_caught(name: str, cases: list[Case]) -> None:
    (mutant,) = [mutant for mutant in mutants() if mutant.name == name]
    assert run_mutant(mutant, cases).caught
    # and the oracle is itself again
    assert dion_ref.POLYNOMIALS["polar_express"].coefficients[4][0] == 2.3465413258596377


def test_a_wrong_oracle_fails_the_certificate(cases: list[Case]) -> None:
    chosen = [case for case in cases if case.id in ("muon/keller/chain 4x7", "scale/None/out_in")]
    with replaced(update.scale_factor, lambda scale, rows, columns, storage="out_in": 1.001):
        certificate = run(chosen, [], [], lambda name: None)
    assert not certificate.passed
    assert certificate.as_json()["counts"]["failures"] == 2
    assert run(chosen, [], [], lambda name: None).passed


def test_an_oracle_that_raises_fails_its_case(cases: list[Case]) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no result")

    (case,) = [case for case in cases if case.id == "polar/gaussian 2x2"]
    with replaced(linalg.polar_factor, broken):
        result = run_case(case)
    assert result.failed
    assert "no result" in result.problem


def test_a_mutant_that_does_nothing_is_reported_as_missed(cases: list[Case]) -> None:
    (mutant,) = [mutant for mutant in mutants() if mutant.name == "L2 for L1 norm"]
    harmless = type(mutant)(
        mutant.name, ("top",), mutant.original, lambda original: lambda *args: original(*args)
    )
    result = run_mutant(harmless, cases)
    assert not result.caught
    assert result.tried == 12


def test_units_by_norm_by_column_and_by_entry() -> None:
    eps = 2.0**-52
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    wrong = right + torch.tensor([[3 * eps, 0.0], [0.0, 4 * eps]], dtype=torch.float64)
    with fifty_digits():
        value = from_tensor(right)
        assert Output("x", value, 1).units(wrong) == pytest.approx(5)
        assert Output("x", value, [[1, 2]]).units(wrong) == pytest.approx(3)
        assert Output("x", value, [[1, 1], [1, 8]]).units(wrong) == pytest.approx(3)
        assert Output("x", value, 1).units(wrong * math.nan) == math.inf
        assert Output("x", value, 1).units(wrong[:1]) == math.inf


def test_inputs_are_the_same_everywhere() -> None:
    assert inputs.integers("fixed", 6).tolist() == [-3.0, 4.0, -2.0, 3.0, 4.0, -1.0]
    tied = inputs.tied_rows("fixed", 8, 5, 2).abs().sum(1)
    assert len(set(tied.tolist())) == 2
    assert torch.linalg.matrix_rank(inputs.deficient("fixed", 9, 7, 3)) == 3


def test_the_command_writes_what_it_shows(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(certify)
    file = tmp_path / "certificate.json"
    result = CliRunner().invoke(app, ["--cases", "12", "--no-mutants", "--json", str(file)])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["passed"] is True
    assert written["counts"] == {"cases": 12, "failures": 0, "mutants": 0, "caught": 0}
    assert set(written["versions"]) >= {"torch", "mpmath", "python"}
    assert all(group["units"] <= written["limit"] for group in written["groups"])
    assert re.search(r"^12 cases, 0 failures; \d+ s$", result.output, re.MULTILINE)  # and no word of mutants
    words = {word for group in written["groups"] for word in group["worst_case"].split()}
    assert all(word in result.output for word in words)  # off a terminal no word is broken


def test_the_command_fails_on_a_wrong_oracle() -> None:
    app = typer.Typer()
    app.command()(certify)
    with replaced(linalg.normalize_columns, lambda R, epsilon: R):
        result = CliRunner().invoke(app, ["--cases", "60", "--no-mutants"])
    assert result.exit_code == 1
    assert "FAILED" in result.output


@pytest.mark.slow
def test_everything(cases: list[Case]) -> None:
    certificate = run(cases, mutants(), cases, lambda name: None)
    assert [case for case in certificate.cases if case.failed] == []
    assert [mutant.name for mutant in certificate.mutants if not mutant.caught] == []
