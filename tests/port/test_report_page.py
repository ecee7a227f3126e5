"""The report's picture shows every error, on meshes too, and failures that cannot be drawn are listed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conformance.adapters import Capabilities
from conformance.adapters.oracle import make_hyper
from conformance.mutants.gathering import GatheringAdapter
from conformance.port import mesh_grading
from conformance.port.execute import Outcome
from conformance.port.grading import ERROR, FAIL, PASS, Verdict, grade, relative_error, spectrum
from conformance.port.mesh_cases import SHAPES, MeshCase, claimed_hypers, mesh_cases
from conformance.port.meshes import run_meshes
from conformance.port.page import points, render, worst
from conformance.port.runner import Run, Selection
from conformance.vectors import load

CLAIMS = Capabilities("port", {"muon": ("*",)}, ("L1", "L4"))
PICTURE = "data:image/png;base64,"


def orthogonal(size: int, seed: int) -> np.ndarray[Any, Any]:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def drawn(update: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    return max(error for error, _ in points(spectrum(update[None], reference[None])))


def page(*verdicts: Verdict) -> str:
    return render(Run(CLAIMS, list(verdicts)), {}, "a:b", 1.0)


def test_an_error_between_two_directions_is_drawn() -> None:
    left, right = orthogonal(13, 0)[:, :10], orthogonal(10, 1)
    lengths = np.linspace(1.0, 0.3, 10)
    wanted = (left * lengths) @ right
    between = wanted + 0.3 * np.outer(left[:, 0], right[1])
    assert drawn(between, wanted) >= relative_error(between, wanted) > 0.1
    outside = wanted + 0.3 * np.outer(orthogonal(13, 0)[:, 12], right[1])
    assert drawn(outside, wanted) >= 0.3


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (7,), (3, 9), (9, 3), (3, 2, 4)])
def test_no_error_is_drawn_smaller_than_it_is(shape: tuple[int, ...]) -> None:
    made = np.random.default_rng(2)
    wanted = made.standard_normal(shape)
    for size in (1e-6, 0.1):
        update = wanted + size * made.standard_normal(shape)
        assert drawn(update, wanted) >= relative_error(update, wanted) * (1 - 1e-9)


def test_directions_of_next_to_nothing_are_relative_to_the_longest() -> None:
    left, right = orthogonal(6, 3), orthogonal(6, 4)
    wanted = (left * [2.0, 1.0, 1.0, 1e-12, 0.0, 0.0]) @ right
    found = points(spectrum((wanted + 1e-7 * left @ right)[None], wanted[None]))
    assert [short for _, short in found] == [False] * 3 + [True] * 3
    assert all(3e-8 < error < 2e-7 for error, _ in found)
    assert 0.1 < drawn(wanted + 0.5 * np.outer(left[:, 4], right[5]), wanted) < 0.26
    nothing = np.zeros((1, 4, 4))
    assert spectrum(nothing + 1, nothing) == ()
    assert spectrum(nothing * np.nan, nothing + 1) == ()


def test_failures_that_cannot_be_drawn_are_listed() -> None:
    raised = Verdict("L1/muon/dion/8x8-warm", "L1", "muon", "dion", "float64", ERROR, message="raised that")
    case = load()["L1/muon/dion/24x8-warm"]
    lost = grade(case, "float64", Outcome(update=case.expected["update"] * np.nan))
    assert lost.status == FAIL
    alone = page(raised, lost)
    assert PICTURE not in alone
    section = alone.partition("Worst cases")[2]
    assert "raised that" in section
    assert lost.id in section
    good = grade(case, "float64", Outcome(update=case.expected["update"]))
    many = [replace(lost, case=f"{lost.case}-{index}") for index in range(20)]
    listed, pictured = worst(Run(CLAIMS, [*many, good]))
    assert pictured == [good]  # however many cannot be drawn
    assert listed == [*many[:8], good]
    assert PICTURE in page(*many, good)


def test_failures_on_meshes_are_drawn() -> None:
    adapter: Any = GatheringAdapter("LocalPiece")
    only = Selection(("L4",), ("float64",), ("L4/muon/*/2-S1", "L4/muon/*/2-R"))
    found = run_meshes(adapter, adapter.capabilities(), load(), only, ranks=2)
    status = {one.case.rpartition("/")[2]: one for one in found}
    assert (status["2-S1"].status, status["2-R"].status) == (FAIL, PASS)
    assert (
        max(error for error, _ in points(status["2-S1"].spectrum)) >= status["2-S1"].errors["update"][0] > 0.1
    )
    assert max(error for error, _ in points(status["2-R"].spectrum)) < 1e-13
    listed, pictured = worst(Run(CLAIMS, found))
    assert listed == pictured == [status["2-S1"], status["2-R"]]
    assert PICTURE in page(*found)


def mesh_values(case: MeshCase) -> dict[str, torch.Tensor]:
    """What the oracle gives."""
    hyper = make_hyper(case.algorithm, case.hyper)
    expected = mesh_grading._expected(case.algorithm, case.dialect, hyper)
    return {f"{name}/update": each["update"][0].clone() for name, (each, _) in expected.items()}


def test_the_parameter_that_uses_most_of_its_tolerance_is_drawn_and_nan_uses_most() -> None:
    claims = GatheringAdapter().capabilities()
    case = next(one for one in mesh_cases(claimed_hypers(claims, load()), ("L4",)) if one.algorithm == "muon")
    values = mesh_values(case)
    values["blocks_7_weight/update"] *= 1.25
    along = mesh_grading.worst_spectrum(case, "float64", values)
    assert [error for error, _ in points(along)] == pytest.approx([0.25] * 8)
    (said,) = mesh_grading.beyond(case, "float64", values).values()
    shapes = list(dict.fromkeys(str(list(SHAPES[index])) for index in range(9) if index != 7))
    assert len(shapes) > 4
    assert said == f"in 1 of 9 parameters: blocks_7_weight [16, 8]; right: {', '.join(shapes[:4])} ..."
    (said,) = mesh_grading.beyond(
        case, "float64", {name: 2 * value for name, value in values.items()}
    ).values()
    assert "in 9 of 9 parameters: " in said
    assert "right" not in said
    values["blocks_3_weight/update"][0, 0] = float("nan")
    assert not np.isfinite(mesh_grading.grade(case, "float64", values)["update"][0])
    assert mesh_grading.worst_spectrum(case, "float64", values) == ()
