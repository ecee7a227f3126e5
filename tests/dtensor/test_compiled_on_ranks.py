"""Compiled steps on real processes: what eager ones give on one device."""

from __future__ import annotations

import pytest

from tests.dtensor.layouts import LAYOUTS, Layout, layout
from tests.dtensor.programs import run_steps_with
from tests.dtensor.ranks import Ranks
from tests.dtensor.references import (
    COMPILED_SHAPES,
    EVERY,
    cases,
    error,
    on_one_device,
    on_one_thread,
    slow,
)
from tests.dtensor.split_programs import split_steps

COMPILED = [layout(text) for text in ("2x2 T0 S0", "2x2 S0 S1", "2x2 R S0", "4 S0")]


@pytest.mark.parametrize(
    ("name", "split", "where"),
    [
        ("normuon", "rows(13, 3, 4)", "3 S0"),
        ("dion3", "rows(3, 2)", "4 S0"),  # a rank holds nothing
        *((name, "rows(13, 3, 4)", "2x2 S0 S1") for name in ("dion", "dion2")),
        ("dion", "columns(9, 5, 5)", "2 S1"),
        *(slow(name, "rows(13, 3, 4)", "3 S0") for name in ("dion2", "dion3")),
        *(slow(name, "rows(3, 2)", "4 S0") for name in ("dion", "dion2")),
        slow("dion", "experts(interleaved_columns((1, 1), 4))", "2x2 S0 S2"),
        slow("orth_dion", "rows(13, 3, 4)", "2x2 S0 S1"),
        *(slow(name, "experts(rows(5, 3))", "2x2x2 S0 S1 S2") for name in ("muon", "dion", "dion3")),
    ],
)
def test_compiled_blocks_of_both_kinds_agree_where_shards_differ(
    ranks: Ranks, name: str, split: str, where: str
) -> None:
    expected = on_one_thread(split_steps, name, split, None, {"compile": False})
    world = layout(where).world
    for result in ranks.run(world, split_steps, name, split, layout(where), {"compile": True}):
        for key, values in expected.items():
            most = 1e-11 if name in ("dion", "orth_dion") else 1e-14
            assert all(error(a, b) < most for a, b in zip(result[key], values, strict=True)), key


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *cases(["dion"], COMPILED, COMPILED[:2]),
        *cases([name for name in EVERY if name not in ("dion", "dion3")], COMPILED, COMPILED[:1]),
        *cases(["dion3"], COMPILED, COMPILED[2:]),  # also where replicas share the chosen rows
    ],
)
def test_compiled_agrees(ranks: Ranks, name: str, where: Layout) -> None:
    expected = on_one_device(name, True)
    options = {"compile": True, "shapes": COMPILED_SHAPES}
    for result in ranks.run(where.world, run_steps_with, name, where, options):
        for index, weight in enumerate(expected["weight"]):
            assert error(result["weight"][index], weight) < (
                1e-11 if name in ("dion", "orth_dion") else 1e-14
            )


@pytest.mark.parametrize(
    ("name", "where", "shape"),
    [("dion2", "4 S0", (3, 7)), ("dion2", "4 S1", (7, 3)), ("dion3", "2x2 S0 S1", (1, 7))],
)
def test_compiled_ranks_that_hold_nothing_take_part(
    ranks: Ranks, name: str, where: str, shape: tuple[int, int]
) -> None:
    options = {"compile": True, "shapes": (shape, shape)}
    expected = on_one_thread(run_steps_with, name, None, options | {"compile": False})
    for result in ranks.run(4, run_steps_with, name, layout(where), options):
        for ours, theirs in zip(result["weight"], expected["weight"], strict=True):
            assert error(ours, theirs) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("where", [one for one in LAYOUTS if one not in COMPILED], ids=str)
def test_compiled_agrees_everywhere(ranks: Ranks, where: Layout, name: str) -> None:
    test_compiled_agrees(ranks, name, where)
