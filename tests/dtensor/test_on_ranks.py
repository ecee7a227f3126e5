"""On real processes: the same update on every mesh, wrapped models, and faults on one rank.

One file, so that one test process owns the ranks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dtensor import sharded_programs as programs
from tests.dtensor.layouts import LAYOUTS, Layout, layout
from tests.dtensor.programs import run_steps, run_steps_with
from tests.dtensor.ranks import Ranks

COMPILED_SHAPES = ((13, 10), (13, 10), (13, 10))
COMPILED = [layout(text) for text in ("2x2 T0 S0", "2x2 S0 S1", "2x2 R S0", "4 S0")]
ELEMENTWISE = [*COMPILED, layout("4 R"), layout("2x2x2 R S0 S1")]


@cache
def on_one_device(name: str, small: bool) -> dict[str, list[Tensor]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options: dict[str, Any] = {"shapes": COMPILED_SHAPES} if small else {}
    result = run_steps(name, None, compile=False, **options)
    assert result is not None
    torch.set_num_threads(threads)
    return result


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def up_to_sign(ours: Tensor, theirs: Tensor) -> Tensor:
    """Columns of Q with the signs of ``theirs``: a QR may choose them freely."""
    return ours * (ours * theirs).sum(0, keepdim=True).sign()


@pytest.mark.parametrize("where", LAYOUTS, ids=str)
def test_muon_is_bitwise_that_of_one_device(ranks: Ranks, where: Layout) -> None:
    expected = on_one_device("muon", False)
    for result in ranks.run(where.world, run_steps_with, "muon", where, {"compile": False}):
        for key, values in expected.items():
            for index, value in enumerate(values):
                assert torch.equal(result[key][index], value), (key, index)


@pytest.mark.parametrize("where", LAYOUTS, ids=str)
def test_dion_is_that_of_one_device(ranks: Ranks, where: Layout) -> None:
    expected = on_one_device("dion", False)
    for result in ranks.run(where.world, run_steps_with, "dion", where, {"compile": False}):
        for index, weight in enumerate(expected["weight"]):
            assert error(result["weight"][index], weight) < 1e-11
            assert error(result["momentum"][index], expected["momentum"][index]) < 1e-11
            Q = expected["Q"][index]
            assert error(up_to_sign(result["Q"][index], Q), Q) < 1e-11


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("where", ELEMENTWISE, ids=str)
def test_elementwise_rules_are_bitwise_those_of_one_device(ranks: Ranks, where: Layout, name: str) -> None:
    expected = on_one_device(name, False)
    for result in ranks.run(where.world, run_steps_with, name, where, {"compile": False}):
        for key, values in expected.items():
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(result[key], values, strict=True))


@pytest.mark.parametrize("name", ["muon", "dion"])
@pytest.mark.parametrize("where", COMPILED, ids=str)
def test_compiled_agrees(ranks: Ranks, where: Layout, name: str) -> None:
    expected = on_one_device(name, True)
    options = {"compile": True, "shapes": COMPILED_SHAPES}
    for result in ranks.run(where.world, run_steps_with, name, where, options):
        for index, weight in enumerate(expected["weight"]):
            assert error(result["weight"][index], weight) < (1e-14 if name == "muon" else 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "dion"])
@pytest.mark.parametrize("where", [one for one in LAYOUTS if one not in COMPILED], ids=str)
def test_compiled_agrees_everywhere(ranks: Ranks, where: Layout, name: str) -> None:
    test_compiled_agrees(ranks, where, name)


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "tp", "fsdp+tp"])
def test_wrapped_models_train_as_the_plain_one(ranks: Ranks, kind: str, algorithm: str) -> None:
    expected, _ = programs.wrapped_training("plain", algorithm, False)
    for weights, table in ranks.run(4, programs.wrapped_training, kind, algorithm, False):
        assert set(weights) == set(expected)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-10, atol=1e-12)
        if kind == "fsdp+tp":
            assert "_StridedShard" in table or "_S(0" in table


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
def test_state_keys_are_the_same_on_all_ranks(ranks: Ranks, algorithm: str) -> None:
    keys = ranks.run(4, programs.state_of_rank, algorithm)
    assert all(one == keys[0] for one in keys)
    assert [name for name, _ in keys[0]] == ["w0", "w1", "w2"]
    assert all(found == (["momentum"] if algorithm == "muon" else ["Q", "momentum"]) for _, found in keys[0])
