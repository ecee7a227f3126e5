"""On real processes: the same update on every mesh, wrapped models, and faults on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.dtensor import sharded_programs as programs
from tests.dtensor.checkpoint_programs import (
    RESHARDINGS,
    copies_of_state,
    resumed,
    saved_while_training,
    sharded_after_the_optimizer,
    state_of_another_mesh,
    whole_state_of_rank_zero,
)
from tests.dtensor.layouts import LAYOUTS, Layout, layout
from tests.dtensor.overlap_programs import NINE, lays_what_was_returned, run_in_turns, steps_of
from tests.dtensor.programs import run_steps, run_steps_with
from tests.dtensor.ranks import Ranks
from tests.dtensor.references import EVERY, cases, error, on_one_device, on_one_thread, slow
from tests.dtensor.replica_programs import (
    flattened,
    low_rank_steps,
    momenta_apart,
    replicated,
    split_without_averages,
)
from tests.dtensor.split_programs import SHAPES as SPLITS
from tests.dtensor.split_programs import split_steps

SAMPLE = [layout(text) for text in ("4 S0", "2x2 S0 S1", "2x2 T0 S0", "2x3 S0 S1", "8 S0", "2x2x2 R S0 S1")]
ELEMENTWISE = [
    layout(text) for text in ("2x2 T0 S0", "2x2 S0 S1", "2x2 R S0", "4 S0", "4 R", "2x2x2 R S0 S1")
]


WHOLE = [*cases(["muon"], LAYOUTS, LAYOUTS), *cases(["normuon", "dion2", "dion3"], LAYOUTS, SAMPLE)]
LOW_RANK = [*cases(["dion"], LAYOUTS, LAYOUTS), *cases(["orth_dion"], LAYOUTS, SAMPLE)]


@pytest.mark.parametrize(("name", "where"), WHOLE)
def test_whole_matrix_rules_are_bitwise_those_of_one_device(ranks: Ranks, name: str, where: Layout) -> None:
    expected = on_one_device(name, False, steps=5)
    for result in ranks.run(where.world, run_steps_with, name, where, {"compile": False, "steps": 5}):
        for key, values in expected.items():
            for index, value in enumerate(values):
                assert torch.equal(result[key][index], value), (key, index)


def test_bias_correction_is_bitwise_that_of_one_device(ranks: Ranks) -> None:
    options = {"compile": False, "momentum": "ema", "nesterov": True, "bias_correction": True}
    expected = on_one_thread(run_steps_with, "muon", None, options)
    plain = on_one_device("muon", False)
    for where in (layout("2x2 S0 S1"), layout("2x2 T0 S0"), layout("4 R")):
        for result in ranks.run(where.world, run_steps_with, "muon", where, options):
            assert all(torch.equal(a, b) for a, b in zip(result["weight"], expected["weight"], strict=True))
            assert not torch.equal(result["weight"][0], plain["weight"][0])


@pytest.mark.parametrize("name", ["dion2", "dion3"])
def test_chosen_rows_may_travel_with_all_others(ranks: Ranks, name: str) -> None:
    expected = on_one_device(name, False)
    options = {"compile": False, "path": "assemble"}
    for where in (layout("4 S0"), layout("2x2 T0 S0")):
        for result in ranks.run(where.world, run_steps_with, name, where, options):
            assert all(torch.equal(a, b) for a, b in zip(result["weight"], expected["weight"], strict=True))


@pytest.mark.parametrize("name", ["muon", "normuon", "dion2", "dion3"])
def test_matrices_in_two_turns_are_bitwise_those_of_one_device(ranks: Ranks, name: str) -> None:
    expected = on_one_thread(run_steps, name, None, NINE, compile=False)
    # The last one holds rows in runs that lie apart; older DTensors refuse to make it.
    apart = [layout("2x2 T0 R")] if TorchVersion(torch.__version__) >= "2.14" else []
    for where in (*SAMPLE, *apart):
        for result in ranks.run(where.world, run_in_turns, name, where):
            for key, values in expected.items():
                assert all(torch.equal(a, b) for a, b in zip(result[key], values, strict=True)), (where, key)


@pytest.mark.parametrize(("name", "where"), LOW_RANK)
def test_low_rank_rules_are_those_of_one_device(ranks: Ranks, name: str, where: Layout) -> None:
    expected = on_one_device(name, False)
    for path in ("low_rank", "assemble") if where in SAMPLE else ("low_rank",):
        for result in ranks.run(where.world, run_steps_with, name, where, {"compile": False, "path": path}):
            for key in ("weight", "momentum", "Q"):
                for ours, theirs in zip(result[key], expected[key], strict=True):
                    assert error(ours, theirs) < 1e-11, path


@pytest.mark.parametrize("name", ["dion", "orth_dion"])
@pytest.mark.parametrize("split", ["rows(13, 3, 4)", "columns(9, 5, 5)", "experts(rows(5, 3))"])
def test_dion_may_assemble_blocks(ranks: Ranks, split: str, name: str) -> None:
    expected = on_one_thread(split_steps, name, split, None, {"compile": False})
    options = {"compile": False, "path": "assemble"}
    for result in ranks.run(4, split_steps, name, split, layout("2x2 S0 S1"), options):
        for key, values in expected.items():
            for ours, theirs in zip(result[key], values, strict=True):
                assert error(ours, theirs) < 1e-11, key


@pytest.mark.parametrize(
    ("name", "where", "least"), [("muon", "4 S0", 1000), ("dion2", "4 S1", 900), ("dion3", "4 S0", 1000)]
)
def test_ranks_with_uneven_shards_take_as_many_turns(ranks: Ranks, name: str, where: str, least: int) -> None:
    """Of 13 rows three ranks have four and the last has one, of 10 columns three and one.

    What they send of all is more, and less, than ``least`` bytes.
    """
    expected = on_one_thread(run_steps, name, None, NINE, compile=False)
    for result in ranks.run(4, run_in_turns, name, layout(where), least):
        assert all(torch.equal(a, b) for a, b in zip(result["weight"], expected["weight"], strict=True))


def test_rows_on_their_way_back_are_not_those_that_were_given(ranks: Ranks) -> None:
    """A compiler may write into these as soon as the way back has started."""
    assert all(ranks.run(4, lays_what_was_returned))


MUON_ALONE = "start wait work start wait"
# The second turn is on its way during the work on the first, the first on its way back during the second.
MUON_IN_TURNS = "start start wait work start wait work start wait wait"
ROWS_ALONE = "wait fetch finish work return finish"
ROWS_IN_TURNS = "wait fetch fetch finish work return finish work return finish"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("name", "alone", "in_turns"),
    [("Muon", MUON_ALONE, MUON_IN_TURNS), ("Dion2", ROWS_ALONE, ROWS_IN_TURNS)],
)
def test_collectives_overlap_with_work(
    ranks: Ranks, name: str, alone: str, in_turns: str, compiled: bool
) -> None:
    place = layout("2 S0")
    runs = [ranks.run(2, steps_of, name, place, compiled, least) for least in (0, 1 << 20)]
    for (order, weights, apart), (plain, same, _) in zip(*runs, strict=True):
        # The first wait is that of the ranks' agreement on the gradients.
        assert plain == f"wait {alone}".split()
        assert order == f"wait {in_turns}".split()
        assert apart
        for ours, theirs in zip(weights, same, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("where", ["4 S0", "4 S1", "2x2 R S0", "2x2 T0 S0", "2x2 S0 S1"])
def test_other_ways_to_orthonormalize_agree(ranks: Ranks, where: str) -> None:
    for name, way in (("muon", {"path": "gram"}), ("dion", {"orthonormalize": "rcqr"})):
        options = {"compile": False, "steps": 1, **way}
        single = on_one_thread(run_steps, name, None, compile=False, steps=1)
        for result in ranks.run(layout(where).world, run_steps_with, name, layout(where), options):
            for key in single:
                for ours, theirs in zip(result[key], single[key], strict=True):
                    assert error(ours, theirs) < (1e-12 if name == "muon" else 1e-9), key


SPLIT_LAYOUTS = {
    "rows(9, 5, 5)": ["4 S0", "2x2 T0 S0", "2x2 S0 S1"],
    "columns(9, 5, 5)": ["4 S0", "4 S1", "2x2 T0 S0", "2x2 S0 S1"],
    "heads(4)": ["4 S0", "3 S0", "2x2 T0 S0", "4 S1"],
    "interleaved_rows((3, 1, 1), 3)": ["3 S0"],
    "interleaved_rows((3, 2, 1), 2, True)": ["2x2 S0 S1"],
    "rows(13, 3, 4)": ["4 S0", "4 S1", "2x2 T0 S0", "2x2 S0 S1", "2x2 S1 S1", "2x2x2 R S0 S1"],
    "heads(2)": ["4 S0", "4 S1", "2x2 S0 S1"],
    "rows(3, 2)": ["4 S0"],
    "columns(8, 3)": ["4 S1", "2x2 S0 S1"],
    "experts": [
        "4 S0",
        "8 S0",
        "2x2 S0 S0",
        "2x2x2 S0 S1 S2",
        "2x2x2 S0 R S1",
        "2x2x2x1 S0 R S1 S2",
        "1x2x2x2 S0 R S1 S2",
    ],
    "experts(rows(5, 3))": ["4 S0", "4 S1", "2x2x2 S0 S1 S2", "2x2x2 S0 R S1"],
    "experts(heads(2))": ["4 S0", "2x2 S0 S1"],
    "experts(columns(7))": ["4 S0", "2x2x2 S0 S1 S2", "2x2 S0 S0"],
    "experts(interleaved_columns((1, 1), 4))": ["4 S0", "2x2 S0 S2"],
    "flatten": ["4 S0", "2x2 S0 S2"],
    "flatten(heads(4))": ["4 S0", "3 S0", "2x2 S0 S1"],
    "flatten(rows(5, 3))": ["4 S0", "4 S1", "2x2 S0 S2"],
    "flatten(interleaved_rows((9, 2, 2), 2))": ["4 S0", "2x2 T0 S0", "2x2 S1 R"],
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("split", SPLITS)
def test_logical_matrices_are_those_of_one_device(ranks: Ranks, split: str, name: str) -> None:
    expected = on_one_thread(split_steps, name, split, None, {"compile": False})
    for where in map(layout, SPLIT_LAYOUTS[split]):
        for result in ranks.run(where.world, split_steps, name, split, where, {"compile": False}):
            assert set(result) == set(expected)
            for key, values in expected.items():
                for ours, theirs in zip(result[key], values, strict=True):
                    if name in ("dion", "orth_dion"):
                        assert error(ours, theirs) < 1e-11, (where, key)
                    else:
                        assert torch.equal(ours, theirs), (where, key)


@pytest.mark.parametrize("name", ["muon", "normuon", "dion", "orth_dion", "dion2", "dion3", "adamw", "lion"])
def test_replicas_share_the_work_and_agree(ranks: Ranks, name: str) -> None:
    expected = on_one_thread(replicated, name, "plain")
    for kind in ("ddp", "no_sync", "fsdp"):
        for result in ranks.run(4, replicated, name, kind):
            assert all(local == (kind != "fsdp") for local in result["local"])
            for key in ("weight", "momentum"):
                for ours, theirs in zip(result[key], expected[key], strict=True):
                    assert error(ours, theirs) < 1e-13, (kind, key)


@pytest.mark.parametrize("name", ["muon", "dion", "dion2"])
def test_split_weights_may_have_gradients_that_are_not_averaged(ranks: Ranks, name: str) -> None:
    assert max(ranks.run(4, split_without_averages, name)) < 1e-11


def test_the_momentum_is_averaged_again_as_often_as_asked_for(ranks: Ranks) -> None:
    apart = ranks.run(4, momenta_apart, 2, 4)
    # Averaged after the second and the fourth step alone.
    assert [[error > 1e-3 for error in steps] for steps in apart] == [[True, False, True, False]] * 4
    assert max(steps[step] for steps in apart for step in (1, 3)) < 1e-14


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"path": path}) for name in ("dion2", "dion3") for path in ("exchange", "assemble")),
        ("muon", {}),
        ("normuon", {}),
        ("dion", {"path": "low_rank"}),
    ],
)
def test_a_mesh_that_was_flattened_too_is_as_ever(ranks: Ranks, name: str, options: dict[str, Any]) -> None:
    """Of 9 and 10 rows, 4 x 2 ranks hold other ones than 8 ranks in a row do."""
    options = {"compile": False, **options}
    expected = on_one_thread(run_steps_with, name, None, options)
    for codes in ("S0 S0", "S1 S1"):
        where = layout(f"4x2 {codes}")
        for result in ranks.run(8, run_steps_with, name, where, {**options, "flattened": True}):
            for key, values in expected.items():
                for ours, theirs in zip(result[key], values, strict=True):
                    assert error(ours, theirs) < (1e-11 if name == "dion" else 1e-14), (where, key)


@pytest.mark.parametrize(("before", "after"), [("S0 S0", "R R"), ("S0 S0", "S1 R"), ("R R", "S0 S0")])
def test_a_state_is_loaded_on_a_mesh_that_was_flattened_too(ranks: Ranks, before: str, after: str) -> None:
    assert all(ranks.run(8, programs.loaded_beside_a_flattened_mesh, f"4x2 {before}", f"4x2 {after}"))


def test_a_flattened_mesh_is_a_mesh(ranks: Ranks) -> None:
    expected = on_one_thread(flattened, False)
    for result in ranks.run(8, flattened, True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True))


def test_low_rank_sync_is_the_synchronous_run(ranks: Ranks) -> None:
    for update, momentum, apart in ranks.run(4, low_rank_steps, 50):
        assert update < 1e-10
        assert momentum < 1e-10
        assert apart > 1  # the ranks' momenta were never averaged


@pytest.mark.parametrize("resharding", RESHARDINGS)
@pytest.mark.parametrize("name", ["muon", "dion", "dion3", *map(slow, ["normuon", "dion2", "adamw"])])
def test_a_checkpoint_goes_from_one_mesh_to_another(
    ranks: Ranks, tmp_path: Path, name: str, resharding: str
) -> None:
    straight, loaded = ranks.run(8, resumed, name, resharding, str(tmp_path / "checkpoint"))[0]
    for ours, theirs in zip(loaded, straight, strict=True):
        if name == "dion":
            assert error(ours, theirs) < 1e-11
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("where", ELEMENTWISE, ids=str)
def test_elementwise_rules_are_bitwise_those_of_one_device(ranks: Ranks, where: Layout, name: str) -> None:
    expected = on_one_device(name, False, steps=5)
    for result in ranks.run(where.world, run_steps_with, name, where, {"compile": False, "steps": 5}):
        for key, values in expected.items():
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(result[key], values, strict=True))


@pytest.mark.parametrize(
    ("place", "wrapped"),
    [("4x2 T0 S0", False), ("4x2 T0 S0", True), ("2x2x2 T0 S0 S0", False), ("3x2 T0 S0", False)],
)
def test_rows_lie_where_torch_lays_them(ranks: Ranks, place: str, wrapped: bool) -> None:
    sizes = [1, 9, 17, 19, 20] if wrapped else list(range(1, 36))
    assert (
        ranks.run(layout(place).world, programs.rows_mistaken, place, sizes, wrapped)
        == [[]] * layout(place).world
    )


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
@pytest.mark.parametrize("kind", programs.WRAPPED)
def test_wrapped_models_train_as_the_plain_one(ranks: Ranks, kind: str, algorithm: str) -> None:
    if kind in programs.NEWER and not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"):
        pytest.skip("this torch's FSDP2 has one mesh for data parallelism alone")
    expected, _ = programs.wrapped_training("plain", algorithm, False)
    for weights, table in ranks.run(4, programs.wrapped_training, kind, algorithm, False):
        assert set(weights) == set(expected)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-10, atol=1e-12)
        assert programs.WRAPPED_LAYOUTS[kind] in table


@pytest.mark.parametrize("fault", ["nan", "missing", "placement"])
def test_a_fault_on_one_rank_is_an_error_on_all(ranks: Ranks, fault: str) -> None:
    said = {
        "nan": "NaN or inf",
        "missing": "missing on some ranks only",
        "placement": "does not lie as its parameter",
    }
    for message, unchanged in ranks.run(4, programs.faulty_step, fault, 2):
        assert "second.weight ([6, 4] float32 on shard(2)=" in message
        assert said[fault] in message
        assert "first.weight" not in message
        assert unchanged


@pytest.mark.parametrize("where", ["plain", "submesh", "mesh"])
def test_a_fault_on_one_mesh_is_an_error_on_the_ranks_of_all(ranks: Ranks, where: str) -> None:
    for message, unchanged in ranks.run(4, programs.fault_among_meshes, where, 3):
        assert f"{where}.weight (" in message
        assert message.count("NaN or inf") == 1
        assert unchanged


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_partial_gradients_are_averaged(ranks: Ranks, algorithm: str) -> None:
    for partial, averaged in ranks.run(4, programs.partial_gradient, algorithm):
        torch.testing.assert_close(partial, averaged, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_gradients_to_be_averaged_over_the_axis_that_shards_are(ranks: Ranks, algorithm: str) -> None:
    for pending, averaged in ranks.run(4, programs.pending_gradient, algorithm):
        torch.testing.assert_close(pending, averaged, rtol=1e-12, atol=1e-13)


def test_replicated_gradients_of_sharded_parameters_are_cut(ranks: Ranks) -> None:
    """So does torch's tensor parallelism leave those of a row-wise embedding."""
    for whole, sharded in ranks.run(4, programs.replicated_gradient):
        assert torch.equal(whole, sharded)


