from __future__ import annotations

import math

import pytest
import torch

from dion_ref import POLYNOMIALS

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


def test_first_coefficients_digit_by_digit():
    assert POLYNOMIALS["keller"].coefficients == ((3.4445, -4.775, 2.0315),) * 5
    assert POLYNOMIALS["polar_express"].coefficients[0] == (
        8.156554524902461,
        -22.48329292557795,
        15.878769915207462,
    )
    a, b, c = POLYNOMIALS["polar_express_gns"].coefficients[4]
    assert (a * 1.05, b * 1.05**3, c * 1.05**5) == pytest.approx(
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673), rel=1e-15
    )


def test_tables_cannot_be_changed():
    with pytest.raises(TypeError):
        POLYNOMIALS["keller"] = POLYNOMIALS["you"]
