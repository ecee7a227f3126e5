"""How much of a dim a rank holds, and random values by their place, without lists of what is long."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from dion_dtensor import Dion, Muon, layout, philox
from dion_dtensor.layout import owners


@st.composite
def sharded(draw: st.DrawFn) -> tuple[int, tuple[int, ...], tuple[Placement, ...]]:
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    placements: list[Placement] = []
    for axis in range(len(sizes)):
        factor = math.prod(sizes[axis + 1 :]) * draw(st.sampled_from([1, 1, 2]))
        strided = draw(st.booleans())
        placements.append(_StridedShard(0, split_factor=factor) if strided else Shard(0))
    return draw(st.integers(0, 40)), sizes, tuple(placements)


@given(sharded())
def test_the_most_that_a_rank_holds(case: tuple[int, tuple[int, ...], tuple[Placement, ...]]) -> None:
    size, sizes, placements = case
    assert layout._most_held(*case) == max(map(len, owners(size, sizes, placements).values()))


def test_the_rows_of_an_embedding_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("listed")

    monkeypatch.setattr(layout, "owners", refused)
    table = nn.Parameter(torch.empty(100_000_000, 8, device="meta"))
    Muon([{"params": [("table", table)], "algorithm": "adamw"}], compile=False)


def test_random_values_are_those_of_their_places_however_many_are_drawn_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = philox.normal(30, 21, seed=3, name="w", matrix=2)
    monkeypatch.setattr(philox, "TOGETHER", 13)
    assert torch.equal(philox.normal(30, 21, seed=3, name="w", matrix=2), whole)
    some = torch.tensor([29, 0, 7])
    assert torch.equal(philox.normal(some, 21, seed=3, name="w", matrix=2), whole[some])
    assert philox.normal(0, 21, seed=3, name="w").shape == (0, 21)
    assert philox.normal(5, 0, seed=3, name="w").shape == (5, 0)


def test_nothing_is_drawn_for_tensors_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "_normal", None)
    weight = nn.Parameter(torch.empty(9, 7, device="meta"))
    optimizer = Dion([("w", weight)], rank_fraction=0.5, compile=False)
    assert optimizer.state[weight]["Q"].shape == (7, 4)
