from __future__ import annotations

import math

import pytest
import torch

from dion_ref import POLYNOMIALS

from .test_muon import KELLER, POLAR_EXPRESS, YOU

# (name, low end of the input, lowest and highest output on [low, 1]): facts measured for each table
RANGES = [
    ("keller", 2e-3, 0.682, 1.202),
    ("you", 3e-3, 0.978, 1.145),
    ("polar_express", 1e-3, 0.847, 1.141),
    ("polar_express_gns", 1e-3, 0.729, 1.124),
    ("cans", 1e-3, 0.884, 1.120),
]


def composed(name: str, x: torch.Tensor) -> torch.Tensor:
    x = x / POLYNOMIALS[name].norm_factor
    for a, b, c in POLYNOMIALS[name].coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize(("name", "low", "smallest", "largest"), RANGES)
def test_output_range(name, low, smallest, largest):
    y = composed(name, torch.logspace(math.log10(low), 0, 200_001, dtype=torch.float64))
    assert float(y.min()) == pytest.approx(smallest, abs=6e-4)
    assert float(y.max()) == pytest.approx(largest, abs=6e-4)


def test_ranges_cover_every_table():
    assert {row[0] for row in RANGES} == set(POLYNOMIALS)


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_five_steps_with_a_source(name):
    table = POLYNOMIALS[name]
    assert table.name == name
    assert len(table.coefficients) == 5
    assert len(table.source) > 20
    assert table.norm_factor == (1.02 if name == "polar_express" else 1.0)


GNS = (  # before damping
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)


def test_every_digit():
    assert POLYNOMIALS["keller"].coefficients == (KELLER,) * 5
    assert POLYNOMIALS["you"].coefficients == YOU
    assert POLYNOMIALS["polar_express"].coefficients == POLAR_EXPRESS
    assert POLYNOMIALS["polar_express_gns"].coefficients == tuple(
        (a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in GNS
    )
    assert POLYNOMIALS["cans"].coefficients == CANS


def test_tables_cannot_be_changed():
    with pytest.raises(TypeError):
        POLYNOMIALS["keller"] = POLYNOMIALS["you"]
