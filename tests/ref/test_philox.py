from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dion_ref.philox import key_of, normal, philox4x32

F = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123, kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def python_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """In Python's own integers, without any splitting."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k0, q & F, (p >> 32) ^ d ^ k1, p & F
        k0, k1 = (k0 + 0x9E3779B9) & F, (k1 + 0xBB67AE85) & F
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer


@given(st.tuples(*[st.integers(0, F)] * 4), st.tuples(*[st.integers(0, F)] * 2))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_equals_plain_integers(counter, key):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == python_philox(counter, key)


def test_key_is_the_hash_of_seed_and_name():
    digest = hashlib.sha256(b"7:model.layers.0.weight").digest()
    assert key_of(7, "model.layers.0.weight") == tuple(
        sum(digest[4 * word + byte] << (8 * byte) for byte in range(4)) for word in range(2)
    )


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 1), (2, 6), (5, 11), (0, 7)])
def test_one_value_by_hand(row, column):
    words = python_philox((column // 4, row, 2, 0), key_of(5, "w"))
    u = [(word + 0.5) / 2**32 for word in words]
    first = 2 * ((column % 4) // 2)
    wave = math.sin if column % 2 else math.cos
    wanted = math.sqrt(-2 * math.log(u[first])) * wave(2 * math.pi * u[first + 1])
    got = float(normal(6, 12, seed=5, name="w", matrix=2)[row, column])
    assert got == pytest.approx(wanted, rel=1e-14, abs=1e-15)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_trap_6_a_value_does_not_depend_on_who_asks(rows, columns):
    whole = normal(40, 40, seed=1, name="layer")
    assert torch.equal(normal(rows, columns, seed=1, name="layer"), whole[:rows, :columns])


def test_seed_name_and_matrix_all_matter():
    draws = [
        normal(4, 4, seed=seed, name=name, matrix=matrix)
        for seed, name, matrix in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    ]
    for i in range(len(draws)):
        for j in range(i):
            assert not (draws[i] == draws[j]).any()


def test_values_are_standard_normal():
    values = normal(300, 300, seed=0, name="moments").flatten()
    count = values.numel()
    assert abs(float(values.mean())) < 4 / math.sqrt(count)
    assert abs(float(values.square().mean()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float((values**4).mean()) - 3) < 4 * math.sqrt(96 / count)
    inside = float((values.abs() < 1).double().mean())
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 4 * 0.5 / math.sqrt(count)


def test_empty_draws_have_their_shape():
    assert normal(0, 3, seed=0, name="").shape == (0, 3)
    assert normal(3, 0, seed=0, name="").shape == (3, 0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"rows": -1}, ValueError),
        ({"columns": 1 << 33}, ValueError),
        ({"matrix": -1}, ValueError),
        ({"matrix": 1 << 32}, ValueError),
        ({"seed": 0.0}, TypeError),
        ({"seed": True}, TypeError),
        ({"name": b"w"}, TypeError),
    ],
)
def test_bad_arguments(arguments, error):
    good = {"rows": 1, "columns": 1, "seed": 0, "name": "w", "matrix": 0} | arguments
    with pytest.raises(error):
        normal(good.pop("rows"), good.pop("columns"), **good)
