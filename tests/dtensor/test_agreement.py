"""Ranks that are about to take different steps: all of them say so, none waits for another, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from conformance.rank_threads import on_threads
from dion_dtensor import Dion2, Muon
from dion_dtensor.agreement import _comparable
from dion_dtensor.optimizer import OrthonormalOptimizer
from tests.dtensor.failing_programs import give_gradients, trainer


def steps(change: Callable[[OrthonormalOptimizer], Any], back: Callable[[OrthonormalOptimizer], Any]) -> Any:
    """What each of two ranks says of a step before which the second one has made a ``change``, by type and text."""

    def step() -> tuple[type, str]:
        mesh = DeviceMesh("cpu", [0, 1])
        parameters, optimizer = trainer(Muon, mesh)
        give_gradients(parameters, 0)
        before = [parameter.detach().clone() for parameter in parameters]
        kept = dict(optimizer.param_groups[0])
        if dist.get_rank():
            change(optimizer)
        with pytest.raises((RuntimeError, ValueError)) as raised:
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
        if dist.get_rank():
            back(optimizer)
        del optimizer.param_groups[1:]
        optimizer.param_groups[0].update(kept)
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
        return raised.type, str(raised.value)

    return on_threads(step, 2)


def nothing(optimizer: OrthonormalOptimizer) -> None:
    pass


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("lr", torch.tensor(float("nan"))), ("mu", 2.0)])
def test_a_hyperparameter_out_of_range_on_one_rank_is_known_to_all(name: str, value: Any) -> None:
    (other, said), (own, named) = steps(
        lambda optimizer: optimizer.param_groups[0].update({name: value}), nothing
    )
    assert (own, other) == (ValueError, RuntimeError)
    assert named.startswith(name)
    assert "another rank has refused this step" in said


@pytest.mark.parametrize(("name", "value"), [("lr", torch.tensor(0.2)), ("mu", 0.5), ("maximize", True)])
def test_hyperparameters_that_differ_between_ranks_are_named_on_all(name: str, value: Any) -> None:
    """Each rank would change its own shards by its own."""
    (_, first), (_, second) = steps(
        lambda optimizer: optimizer.param_groups[0].update({name: value}), nothing
    )
    for said in (first, second):
        assert "param group 0 (muon): its hyperparameters differ between ranks, here they are lr=" in said
    shown = value.item() if isinstance(value, torch.Tensor) else value
    assert f"{name}={shown}" in second
    assert f"{name}={shown}" not in first


def test_hyperparameters_that_are_written_otherwise_do_not_differ() -> None:
    def step() -> bool:
        parameters, optimizer = trainer(Muon, DeviceMesh("cpu", [0, 1]))
        give_gradients(parameters, 0)
        group, other = optimizer.param_groups[0], dist.get_rank()
        group["lr"], group["maximize"] = (torch.tensor(0.5), 1) if other else (0.5, True)
        group["polynomial"] = [(3.0, -4.0, 2.0)] if other else ((3, -4, 2),)
        optimizer.step()
        return True

    assert all(on_threads(step, 2))


def test_objects_are_compared_by_their_kind_alone() -> None:
    """The text of a function has an address."""
    assert _comparable([lambda: 1]) == _comparable((lambda: 2,)) == ["function"]
    assert _comparable(None) != _comparable("a")


def test_a_group_that_one_rank_alone_adds_is_known_to_all() -> None:
    def add(optimizer: OrthonormalOptimizer) -> None:
        mesh = DeviceMesh("cpu", [0, 1])
        weight = distribute_tensor(
            torch.ones(4, 4, dtype=torch.float64), mesh, [Shard(0)], src_data_rank=None
        )
        optimizer.add_param_group({"params": [("third", torch.nn.Parameter(weight))]})

    def take_away(optimizer: OrthonormalOptimizer) -> None:
        optimizer.buckets.pop()

    (_, first), (_, second) = steps(add, take_away)
    assert "the ranks hold different parameters, this one 2 in 1 param groups" in first
    assert "the ranks hold different parameters, this one 3 in 2 param groups" in second


def test_a_parameter_that_one_rank_alone_has_replaced_is_known_to_all() -> None:
    kept: list[torch.nn.Parameter] = []

    def replace(optimizer: OrthonormalOptimizer) -> None:
        params = optimizer.param_groups[0]["params"]
        kept.append(params[1])
        params[1] = torch.nn.Parameter(torch.ones(12, 8))

    def put_back(optimizer: OrthonormalOptimizer) -> None:
        optimizer.param_groups[0]["params"][1] = kept[0]

    (_, first), (_, second) = steps(replace, put_back)
    assert "another rank has refused this step" in first
    assert "is not the one that the optimizer was made with" in second


def test_experts_that_are_others_on_each_rank_are_stepped() -> None:
    """Beside what the ranks share, plain tensors of their own names and shapes."""

    def step() -> bool:
        mesh = DeviceMesh("cpu", [0, 1])
        parameters, _ = trainer(Muon, mesh)
        rank = dist.get_rank()
        expert = torch.nn.Parameter(torch.ones(6 + rank, 5, dtype=torch.float64))
        named = [("shared", parameters[0]), (f"experts.{rank}", expert)]
        optimizer = Dion2(named, compile=False)
        give_gradients(parameters, 0)
        expert.grad = torch.eye(6 + rank, 5, dtype=torch.float64)
        optimizer.step()
        return not torch.equal(expert, torch.ones_like(expert))

    assert all(on_threads(step, 2))
