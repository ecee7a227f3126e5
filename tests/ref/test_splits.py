from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dion_ref import (
    ALGORITHMS,
    Columns,
    Experts,
    Flatten,
    Heads,
    InterleavedColumns,
    InterleavedRows,
    Rows,
)
from dion_ref.philox import normal

from .helpers import ALL, LOW_RANK, gaussian, tensors_of

SPLITS = [
    (Rows((6, 2, 2)), (10, 5), [(6, 5), (2, 5), (2, 5)]),
    (Rows((3, 4)), (2, 7, 5), [(2, 3, 5), (2, 4, 5)]),
    (Columns((6, 2, 2)), (5, 10), [(6, 5), (2, 5), (2, 5)]),
    (Heads(3), (12, 5), [(3, 4, 5)]),
    (InterleavedRows((4, 2, 2), groups=2), (16, 5), [(8, 5), (4, 5), (4, 5)]),
    (InterleavedRows((4, 2, 2), groups=2, stacked=True), (16, 5), [(2, 4, 5), (2, 2, 5), (2, 2, 5)]),
    (InterleavedColumns((1, 1), groups=3), (5, 6), [(3, 5), (3, 5)]),
    (Experts(), (3, 4, 5), [(3, 4, 5)]),
    (Experts(Rows((4, 3))), (3, 7, 5), [(3, 4, 5), (3, 3, 5)]),
    (Experts(Heads(2)), (3, 8, 5), [(6, 4, 5)]),
    (Experts(Columns((4, 2))), (2, 5, 6), [(2, 4, 5), (2, 2, 5)]),
    (Experts(InterleavedColumns((1, 1), groups=3)), (2, 5, 6), [(2, 3, 5), (2, 3, 5)]),
    (Flatten(), (4, 3, 2, 2), [(4, 12)]),
    (Flatten(), (4, 3, 2), [(4, 6)]),
    (Flatten(), (4, 3, 2, 2, 2), [(4, 24)]),
    (Flatten(Heads(2)), (4, 3, 2, 2), [(2, 2, 12)]),
    (Flatten(Rows((3, 1))), (4, 3, 2), [(3, 6), (1, 6)]),
]
IDS = [f"{type(split).__name__}-{len(shape)}d-{index}" for index, (split, shape, _) in enumerate(SPLITS)]


@pytest.mark.parametrize(("split", "shape", "pieces"), SPLITS, ids=IDS)
def test_shapes_and_the_way_back(split, shape, pieces):
    X = gaussian(*shape)
    cut = split.split(X)
    assert [tuple(piece.shape) for piece in cut] == pieces
    back = split.merge(cut, shape)
    assert torch.equal(back, X)
    assert back.data_ptr() != X.data_ptr()


def numbered(rows, columns=1):
    return torch.arange(rows, dtype=torch.float64)[:, None].expand(rows, columns).contiguous()


def test_which_rows_go_where():
    rows = [piece.flatten().tolist() for piece in Rows((2, 1)).split(numbered(3))]
    assert rows == [[0, 1], [2]]
    columns = [piece.flatten().tolist() for piece in Columns((2, 1)).split(numbered(3).mT)]
    assert columns == rows
    assert Heads(2).split(numbered(4))[0].squeeze(-1).tolist() == [[0, 1], [2, 3]]
    gate, up = InterleavedColumns((1, 1), groups=2).split(numbered(4).mT)
    assert [gate.flatten().tolist(), up.flatten().tolist()] == [[0, 2], [1, 3]]
    gates, ups = Experts(Rows((2, 1))).split(numbered(6).view(2, 3, 1))
    assert gates.squeeze(-1).tolist() == [[0, 1], [3, 4]]
    assert ups.squeeze(-1).tolist() == [[2], [5]]
    q, k, v = InterleavedRows((2, 1, 1), groups=2).split(numbered(8))
    assert [q.flatten().tolist(), k.flatten().tolist(), v.flatten().tolist()] == [
        [0, 1, 4, 5],
        [2, 6],
        [3, 7],
    ]
    q, k, _ = InterleavedRows((2, 1, 1), groups=2, stacked=True).split(numbered(8))
    assert q.squeeze(-1).tolist() == [[0, 1], [4, 5]]
    assert k.squeeze(-1).tolist() == [[2], [6]]


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 4), st.booleans()
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_round_trip_of_any_sizes(sizes, groups, columns, stacked):
    X = gaussian(groups * sum(sizes), columns)
    for split in (InterleavedRows(tuple(sizes), groups, stacked), Heads(groups)):
        assert torch.equal(split.merge(split.split(X), X.shape), X)
    one = Rows(tuple(sizes))
    X = X[: sum(sizes)]
    assert torch.equal(one.merge(one.split(X), X.shape), X)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("split", "shape", "pieces"), SPLITS, ids=IDS)
