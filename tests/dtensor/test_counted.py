"""What a step sends and holds on real processes: as counted without them, and as the formulas say."""

from __future__ import annotations

import pytest

from conformance.plan.counting import fake_mesh
from dion_dtensor.planning.predict import basis_flops
from tests.dtensor.counted_programs import (
    EVENLY,
    NUMBER,
    launched_on,
    memory_on_ranks,
    seen_on_ranks,
    sent_by_a_split,
    sent_by_dion,
)
from tests.dtensor.layouts import layout
from tests.dtensor.ranks import Ranks


@pytest.mark.parametrize("where", ["4 S0", "2x2 S0 S1", "2x2 R S0", "2x2 T0 S0"])
def test_what_is_counted_without_ranks_is_what_the_profiler_sees_on_ranks(ranks: Ranks, where: str) -> None:
    """Bytes that gloo is given in each collective, and FLOPs, against what `conformance plan` counts."""
    place, names = layout(where), ("shard", "tensor")[-len(layout(where).mesh) :]
    with fake_mesh(place.mesh, names) as mesh:
        counted = launched_on(mesh, place, "meta")
    everywhere = ranks.run(4, seen_on_ranks, place)
    for case, (algorithm, flops, expected, total) in enumerate(counted):
        seen = [one[case] for one in everywhere]
        for products, sizes, _ in seen:
            # The profiler does not know the FLOPs of a QR.
            basis = NUMBER / 4 * basis_flops(64, 8) if algorithm == "dion" else 0
            assert flops == pytest.approx(products + basis, rel=1e-6), algorithm
            if case < 2 * EVENLY:
                assert sizes == expected, algorithm
        if case >= 2 * EVENLY:
            assert sum(sent for _, _, sent in seen) == pytest.approx(4 * total, rel=0.05), algorithm


CUT = [
    ((384, 256), "rows(224, 80, 80)"),
    ((768, 256), "rows(400, 368)"),
    ((1024, 512), "rows(544, 240, 240)"),  # columns of one, rows of the others
]


@pytest.mark.parametrize("where", ["4 S0", "2x2 T0 S0"])
@pytest.mark.parametrize(("shape", "split"), CUT)
def test_matrices_that_shard_boundaries_cut_send_what_whole_ones_do(
    ranks: Ranks, where: str, shape: tuple[int, int], split: str
) -> None:
    whole = ranks.run(4, sent_by_a_split, layout(where), shape, None)
    cut = ranks.run(4, sent_by_a_split, layout(where), shape, split)
    for theirs, ours in zip(whole, cut, strict=True):
        for rule, most in theirs.items():
            assert 0 < ours[rule] <= 1.1 * most, rule
        for rule in ("Dion2", "Dion3"):
            assert ours[rule] <= 1.25 * 0.25 * ours["Muon"], rule


@pytest.mark.parametrize(
    ("where", "shape", "split"),
    [("4 S1", *CUT[1]), ("4 S1", *CUT[2]), *(("2x2 S0 S1", *one) for one in CUT)],
)
def test_chosen_columns_of_blocks_travel_alone_where_columns_are_sharded(
    ranks: Ranks, where: str, shape: tuple[int, int], split: str
) -> None:
    found = ranks.run(4, sent_by_a_split, layout(where), shape, split)
    # A rank that holds more rows of the matrix whose columns are chosen sends more.
    mean = {rule: sum(one[rule] for one in found) / len(found) for rule in found[0]}
    assert 0 < mean["Dion2"] <= 1.25 * 0.25 * mean["Muon"]
    if shape[1] > 256:  # of narrower ones the sums of the rows weigh more
        assert 0 < mean["Dion3"] <= 1.25 * 0.25 * mean["Muon"]


@pytest.mark.parametrize("where", ["4 S0", "2x2 S0 S1", "2x2 T0 S0"])
@pytest.mark.parametrize(
    ("shape", "split"), [((1024, 512), "rows(544, 240, 240)"), ((256, 384), "columns(256, 128)")]
)
def test_dion_leaves_blocks_where_they_lie(
    ranks: Ranks, where: str, shape: tuple[int, int], split: str
) -> None:
    factors = ranks.run(4, sent_by_dion, layout(where), shape, split, "low_rank")
    assembled = ranks.run(4, sent_by_dion, layout(where), shape, split, "assemble")
    for (sent, foreseen), (most, foreseen_most) in zip(factors, assembled, strict=True):
        assert 0 < sent <= 0.6 * most
        assert 0.5 <= sent / foreseen <= 2  # as if the blocks were apart
        assert most == pytest.approx(foreseen_most, rel=0.1)


@pytest.mark.parametrize("where", ["4 S0", "2x2 S0 S1"])
def test_memory_is_counted_as_the_allocator_does(ranks: Ranks, where: str) -> None:
    found = [one for result in ranks.run(4, memory_on_ranks, layout(where)) for one in result]
    for algorithm in {algorithm for algorithm, _, _ in found}:
        # The least of many: gloo's threads sometimes let go of a buffer late.
        counted = min(size for name, size, _ in found if name == algorithm)
        measured = min(size for name, _, size in found if name == algorithm)
        assert counted == pytest.approx(measured, rel=0.01), algorithm
