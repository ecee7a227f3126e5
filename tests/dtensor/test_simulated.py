"""Meshes of up to 64 ranks, whose ranks are threads of one process."""

from __future__ import annotations

import signal
import sys
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.tensor import DTensor, Partial, _redistribute

from conformance import rank_threads
from conformance.rank_threads import on_threads
from dion_dtensor import Dion, members, philox
from tests.dtensor.layouts import Layout, build_mesh, lay_out, layout
from tests.dtensor.programs import OPTIMIZERS, SHAPES, run_steps
from tests.dtensor.references import EVERY, cases, error, on_one_thread, slow
from tests.dtensor.simulation import simulated_steps

FEW = ((13, 10), (13, 10), (5, 12))
SAMPLE = [layout(text) for text in ("8x8 T0 S0", "2x4x4 R S0 S1", "64 S0")]
SWEEP = [
    layout(text)
    for text in ("8x8 S0 S1", "4x4x4 R S0 S1", "2x32 R S0", "2x4x8 R T0 S0", "2x2x4x4 R S0 S1 S0", "64 S1")
]
LOW_RANK = ("dion", "orth_dion")


def check(where: Layout, name: str, **options: Any) -> None:
    """All ranks have the weights and states of one device, to the last bit; Dion's up to rounding."""
    expected = on_one_thread(run_steps, name, None, compile=False, **options)
    ranks = simulated_steps(name, where, options)
    assert len(ranks) == where.world
    for rank in ranks:
        assert set(rank) == set(expected)
        for key, values in expected.items():
            for ours, theirs in zip(rank[key], values, strict=True):
                if name in LOW_RANK:
                    assert error(ours, theirs) < 1e-11, (where, key)
                else:
                    assert torch.equal(ours, theirs), (where, key)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *cases(["muon", "dion", "adamw"], SAMPLE, SAMPLE[:1]),
        *cases(["dion3"], SAMPLE, SAMPLE[1:2]),
        *cases(["normuon", "dion2", "lion"], SAMPLE, SAMPLE[2:]),
        *cases(["orth_dion"], SAMPLE, []),
    ],
)
def test_large_meshes_agree_with_one_device(name: str, where: Layout) -> None:
    check(where, name, shapes=FEW)


@pytest.mark.parametrize("name", ["dion2", "dion3"])
def test_ranks_without_columns_send_nothing(name: str) -> None:
    check(layout("2x4 S0 S1"), name, shapes=((9, 9), (9, 9)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EVERY, "adamw", "lion"])
@pytest.mark.parametrize("where", SAMPLE + SWEEP, ids=str)
def test_large_meshes_agree_with_one_device_on_all_shapes(where: Layout, name: str) -> None:
    check(where, name, shapes=SHAPES)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("path", ["auto", "assemble"])
def test_a_strided_shard_need_not_cut_the_smallest_pieces(name: str, path: str) -> None:
    """The last axis cuts what the strided one left: whole matrices would have their columns in another order."""
    options = {"path": path} if name != "normuon" else {}
    check(layout("2x2x2 T1 S1 S1"), name, shapes=((12, 20), (12, 20)), **options)


@pytest.mark.parametrize(
    "name", ["muon", "dion", "dion3", *(slow(name) for name in ("normuon", "orth_dion", "dion2"))]
)
@pytest.mark.parametrize(
    ("text", "split", "shape"),
    [
        ("16 S0", "experts", (20, 6, 8)),
        ("4x2x2 S0 T1 S1", "experts(rows(5, 3))", (5, 8, 6)),
        ("4x4 S0 S1", "rows(9, 5, 5)", (19, 10)),
        ("3x5 S1 S0", "columns(9, 5, 5)", (10, 19)),
        ("16 S0", "flatten(heads(4))", (12, 2, 2, 2)),
    ],
)
def test_logical_matrices_on_more_ranks(text: str, split: str, shape: tuple[int, ...], name: str) -> None:
    check(layout(text), name, shapes=(shape,) * 3, split=split)


WARNING = "_warn_flatten_optimization_not_possible"


def unaveraged(name: str, where: Layout, options: dict[str, Any]) -> None:
    """A step of replicas whose gradients are not averaged yet on any axis."""
    mesh = build_mesh(where)
    weight = lay_out(torch.ones(12, 8, dtype=torch.float64), where, mesh)
    parameter = torch.nn.Parameter(weight)
    pending = [Partial("avg")] * mesh.ndim
    parameter.grad = DTensor.from_local(torch.randn(12, 8, dtype=torch.float64), mesh, pending)
    OPTIMIZERS[name]([("weight", parameter)], compile=False, **options).step()