def test_a_split_step_is_the_step_of_each_matrix(split, shape, pieces, name):
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper(weight_decay=0.3)
    W, grads = gaussian(*shape), [gaussian(*shape, seed=seed) for seed in (1, 2)]
    state = algorithm.init(W, hyper, name="w", seed=2, split=split)
    assert isinstance(state, tuple)
    new = W
    for grad in grads:
        new, state = algorithm.step(new, grad, state, hyper, split=split)
    assert new.shape == W.shape

    # every logical matrix alone, counted through the parameter
    wanted, matrix = [], 0
    for index, piece in enumerate(split.split(W)):
        singles = []
        for position in range(piece.shape[0] if piece.ndim == 3 else 1):
            one = lambda X, i=index, p=position: X[i][p] if X[i].ndim == 3 else X[i]  # noqa: E731
            w = one(split.split(W))
            alone = algorithm.init(w, hyper, name="w", seed=2, first_matrix=matrix)
            for grad in grads:
                w, alone = algorithm.step(w, one(split.split(grad)), alone, hyper)
            singles.append(w)
            for key, value in tensors_of(alone).items():
                whole = getattr(state[index], key)
                assert torch.equal(whole[position] if piece.ndim == 3 else whole, value), key
            matrix += 1
        wanted.append(torch.stack(singles) if piece.ndim == 3 else singles[0])
    assert torch.equal(new, split.merge(wanted, shape))


@pytest.mark.parametrize("name", LOW_RANK)
def test_matrices_are_counted_on_from_piece_to_piece(name):
    algorithm = ALGORITHMS[name]
    states = algorithm.init(
        gaussian(2, 7, 5), algorithm.Hyper(), name="w", seed=1, split=Rows((3, 4)), first_matrix=10
    )
    assert torch.equal(states[0].Q[1], normal(3, 3, seed=1, name="w", matrix=11))
    assert torch.equal(states[1].Q[0], normal(4, 4, seed=1, name="w", matrix=12))
    assert torch.equal(states[1].Q[1], normal(4, 4, seed=1, name="w", matrix=13))


def test_trap_11_scale_is_that_of_the_logical_matrix():
    # a fused matrix of two square blocks: each block scales by 1, the fused one by sqrt(2)
    W, G = torch.zeros(8, 4, dtype=torch.float64), gaussian(8, 4, seed=1)
    algorithm = ALGORITHMS["muon"]
    hyper = algorithm.Hyper(lr=1.0, polynomial="exact")
    split = Rows((4, 4))
    fused, _ = algorithm.step(W, G, algorithm.init(W, hyper), hyper)
    parts, _ = algorithm.step(W, G, algorithm.init(W, hyper, split=split), hyper, split=split)
    assert torch.linalg.svdvals(fused).tolist() == pytest.approx([2**0.5] * 4)
    assert torch.linalg.svdvals(parts[:4]).tolist() == pytest.approx([1.0] * 4)


BAD = [
    (Rows((3, 3)), (7, 5), "needs 6 rows"),
    (Rows((3, 3)), (6,), "needs a tensor of 2 or 3 dims"),
    (Heads(4), (10, 5), "divisible by 4"),
    (Heads(2), (2, 4, 5), "needs a tensor of 2 dims"),
    (InterleavedRows((2, 1), groups=2), (7, 5), "needs 6 rows"),
    (Experts(), (4, 5), "needs a tensor of 3 dims"),
    (Experts(Rows((2, 3))), (2, 4, 5), "needs 5 rows"),
    (InterleavedColumns((2, 1), groups=2), (6, 5), "needs 6 columns"),
    (Flatten(), (4, 5), "needs a tensor of 3 or 4 or 5 dims"),
    (Flatten(Heads(3)), (4, 5, 2), "needs rows divisible by 3"),
]


@pytest.mark.parametrize(("split", "shape", "message"), BAD)
def test_a_split_that_does_not_fit(split, shape, message):
    algorithm = ALGORITHMS["muon"]
    with pytest.raises(ValueError, match=message):
        algorithm.init(gaussian(*shape), algorithm.Hyper(), split=split)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rows(()),
        lambda: Rows((2, 0)),
        lambda: Rows((2, 1.5)),
        lambda: Heads(0),
        lambda: InterleavedRows((1,), groups=0),
        lambda: InterleavedRows((), groups=1),
        lambda: InterleavedColumns((1,), groups=0),
    ],
)
def test_nonsense_splits(make):
    with pytest.raises(ValueError, match="positive integers"):
        make()


def test_experts_are_cut_by_a_split():
    with pytest.raises(TypeError, match="must be an instance of Rows"):
        Experts((4, 4))


def test_state_and_split_must_agree():
    algorithm = ALGORITHMS["muon"]
    hyper, W, split = algorithm.Hyper(), gaussian(6, 4), Rows((3, 3))
    whole, parts = algorithm.init(W, hyper), algorithm.init(W, hyper, split=split)
    with pytest.raises(TypeError, match="tuple of states"):
        algorithm.step(W, W, whole, hyper, split=split)
    with pytest.raises(TypeError, match="state must be"):
        algorithm.step(W, W, parts, hyper)
    with pytest.raises(ValueError, match="makes 2 pieces, got 1 states"):
        algorithm.step(W, W, parts[:1], hyper, split=split)
    with pytest.raises(ValueError, match="merges 2 pieces, got 1"):
        split.merge((W,), W.shape)
    with pytest.raises(ValueError, match="grad must have shape"):
        algorithm.step(W, gaussian(4, 6), parts, hyper, split=split)
    with pytest.raises(TypeError, match=r"param must be a torch\.Tensor"):
        algorithm.init(W.tolist(), hyper, split=split)
    with pytest.raises(TypeError, match=r"grad must be a torch\.Tensor"):
        algorithm.step(W, W.tolist(), parts, hyper, split=split)
