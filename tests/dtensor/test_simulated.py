"""Meshes of up to 64 ranks, simulated in one process."""

from __future__ import annotations

import pytest

from tests.dtensor.layouts import Layout, layout
from tests.dtensor.programs import SHAPES, problem, run_steps
from tests.dtensor.references import cases
from tests.dtensor.simulation import simulated_steps

FEW = ((13, 10), (13, 10), (5, 12))
SAMPLE = [layout(text) for text in ("8x8 T0 S0", "4x4x4 R S0 S1")]
SWEEP = [layout(text) for text in ("64 S0", "8x8 S0 S1", "2x32 R S0", "2x4x8 R T0 S0", "2x2x4x4 R S0 S1 S0")]


# The exchange of rows asks each rank for itself, and a simulation is one process.
ASSEMBLED = {name: {"path": "assemble"} for name in ("dion2", "dion3")}


def check(where: Layout, name: str, shapes: tuple[tuple[int, int], ...]) -> None:
    data = problem(shapes, 2)
    expected = run_steps(name, None, data=data, compile=False, **ASSEMBLED.get(name, {}))
    assert expected is not None
    for weight, whole in zip(
        simulated_steps(name, where, data, ASSEMBLED.get(name, {})), expected["weight"], strict=True
    ):
        assert float((weight - whole).norm() / whole.norm()) < (
            1e-11 if name in ("dion", "orth_dion") else 1e-14
        )


@pytest.mark.parametrize(
    ("name", "where"),
    [*cases(["muon", "dion"], SAMPLE, SAMPLE[:1]), *cases(["normuon", "dion3"], SAMPLE, SAMPLE[1:])],
)
def test_large_meshes_agree_with_one_device(name: str, where: Layout) -> None:
    check(where, name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "normuon", "dion", "orth_dion", "dion2", "dion3"])
@pytest.mark.parametrize("where", SAMPLE + SWEEP, ids=str)
def test_large_meshes_agree_with_one_device_on_all_shapes(where: Layout, name: str) -> None:
    check(where, name, SHAPES)