@pytest.mark.skipif(not hasattr(_redistribute, WARNING), reason="torch warns of nothing there")
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("muon", "assemble"),
        ("muon", "gram"),
        ("normuon", None),
        ("dion", "low_rank"),
        ("dion2", "exchange"),
        ("dion3", "exchange"),
    ],
)
def test_torch_has_nothing_to_warn_of(name: str, path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns of several collectives in one redistribution, which users would take for theirs."""
    warnings: list[Any] = []
    monkeypatch.setattr(_redistribute, WARNING, lambda *values: warnings.append(values[2:6]))
    options = {} if path is None else {"path": path}
    for text in ("2x2 T0 S0", "2x2 S0 S0", "2x2 R S0", "2x2x2 S0 S1 S0"):
        shapes = {"shapes": ((13, 10),) * 8, "steps": 1, "states": False}
        simulated_steps(name, layout(text), shapes | options)
    on_threads(partial(unaveraged, name, layout("2x2 R R"), options), 4)
    assert not warnings


def one_leaves() -> Tensor:
    """A sum for which rank 2 does not come."""
    value = torch.ones(2)
    if dist.get_rank() != 2:
        dist.all_reduce(value)
    return value


def one_raises() -> None:
    """A barrier to which rank 2 does not come, since it raises."""
    if dist.get_rank() == 2:
        raise ValueError("not I")
    dist.barrier()


def one_ends() -> None:
    """A barrier to which rank 2 does not come, since it leaves."""
    if dist.get_rank() == 2:
        sys.exit("I give up")
    dist.barrier()


def one_sleeps() -> None:
    """A barrier to which rank 2 comes too late."""
    if dist.get_rank() == 2:
        time.sleep(5)
        return
    dist.barrier()


def one_interrupts() -> None:
    """A barrier to which rank 2 comes too late, while the caller is interrupted."""
    if dist.get_rank() == 2:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        time.sleep(2)
        return
    dist.barrier()


def test_threads_are_ranks() -> None:
    def summed() -> Tensor:
        value = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(value)
        return value

    assert [float(value) for value in on_threads(summed, 5)] == [10.0] * 5


def test_an_error_of_one_thread_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not I"):
        on_threads(one_raises, 4)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1, 3\] of 4 did not return"):
        on_threads(one_leaves, 4, timeout=1.0)
    with pytest.raises(SystemExit, match="I give up"):
        on_threads(one_ends, 4)
    monkeypatch.setattr(rank_threads, "END_SECONDS", 0.5)
    with pytest.raises(TimeoutError, match=r"ranks \[2\] of 4 did not return"):
        on_threads(one_sleeps, 4, timeout=0.5)
    test_threads_are_ranks()  # nothing is left behind


def test_an_interrupted_caller_leaves_no_rank_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rank_threads, "END_SECONDS", 0.5)
    before = signal.signal(signal.SIGUSR1, interrupted)  # processes of pytest-xdist ignore SIGINT
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        with pytest.raises(KeyboardInterrupt):
            on_threads(one_interrupts, 4)
        time.sleep(2)  # the sleeper wakes up, and finds itself in the caller's world
        assert dist.is_initialized()
        dist.barrier()
    finally:
        dist.destroy_process_group()
        signal.signal(signal.SIGUSR1, before)
    test_threads_are_ranks()


def test_each_rank_draws_its_own_rows_of_Q_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(rows: Tensor, *arguments: Any, **options: Any) -> Tensor:
        drawn.append(len(rows))
        return philox.normal(rows, *arguments, **options)

    def states() -> Tensor:
        where = layout("2x2 S1 S0")
        weight = lay_out(torch.ones(20, 12, dtype=torch.float64), where, build_mesh(where))
        optimizer = Dion([("w", torch.nn.Parameter(weight))], compile=False)
        whole = optimizer.state[optimizer.param_groups[0]["params"][0]]["Q"]
        assert isinstance(whole, DTensor)
        return whole.full_tensor()

    monkeypatch.setattr(members, "normal", counted)
    for whole in on_threads(states, 4):
        assert torch.equal(whole, philox.normal(12, 12, seed=0, name="w"))
    assert sorted(drawn) == [6, 6, 6, 6]  # of 12, by the axis that shards columns
