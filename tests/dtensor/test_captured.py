"""Which updates are recorded as CUDA graphs, and when anew; with stand-ins for the graphs, which test_cuda.py has."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dion_dtensor import Dion2, Muon
from dion_dtensor.captured import WARM_UP, Recorder, recorder_on
from dion_dtensor.optimizer import OrthonormalOptimizer
from tests.dtensor.graph_programs import Graph, recorded_on_ranks, stand_in
from tests.dtensor.ranks import Ranks
from tests.dtensor.small import make


class Taken:
    """In place of a recorder: takes the update at once, and notes the keys."""

    def __init__(self) -> None:
        self.keys: list[Hashable] = []

    places, turns = None, 0

    def take(
        self, key: Hashable, places: Hashable, parts: Sequence[Tensor], update: Any, on_all: Any
    ) -> None:
        self.keys.append((key, places))
        update(torch.cat(list(parts)))


def _parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"layer{i}.weight", nn.Parameter(torch.randn(8, 6, generator=generator))) for i in range(3)]


def _noted(optimizer: OrthonormalOptimizer) -> Taken:
    """The stand-in that the optimizer's one bucket has from now on."""
    (bucket,) = optimizer.buckets
    taken = Taken()
    bucket.recorder = taken  # type: ignore[assignment]  # of a recorder it has what a bucket calls
    return taken


def _step(optimizer: Any, named: list[tuple[str, nn.Parameter]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize(
    ("rule", "recorded"),
    [
        *((name, True) for name in ("muon", "normuon", "dion2", "dion3", "lion")),
        *((name, False) for name in ("dion", "orth_dion")),
    ],
)
def test_what_waits_for_values_of_the_device_is_not_recorded(rule: str, recorded: bool) -> None:
    named = _parameters()
    optimizer = make(rule, named)
    taken = _noted(optimizer)
    _step(optimizer, named, 0)
    assert bool(taken.keys) == recorded


def test_fused_steps_are_not_recorded() -> None:
    named = _parameters()
    optimizer = make("adamw", named, compile=True)
    taken = _noted(optimizer)
    _step(optimizer, named, 0)
    assert not taken.keys


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("rule", "path", "dim", "recorded"),
    [
        ("dion2", "exchange", 0, False),
        ("dion2", "assemble", 0, True),
        ("dion3", "exchange", 0, False),
        ("dion3", "assemble", 0, True),
        ("muon", "auto", 0, True),
        ("muon", "auto", 1, True),
    ],
)
def test_chosen_rows_that_travel_are_not_recorded(
    mesh: DeviceMesh, rule: str, path: str, dim: int, recorded: bool
) -> None:
    weight = nn.Parameter(distribute_tensor(torch.randn(8, 12), mesh, [Shard(dim)]))
    optimizer = make(rule, [("weight", weight)], path=path)
    assert optimizer.buckets[0]._capturable() == recorded


def test_a_recording_outlives_what_changes_from_step_to_step() -> None:
    named = _parameters()
    optimizer = Dion2(named, compile=False)
    taken = _noted(optimizer)
    group = optimizer.param_groups[0]
    for step in range(3):
        group["lr"], group["mu"], group["weight_decay"] = 0.1 / (step + 1), 0.9 + 0.01 * step, 0.01 * step
        _step(optimizer, named, step)
    assert len(set(taken.keys)) == 1
    group["fraction"] = 0.5
    _step(optimizer, named, 3)
    group["cautious"] = True
    _step(optimizer, named, 4)
    named[1][1].data = named[1][1].data.clone()
    _step(optimizer, named, 5)
    assert len(set(taken.keys)) == 4


def test_a_step_without_some_gradient_is_taken_as_ever() -> None:
    named = _parameters()
    optimizer = Muon(named, compile=False)
    taken = _noted(optimizer)
    named[0][1].grad = torch.ones(8, 6)
    before = named[1][1].detach().clone()
    optimizer.step()
    assert not taken.keys
    assert torch.equal(before, named[1][1])


def stood_in(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return stand_in(monkeypatch.setattr)


def test_a_graph_is_recorded_once_and_reads_the_gradients_of_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder, seen = stood_in(monkeypatch), []
    for step in range(WARM_UP + 3):
        recorder.take(
            "key", "here", [torch.full((2, 3), float(step)), torch.full((1, 3), float(step))], seen.append
        )
    assert len(seen) == WARM_UP + 1
    assert Graph.replays == 3
    assert torch.equal(
        seen[-1], torch.full((3, 3), WARM_UP + 2.0)
    )  # the graph's input, written before each launch
    recorder.take("other", "here", [torch.zeros(2, 3)], seen.append)
    assert (len(seen), Graph.replays, recorder.recorded) == (WARM_UP + 2, 3, False)
    recorder.take("other", "here", [torch.zeros(3, 3)], seen.append)  # another size is another graph
    assert recorder._turns == 1


def test_an_update_that_cannot_be_recorded_is_taken_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, seen = stood_in(monkeypatch), []

    def refused(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    for _ in range(WARM_UP):
        recorder.take("key", "here", [torch.ones(2, 3)], seen.append)
    with pytest.warns(
        UserWarning, match="not recorded as a CUDA graph, but taken as ever: CUDA out of memory"
    ):
        recorder.take("key", "here", [torch.ones(2, 3)], seen.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.take("key", "here", [torch.ones(2, 3)], seen.append)  # and asks no further
    assert (len(seen), recorder.recorded, Graph.replays) == (WARM_UP + 2, False, 0)


def test_what_chooses_other_kernels_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, seen = stood_in(monkeypatch), []

    def taken(*parts: Tensor) -> bool:
        for _ in range(WARM_UP + 2):
            recorder.take("key", "here", list(parts), seen.append)
        return len(recorder._memory.recorded) == 1

    assert taken(torch.ones(2, 3), torch.ones(2, 3))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not before)
    recorder.take("key", "here", [torch.ones(2, 3), torch.ones(2, 3)], seen.append)
    torch.use_deterministic_algorithms(before)
    assert not recorder.recorded
    assert taken(torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2, 3), 1 / 3))
    assert seen[-1].dtype == torch.float32  # nothing is rounded on the way
    recorder.forget()
    assert not recorder._memory.recorded


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        ("none", [False] * WARM_UP + [True] * 6),
        ("no memory on one rank", [False] * (WARM_UP + 6)),
        ("moved on one rank", [False] * WARM_UP + [True] + [False] * WARM_UP + [True] * 3),
        ("other kernels on one rank", [False] * WARM_UP + [True] + [False] * WARM_UP + [True] * 3),
        ("moved on one rank early", [False] * (WARM_UP + 1) + [True] * 5),
    ],
)
def test_all_ranks_record_or_none(ranks: Ranks, trouble: str, expected: list[bool]) -> None:
    assert ranks.run(2, recorded_on_ranks, trouble) == [expected] * 2


def test_elsewhere_nothing_is_recorded() -> None:
    assert recorder_on(torch.device("cpu"), {}, 0) is None
    named = _parameters()
    optimizer = Muon(named, compile=False, capture=False)
    assert optimizer.buckets[0].recorder is None
    optimizer.release_graphs()
    copied = copy.deepcopy(Muon(named, capture=True))
    assert copied.capture
    assert copied.buckets[0].recorder is None


def test_graphs_need_compiled_updates() -> None:
    with pytest.raises(ValueError, match="capture=True needs compile=True"):
        Muon(_parameters(), compile=False, capture=True)


def test_a_graph_of_the_caller_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    named = _parameters()
    optimizer = Muon(named, compile=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make the optimizer with capture=True"):
        optimizer.step()
