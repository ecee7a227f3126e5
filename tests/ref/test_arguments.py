"""How arguments may be given, and what is said when they are given otherwise."""

from __future__ import annotations

import dataclasses
import fractions
import json

import numpy as np
import pytest
import torch

from conformance.adapters.oracle import make_split
from dion_ref import ALGORITHMS, Columns, Convention, Heads, InterleavedRows, Precision, Rows

from .helpers import ALL, LOW_RANK, MATRIX, NEWTON_SCHULZ, SCALAR, gaussian, tensors_of


def plain(value):
    """Python's own numbers all through."""
    if isinstance(value, tuple):
        return all(map(plain, value))
    return type(value) in (int, float, bool, str, type(None))


@pytest.mark.parametrize("name", ALL)
def test_numbers_of_numpy_are_numbers(name):
    kind = ALGORITHMS[name].Hyper
    given, wanted = {}, {}
    for field in dataclasses.fields(kind):
        if field.name == "norm_factor":
            given[field.name], wanted[field.name] = np.float32(1.02), float(np.float32(1.02))
        elif type(field.default) is float and "fraction" not in field.name:
            given[field.name], wanted[field.name] = np.float32(0.3), float(np.float32(0.3))
    if name in SCALAR:
        given["betas"], wanted["betas"] = (np.float32(0.5), np.float64(0.3)), (0.5, 0.3)
    if name in NEWTON_SCHULZ:
        given["polynomial"], wanted["polynomial"] = (
            [np.ones(3, dtype=np.float32).tolist()],
            ((1.0, 1.0, 1.0),),
        )
    if name in LOW_RANK:
        given["rank_multiple"], wanted["rank_multiple"] = np.int64(8), 8
    hyper = kind(**given)
    assert hyper == kind(**wanted)
    # not only equal: NumPy's float32 would pull the arithmetic down to float32
    assert all(plain(value) for value in vars(hyper).values())
    W = gaussian(6, 4)
    state = ALGORITHMS[name].init(W, hyper)
    assert ALGORITHMS[name].step(W, W, state, hyper)[0].dtype == torch.float64


def test_a_coefficient_or_a_convention_may_be_numpy_s():
    (step,) = ALGORITHMS["muon"].Hyper(polynomial=[(np.float32(3.5), np.int64(-4), 2)]).polynomial
    assert step == (3.5, -4.0, 2.0)
    assert plain(step)
    convention = Convention(epsilon=np.float32(1e-7), norm_factor=np.float64(1.02))
    assert convention.epsilon == float(np.float32(1e-7))
    assert plain((convention.epsilon, convention.norm_factor))


def test_ints_and_floats_are_kept_as_they_are():
    hyper = ALGORITHMS["dion2"].Hyper(lr=1, weight_decay=0, fraction=1)
    assert [type(value) for value in (hyper.lr, hyper.weight_decay, hyper.fraction)] == [int, int, int]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_share_is_the_decimal_that_it_prints_as(kind):
    hyper = ALGORITHMS["dion2"].Hyper(fraction=kind(0.28))
    assert (hyper.count(25), type(hyper.fraction)) == (7, float)
    low_rank = ALGORITHMS["dion"].Hyper(rank_fraction=kind(0.28))
    assert (low_rank.rank(25, 30), type(low_rank.rank_fraction)) == (7, float)


def test_a_share_may_be_a_fraction():
    assert ALGORITHMS["dion2"].Hyper(fraction=fractions.Fraction(1, 4)).fraction == 0.25


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("muon", {"lr": True}),
        ("muon", {"lr": np.True_}),
        ("muon", {"lr": torch.tensor(0.1)}),
        ("dion", {"rank_multiple": True}),
        ("dion", {"rank_fraction": True}),
        ("dion", {"rank_multiple": np.float64(8)}),
        ("dion2", {"fraction": np.True_}),
        ("adamw", {"betas": (True, 0.9)}),
        ("adamw", {"betas": {0.9, 0.95}}),
        ("adamw", {"betas": [0.9, 0.95, 0.99]}),
        ("lion", {"betas": "ab"}),
    ],
)
def test_what_is_no_number(name, fields):
    with pytest.raises(TypeError, match=next(iter(fields))):
        ALGORITHMS[name].Hyper(**fields)


