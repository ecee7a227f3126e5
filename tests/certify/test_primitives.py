"""The 50-digit primitives against values known exactly, and against each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mpmath import mp

from conformance.certify import generator, inputs
from conformance.certify.conditions import basis_turns, newton_schulz_bound, upper_inverse
from conformance.certify.precise import (
    Matrix,
    combine,
    fifty_digits,
    frobenius,
    from_tensor,
    matmul,
    real,
    singular_values,
    transpose,
)
from conformance.certify.primitives import (
    UncleanCaseError,
    ceiling,
    eigen_polar,
    newton_polar,
    newton_schulz,
    normalize_columns,
    ordered_basis,
    polar,
    top_slices,
)
from conformance.certify.tables import TABLES, coefficients

TINY = 1e-45


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    with fifty_digits():
        yield


def numbers(*rows: tuple[float, ...]) -> Matrix:
    return [[real(x) for x in row] for row in rows]


def distance(A: Matrix, B: Matrix) -> float:
    return float(frobenius(combine(1, A, -1, B)))


def test_polar_of_a_triangle_that_is_known() -> None:
    # [[1, 1], [0, 1]]: the rotation by -arctan(1/2)
    root = 1 / mp.sqrt(5)
    expected = [[2 * root, root], [-root, 2 * root]]
    assert distance(newton_polar(numbers((1, 1), (0, 1))), expected) < TINY
    assert distance(eigen_polar(numbers((1, 1), (0, 1)), real(0)), expected) < TINY


def test_polar_of_orthogonal_columns_only_rescales_them() -> None:
    factor, kept = polar(numbers((3, 0), (4, 0), (0, -2)))
    assert distance(factor, [[real(3) / 5, real(0)], [real(4) / 5, real(0)], [real(0), real(-1)]]) < TINY
    assert [float(s) for s in kept] == [5, 2]


def test_polar_drops_the_null_space() -> None:
    factor, kept = polar(numbers((1, 2), (2, 4)))
    expected = [[real(1) / 5, real(2) / 5], [real(2) / 5, real(4) / 5]]
    assert len(kept) == 1
    assert distance(factor, expected) < 1e-24
    assert frobenius(polar(numbers((0, 0), (0, 0)))[0]) == 0


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (7, 3), (3, 6)])
def test_two_ways_to_the_polar_factor_agree(rows: int, columns: int) -> None:
    A = from_tensor(inputs.conditioned("two ways", rows, columns, 6))
    assert distance(newton_polar(A), eigen_polar(A, real(0))) < 1e-30
    assert distance(polar(A)[0], newton_polar(A)) == 0


def test_basis_of_pythagorean_columns() -> None:
    basis = ordered_basis(numbers((3, 7), (4, 1)), [real(0), real(0)])
    assert distance(basis.vectors, [[real(3) / 5, real(4) / 5], [real(4) / 5, real(-3) / 5]]) < TINY
    assert distance(basis.triangular, numbers((5, 5), (0, 5))) < TINY


def test_a_dead_column_is_zero_and_nothing_is_made_orthogonal_to_it() -> None:
    basis = ordered_basis(numbers((0, 2, -4, 1), (0, 0, 0, 3)), [real(1e-10)] * 4)
    assert basis.kept == [1, 3]
    assert distance(basis.vectors, numbers((0, 1, 0, 0), (0, 0, 0, 1))) < TINY


def test_a_decision_at_rounding_level_is_refused() -> None:
    with pytest.raises(UncleanCaseError, match="too near"):
        ordered_basis(numbers((1, 1), (0, 1e-10)), [real(0), real(2e-10)])
    with pytest.raises(UncleanCaseError, match="rounding level"):
        top_slices([[1.0, 1.0], [2.0, 2.0**-52]], 1)


@pytest.mark.parametrize("table", TABLES)
def test_newton_schulz_acts_on_singular_values(table: str) -> None:
    steps = coefficients(table)
    X = numbers((0, 0.5, 0), (0.25, 0, 0))
    expected = []
    for x in (real(0.5), real(0.25)):
        for a, b, c in steps:
            x = a * x + b * x**3 + c * x**5
        expected.append(x)
    assert (
        distance(newton_schulz(X, steps), [[mp.zero, expected[0], mp.zero], [expected[1], mp.zero, mp.zero]])
        < 1e-40
    )


def test_the_long_and_the_short_side_agree() -> None:
    X = from_tensor(inputs.gaussian("sides", 3, 18) / 10)
    steps = coefficients("keller")
    short, long = newton_schulz(X, steps), transpose(newton_schulz(transpose(X), steps))
    assert distance(short, long) < 1e-40


def test_every_table_has_five_steps_and_brings_one_near_one() -> None:
    for table in TABLES:
        steps = coefficients(table)
        value = newton_schulz([[real(1) / 2]], steps)[0][0]
        assert len(steps) == 5
        assert 0.65 < value < 1.25


def test_the_bound_is_the_derivative_for_a_number() -> None:
    # one singular value, one step p(x) = 3x - 2x^3 at 1/2: |p'| = 1.5, its terms are 1.5 and 0.25
    bound = newton_schulz_bound([real(0.5)], [(real(3), real(-2), real(0))], 1.0)
    assert bound == pytest.approx(
        (1.75**2 + 2.5**2) ** 0.5
    )  # f(s)/s = 2.5 > 1.5: directions outside the range


def test_turns_of_orthogonal_columns_are_relative_errors() -> None:
    basis = ordered_basis(numbers((4, 0), (0, 0.5)), [real(0), real(0)])
    assert [float(w) for w in basis_turns(basis, [real(4), real(0.5)])] == [1, 1]
    assert distance(upper_inverse(numbers((2, 1), (0, 4))), numbers((0.5, -0.125), (0, 0.25))) < TINY


def test_normalized_columns_have_epsilon_outside_the_root() -> None:
    columns = normalize_columns(numbers((3, 0), (4, 0)), real(5))
    assert distance(columns, [[real("0.3"), real(0)], [real("0.4"), real(0)]]) < TINY


def test_ties_go_to_the_lowest_index() -> None:
    assert top_slices([[1, -1], [0, 2], [3, 0], [-2, 0]], 2) == [0, 2]
    assert top_slices([[0.5], [1.0], [0.25]], 1) == [1]


@pytest.mark.parametrize(
    ("share", "size", "multiple", "expected"),
    [
        (0.07, 100, 1, 7),
        (0.55, 100, 1, 55),
        (0.28, 25, 1, 7),
        (1e-5, 7, 1, 1),
        (0.5, 24, 8, 16),
        (1.0, 9, 4, 12),
    ],
)
def test_ceilings(share: float, size: int, multiple: int, expected: int) -> None:
    assert ceiling(share, size, multiple) == expected


def test_philox_known_answers() -> None:
    # Random123, kat_vectors: philox4x32 10
    most = 2**32 - 1
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert generator.philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert generator.philox((most,) * 4, (most,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert generator.philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_singular_values_of_a_diagonal() -> None:
    found = singular_values(numbers((0, 3, 0), (-4, 0, 0)))
    assert [float(s) for s in found] == [4, 3]
    product = matmul(numbers((1, 2)), numbers((3,), (4,)))
    assert product == numbers((11,))
