"""Bytes that a step sends on real ranks: ours and the peers that step sharded matrices."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from conformance import launch
from conformance.adapters.torch_optimizer import eagerly
from conformance.bench.contenders import DION, OURS, TORCH_MUON, Case, available, builder_of
from conformance.bench.worker import silence

__all__ = ["Traffic", "traffic"]

TIMEOUT = 600.0  # seconds for a collective, and so for what the slowest rank does between two of them
SENT: dict[str, Callable[[int], float]] = {
    "gloo:all_gather": lambda ranks: ranks - 1,
    "gloo:all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "gloo:all_to_all": lambda ranks: (ranks - 1) / ranks,
}
"""Of what a rank gives to a collective of so many ranks, what it sends, by the ring's count."""
SCATTERED = "_c10d_functional::reduce_scatter_tensor"
"""Gloo has none: it reduces to all, and so sends twice what was asked for."""
ITEMSIZE = {
    "float": 4,
    "double": 8,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "int": 4,
    "long int": 8,
    "unsigned char": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class Traffic:
    """What one contender sends in one step.

    Attributes:
        case: what was stepped.
        name: of the contender.
        bytes: that a rank sends, the mean over the ranks, by the collectives asked for.
        collectives: number of them on the first rank.
        failure: what stopped it, or "".
    """

    case: Case
    name: str
    bytes: float = 0.0
    collectives: int = 0
    failure: str = ""


def traffic(
    case: Case,
    ranks: int,
    told: Callable[[str], None] = lambda _: None,
    *,
    names: Sequence[str] = (OURS, DION, TORCH_MUON),
    further: Sequence[str] = (),
) -> Iterator[Traffic]:
    """Each contender of ``names`` that is here, with every matrix sharded by rows over ``ranks`` gloo ranks.

    And each of ``further``, see :func:`~conformance.bench.contenders.builder_of`.
    """
    for name in available(case, further):
        if name not in (*names, *further):
            continue
        told(f"{case}: bytes of {name}")
        try:
            with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
                seen = launch.run(_program, (name, case), ranks=ranks, timeout=TIMEOUT)
        except launch.RankFailedError as error:
            yield Traffic(case, name, failure=f"{name} on {case}, {ranks} ranks: {error.reason}")
            continue
        sent = sum(size for size, _ in seen) / len(seen)
        yield Traffic(case, name, sent, max(number for _, number in seen))


def _program(rank: launch.Rank, work: tuple[str, Case]) -> tuple[float, int]:
    """Two steps so that everything exists, then one that is looked at; eagerly, which sends the same."""
    name, case = work
    mesh = init_device_mesh("cpu", (rank.count,), mesh_dim_names=("shard",))
    generator = torch.Generator().manual_seed(0)

    def sharded() -> Tensor:
        return distribute_tensor(torch.randn(case.shape, generator=generator), mesh, [Shard(0)])

    silence()
    with mock.patch("torch.compile", eagerly):
        parameters = [torch.nn.Parameter(sharded()) for _ in range(case.count)]
        for parameter in parameters:
            parameter.grad = sharded()
        step = builder_of(name)(parameters, case)
        step()
        step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            step()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    return sent(profiled.profiler.kineto_results.events(), rank.count)


def sent(events: Sequence[Any], ranks: int) -> tuple[float, int]:
    """Bytes that this rank sends by the collectives that the profiler saw it ask for, and how many these are."""
    total, number = 0.0, 0
    for event in events:
        if event.name() in SENT:
            total += _size(event) * SENT[event.name()](ranks)
            number += 1
        elif event.name() == SCATTERED:
            total -= _size(event) * (ranks - 1) / ranks
    return total, number


def _size(event: Any) -> float:
    """Bytes of all tensors that were given; of a list of tensors there is a shape each."""
    shapes = [shape for shape in event.shapes() if shape]
    shapes = shapes[:1] if event.name() == SCATTERED else shapes
    return float(sum(math.prod(shape) for shape in shapes) * ITEMSIZE[event.dtypes()[0]])