@pytest.mark.parametrize("name", ALL)
def test_hyperparameters_come_back_from_json(name):
    hyper = ALGORITHMS[name].Hyper(**({"polynomial": [(3.0, -3, 1)]} if name in NEWTON_SCHULZ else {}))
    again = ALGORITHMS[name].Hyper(**json.loads(json.dumps(dataclasses.asdict(hyper))))
    assert again == hyper
    assert hash(again) == hash(hyper)


@pytest.mark.parametrize("name", ["muon", "normuon", "adamw"])
def test_a_step_counter_of_numpy(name):
    algorithm, W = ALGORITHMS[name], gaussian(4, 3)
    hyper = algorithm.Hyper(**({"momentum": "ema", "bias_correction": True} if name in MATRIX else {}))
    state = dataclasses.replace(algorithm.init(W, hyper), step=3)
    new, after = algorithm.step(W, W, state, hyper)
    again, counted = algorithm.step(W, W, dataclasses.replace(state, step=np.int64(3)), hyper)
    assert torch.equal(again, new)
    assert type(counted.step) is int
    assert counted.step == after.step == 4


@pytest.mark.parametrize("name", LOW_RANK)
def test_seeds_and_indices_of_numpy(name):
    algorithm, W = ALGORITHMS[name], gaussian(4, 3)
    hyper = algorithm.Hyper()
    state = algorithm.init(W, hyper, seed=7, first_matrix=2)
    again = algorithm.init(W, hyper, seed=np.int32(7), first_matrix=np.uint8(2))
    for key, value in tensors_of(state).items():
        assert torch.equal(getattr(again, key), value)


@pytest.mark.parametrize("precision", [torch.float32, "float32", None, Precision])
@pytest.mark.parametrize("split", [None, Rows((2, 2))])
@pytest.mark.parametrize("name", ALL)
def test_a_dtype_is_no_precision(name, split, precision):
    algorithm, W = ALGORITHMS[name], gaussian(4, 3)
    hyper = algorithm.Hyper()
    state = algorithm.init(W, hyper, split=split)
    wanted = (
        r"precision must be a Precision, such as Precision\(storage=torch\.float32, compute=torch\.float32\)"
    )
    with pytest.raises(TypeError, match=wanted):
        algorithm.init(W, hyper, split=split, precision=precision)
    with pytest.raises(TypeError, match=wanted):
        algorithm.step(W, W, state, hyper, split=split, precision=precision)


