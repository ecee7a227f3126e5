"""Meshes of up to 64 ranks, simulated in one process."""

from __future__ import annotations

import pytest

from tests.dtensor.layouts import Layout, layout
from tests.dtensor.programs import SHAPES, run_steps
from tests.dtensor.simulation import simulated_steps

SIMULATED = [
    layout(text)
    for text in ("64 S0", "8x8 S0 S1", "8x8 T0 S0", "4x4x4 R S0 S1", "2x32 R S0", "2x4x8 R T0 S0")
]


@pytest.mark.parametrize("name", ["muon", "dion"])
@pytest.mark.parametrize("where", SIMULATED, ids=str)
def test_large_meshes_agree_with_one_device(where: Layout, name: str) -> None:
    expected = run_steps(name, None, SHAPES, compile=False)
    for index, weight in enumerate(simulated_steps(name, where)):
        bound = 1e-14 if name == "muon" else 1e-11
        assert float((weight - expected["weight"][index]).norm() / expected["weight"][index].norm()) < bound
