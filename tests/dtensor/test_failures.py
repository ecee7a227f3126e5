"""What is left when a process dies in the middle: of a step on several ranks, and of a save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.distributed.checkpoint import CheckpointException, state_dict_loader

from dion_dtensor import Muon
from tests.dtensor.failing_programs import (
    die_in_the_second_save,
    give_gradients,
    step_beside_a_dying_rank,
    trainer,
)


def test_a_rank_that_dies_before_a_step_is_an_error_on_all_others_and_changes_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=step_beside_a_dying_rank, args=(rank, 3, tmp_path)) for rank in range(3)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0, -9]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["unchanged"]
        assert "no parameter was changed by this step" in found["said"]
        assert "has a rank died?" in found["said"]


def test_a_save_that_is_killed_leaves_the_earlier_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=die_in_the_second_save, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    assert list((tmp_path / "two").iterdir())  # it had begun
    parameters, optimizer = trainer(Muon)
    content = {"weights": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}
    with pytest.raises((CheckpointException, FileNotFoundError)):
        state_dict_loader.load(content, checkpoint_id=str(tmp_path / "two"), no_dist=True)
    state_dict_loader.load(content, checkpoint_id=str(tmp_path / "one"), no_dist=True)
    optimizer.load_state_dict(content["optimizer"])
    give_gradients(parameters, 1)
    optimizer.step()
    expected, other = trainer(Muon)
    for step in range(2):
        give_gradients(expected, step)
        other.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, expected, strict=True))