@pytest.mark.parametrize(
    ("split", "way_out"),
    [
        ((3, 3), r"an instance of Rows, .*, such as Rows\(\(4, 2, 2\)\) .*; got \(3, 3\)"),
        ("Rows", "an instance of Rows, .*; got 'Rows'"),
        (Rows, "an instance of Rows, .*; got <class"),
        ({"kind": "Rows", "sizes": [3, 3]}, r"conformance\.adapters\.oracle\.make_split"),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_what_is_no_split(name, split, way_out):
    algorithm, W = ALGORITHMS[name], gaussian(6, 4)
    hyper = algorithm.Hyper()
    with pytest.raises(TypeError, match=f"split must be {'.*' if isinstance(split, dict) else ''}{way_out}"):
        algorithm.init(W, hyper, split=split)
    states = algorithm.init(W, hyper, split=Rows((3, 3)))
    with pytest.raises(TypeError, match="split must be "):
        algorithm.step(W, W, states, hyper, split=split)


def test_the_way_out_of_a_test_vector_s_split_leads_somewhere():
    assert make_split({"kind": "Rows", "sizes": [3, 3]}) == Rows((3, 3))


def test_a_split_of_one_s_own():
    class Halves:
        def split(self, tensor):
            return torch.split(tensor, tensor.shape[0] // 2)

        def merge(self, pieces, shape):
            return torch.cat(tuple(pieces)).reshape(tuple(shape))

    algorithm, W = ALGORITHMS["muon"], gaussian(6, 4)
    hyper = algorithm.Hyper()
    results = [
        algorithm.step(W, W, algorithm.init(W, hyper, split=split), hyper, split=split)[0]
        for split in (Halves(), Rows((3, 3)))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [Rows, Columns, lambda sizes: InterleavedRows(sizes, 2)])
@pytest.mark.parametrize("sizes", [3, None, torch.tensor(3)])
def test_sizes_that_are_no_sequence(kind, sizes):
    with pytest.raises(
        TypeError, match=r"\.sizes must be a sequence of positive integers such as \(4, 2, 2\)"
    ):
        kind(sizes)


@pytest.mark.parametrize("stacked", ["yes", 1, None])
def test_stacked_is_a_bool(stacked):
    with pytest.raises(TypeError, match=r"InterleavedRows\.stacked must be a bool"):
        InterleavedRows((2, 1), 2, stacked=stacked)


def test_sizes_of_numpy():
    assert Rows(np.array([4, 2])) == Rows([4, 2]) == Rows((4, 2))
    assert Heads(np.int64(2)) == Heads(2)
    splits = [Rows(np.array([4, 2])), Heads(np.int64(2)), InterleavedRows(np.array([2, 1]), np.int32(2))]
    for split in splits:
        assert all(plain(value) for value in vars(split).values())
        X = gaussian(6, 4)
        assert torch.equal(split.merge(split.split(X), X.shape), X)


@pytest.mark.parametrize(
    ("value", "error"), [(1.5, TypeError), ("a", TypeError), (True, TypeError), (-1, ValueError)]
)
def test_first_matrix(value, error):
    for name in LOW_RANK:
        with pytest.raises(error, match="first_matrix must be "):
            ALGORITHMS[name].init(gaussian(6, 4), ALGORITHMS[name].Hyper(), first_matrix=value)
    for name in ALL:
        with pytest.raises(error, match="first_matrix must be "):
            ALGORITHMS[name].init(
                gaussian(6, 4), ALGORITHMS[name].Hyper(), split=Rows((3, 3)), first_matrix=value
            )


HALF = Precision(torch.float32, torch.float16)
SINGLE = Precision(torch.float32, torch.float32)
OVERFLOWS = [
    *((name, HALF, 1e10, {}, "state.momentum") for name in LOW_RANK),
    ("adamw", SINGLE, 1e20, {}, "state.exp_avg_sq"),
    *((name, SINGLE, 1.0, {"lr": 1e30, "weight_decay": 1e30}, "param") for name in ALL),
]


@pytest.mark.parametrize("split", [None, Rows((4, 2))])
@pytest.mark.parametrize(("name", "precision", "size", "fields", "what"), OVERFLOWS)
def test_an_overflow_is_named(name, precision, size, fields, what, split):
    algorithm, hyper = ALGORITHMS[name], ALGORITHMS[name].Hyper(**fields)
    W, G = gaussian(6, 4).to(precision.storage), gaussian(6, 4, seed=1).to(precision.storage) * size
    state = algorithm.init(W, hyper, split=split, precision=precision)
    with pytest.raises(
        OverflowError, match=rf"the new {what} overflowed: \d+ NaN or .* than storage={precision.storage}, "
    ):
        algorithm.step(W, G, state, hyper, split=split, precision=precision)
    # the way out that the message names
    wide = algorithm.init(W.double(), hyper, split=split)
    new, _ = algorithm.step(W.double(), G.double(), wide, hyper, split=split)
    assert torch.isfinite(new).all()


@pytest.mark.parametrize("name", NEWTON_SCHULZ)
def test_newton_schulz_normalizes_before_it_rounds(name):
    algorithm, hyper = ALGORITHMS[name], ALGORITHMS[name].Hyper()
    W, G = gaussian(6, 4).float(), gaussian(6, 4, seed=1).float() * 1e10
    new, _ = algorithm.step(W, G, algorithm.init(W, hyper, precision=HALF), hyper, precision=HALF)
    assert 0 < torch.dist(new, W) < 1
