"""What is left when a process dies in the middle: of a step on several ranks, and of a save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.checkpoint import CheckpointException, state_dict_loader
from torch.distributed.device_mesh import DeviceMesh

from conformance.rank_threads import on_threads
from dion_dtensor import Dion, Dion3, Muon
from dion_dtensor.buckets import Bucket
from dion_dtensor.optimizer import OrthonormalOptimizer
from tests.dtensor.failing_programs import (
    DEATHS,
    NAMES,
    die_in_the_second_save,
    give_gradients,
    step_beside_a_dying_rank,
    trainer,
)


@pytest.mark.parametrize("when", DEATHS)
def test_a_rank_that_dies_is_an_error_on_all_others_and_changes_nothing(tmp_path: Path, when: str) -> None:
    """Before a step by its check of the gradients; in the middle with ``atomic=True``."""
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=step_beside_a_dying_rank, args=(rank, 3, tmp_path, when)) for rank in range(3)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0, -9]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["unchanged"]
        assert found["said"] != "no error"
        if when == "before":
            assert "no parameter was changed by this step" in found["said"]
        if when == "after all buckets":
            assert "this step was undone" in found["said"]
        if when != "between buckets":  # where a collective of the update fails
            assert "has a rank died?" in found["said"]


def test_a_parameter_that_one_rank_alone_takes_out_is_named_on_all() -> None:
    """Numbers of two lengths in one all-reduce would end the processes."""

    def step() -> str:
        mesh = DeviceMesh("cpu", [0, 1])
        parameters, optimizer = trainer(Muon, mesh)
        give_gradients(parameters, 0)
        if dist.get_rank():
            optimizer.param_groups[0]["params"].pop()
        before = [parameter.detach().clone() for parameter in parameters]
        with pytest.raises(RuntimeError, match="no parameter was changed") as raised:
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
        return str(raised.value)

    said = on_threads(step, 2)
    assert said[0] == said[1]
    assert f"{NAMES[-1]} (" in said[0]
    assert "is in a param group on some ranks only; take it out on all of them" in said[0]
    assert len(said[0].splitlines()) == 2


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("kind", [Muon, Dion, Dion3])
def test_a_step_that_fails_in_the_middle_is_undone(
    kind: type, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next one is that of an optimizer that never met the failure, counted steps of AdamW among it."""

    def made() -> tuple[list[torch.nn.Parameter], OrthonormalOptimizer]:
        matrices, _ = trainer(Muon)
        bias = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        groups = [
            {"params": [("bias", bias)], "algorithm": "adamw"},
            {"params": list(zip(NAMES, matrices, strict=True))},
        ]
        return [bias, *matrices], kind(groups, lr=0.1, compile=False, atomic=atomic)

    def give(parameters: list[torch.nn.Parameter], step: int) -> None:
        give_gradients(parameters[1:], step)
        parameters[0].grad = torch.full((5,), 1.0 + step, dtype=torch.float64)

    (parameters, optimizer), (expected, other) = made(), made()
    for weights, stepper in ((parameters, optimizer), (expected, other)):
        give(weights, 0)
        stepper.step()
    give(parameters, 1)
    really = Bucket.step

    def failing(bucket: Bucket, *args: Any) -> None:
        really(bucket, *args)
        bucket.pending = (0,)
        if bucket is optimizer.buckets[-1]:
            raise MemoryError("no more")

    monkeypatch.setattr(Bucket, "step", failing)
    with pytest.raises(MemoryError, match="no more"):
        optimizer.step()
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True)) == atomic
    assert all(bucket.pending == (() if atomic else (0,)) for bucket in optimizer.buckets)
    for bucket in optimizer.buckets:
        bucket.pending = ()
    for weights, stepper in ((parameters, optimizer), (expected, other)):
        give(weights, 1)
        stepper.step()
    same = [torch.equal(a, b) for a, b in zip(parameters, expected, strict=True)]
    for a, b in zip(parameters, expected, strict=True):
        same += [torch.equal(optimizer.state[a][key], value) for key, value in other.state[b].items()]
    assert all(same) == atomic


@pytest.mark.parametrize("atomic", [True, False])
def test_after_half_a_first_step_other_parameters_are_not_followed(
    atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless all of it was undone: they would train from a state that the others have left."""
    parameters, optimizer = trainer(Muon, max_bucket_bytes=1, atomic=atomic)
    give_gradients(parameters, 0)
    really = Bucket.step

    def failing(bucket: Bucket, *args: Any) -> None:
        if bucket is optimizer.buckets[-1]:
            raise MemoryError("no more")
        really(bucket, *args)

    monkeypatch.setattr(Bucket, "step", failing)
    with pytest.raises(MemoryError, match="no more"):
        optimizer.step()
    monkeypatch.undo()
    (group,) = optimizer.param_groups
    group["params"] = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    if atomic:
        assert set(optimizer.state_dict()["state"]) == set(range(len(parameters)))
        assert set(optimizer.state) == set(group["params"])
    else:
        with pytest.raises(RuntimeError, match="is not the one that the optimizer was made with"):
            optimizer.step()


def test_a_step_whose_momenta_cannot_be_averaged_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, optimizer = trainer(Dion, resync_every=2, atomic=True)
    for step in range(2):
        give_gradients(parameters, step)
        before = [parameter.detach().clone() for parameter in parameters]
        if step:

            def lost() -> None:
                raise RuntimeError("lost")

            monkeypatch.setattr(optimizer, "synchronize", lost)
            with pytest.raises(RuntimeError, match="lost"):
                optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
            monkeypatch.undo()
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    synchronized = []
    monkeypatch.setattr(optimizer, "synchronize", lambda: synchronized.append(True))
    optimizer.step()
    assert not synchronized  # the step that failed was not counted
    optimizer.step()
    assert synchronized


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


def test_an_error_lists_some_and_counts_the_rest() -> None:
    weights = [(f"layer{index}.weight", torch.nn.Parameter(torch.ones(2, 2))) for index in range(30)]
    optimizer = Muon(weights, compile=False)
    for _, weight in weights:
        weight.grad = torch.full((2, 2), torch.nan)
    with pytest.raises(
        RuntimeError, match=r"layer0\.weight .*(?s:.)*layer11\.weight .*(?s:.)*and 18 more"
    ) as raised:
        optimizer.step()
    assert str(raised.value).count("NaN") == 12