def test_the_state_of_sharded_parameters_can_be_copied(ranks: Ranks) -> None:
    for found in ranks.run(4, copies_of_state):
        assert found == {"deepcopy": True, "torch.save": True, "pickle": True}


@pytest.mark.parametrize("algorithm", ["normuon", "dion"])
def test_a_whole_state_goes_out_from_rank_zero(ranks: Ranks, algorithm: str) -> None:
    assert all(map(all, ranks.run(8, whole_state_of_rank_zero, algorithm)))


def test_an_asynchronous_checkpoint_is_not_changed_by_later_steps(ranks: Ranks, tmp_path: Path) -> None:
    assert all(ranks.run(8, saved_while_training, str(tmp_path)))


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_parameters_may_be_sharded_after_the_optimizer_was_made(
    ranks: Ranks, algorithm: str, load: bool
) -> None:
    assert all(ranks.run(4, sharded_after_the_optimizer, algorithm, load))


def test_a_state_on_another_mesh_is_refused(ranks: Ranks) -> None:
    for said in ranks.run(4, state_of_another_mesh):
        assert "state 'momentum' lies on another mesh" in said
        assert "give its full_tensor()" in said


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_state_keys_are_the_same_on_all_ranks(ranks: Ranks, algorithm: str) -> None:
    keys = ranks.run(4, programs.state_of_rank, algorithm)
    assert all(one == keys[0] for one in keys)
    assert [name for name, _ in keys[0]] == ["w0", "w1", "w2"]
    assert all(found == (["momentum"] if algorithm == "muon" else ["Q", "momentum"]) for _, found in keys[0])
