"""Wrapped models, and faults on one rank."""

from __future__ import annotations

import pytest
import torch

from tests.dtensor import sharded_programs as programs
from tests.dtensor.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")


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
