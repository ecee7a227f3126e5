"""CUDA graphs that do nothing, and what ranks do that record them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from conformance.process_groups import shared_mesh
from dion_dtensor import Muon
from dion_dtensor.captured import WARM_UP, Recorder

MOVES = {"moved on one rank": WARM_UP + 1, "moved on one rank early": 1}
"""Before which step."""


class Graph:
    """In place of a CUDA graph."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class Space:
    """In place of the memory of graphs; buffers are full of ``fill``."""

    device, stream = torch.device("cpu"), None

    def __init__(self, fill: float) -> None:
        self.recorded: set[Recorder] = set()
        self.fill = fill

    def pool(self) -> None:
        """None of them."""

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), self.fill, dtype=dtype)


def stand_in(replace: Callable[[Any, str, Any], object], fill: float = torch.nan) -> Recorder:
    """A recorder of graphs that do nothing; ``replace`` sets attributes of modules."""
    replace(torch.cuda, "CUDAGraph", Graph)
    replace(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    replace(torch.cuda, "device", lambda _: contextlib.nullcontext())
    Graph.replays = 0
    return Recorder(Space(fill))  # type: ignore[arg-type]  # of a memory it has what a recorder uses


def recorded_on_ranks(trouble: str, steps: int = WARM_UP + 6) -> list[bool] | None:
    """After each step, whether this rank has a graph."""
    mesh = shared_mesh((2,), ("shard",))
    if mesh.get_coordinate() is None:
        return None
    weight = nn.Parameter(_laid(mesh, 0))
    optimizer = Muon([("weight", weight)], compile=False)
    (bucket,) = optimizer.buckets
    first, found = mesh.get_local_rank() == 0, []
    with contextlib.ExitStack() as stack, warnings.catch_warnings(record=True):

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        bucket.recorder = stand_in(replace, 0.0)
        if trouble == "no memory on one rank" and not first:
            replace(torch.cuda, "graph", _refused)
        for step in range(steps):
            if trouble == "other kernels on one rank" and step == WARM_UP + 1 and not first:
                bucket.recorder.forget()  # as take does
            if not first and MOVES.get(trouble) == step:
                weight._local_tensor = weight._local_tensor.clone()  # type: ignore[attr-defined]  # a Parameter hides its type
            weight.grad = _laid(mesh, step + 1)
            optimizer.step()
            found.append(bucket.recorder.recorded)
    return found


@contextlib.contextmanager
def _refused(*_: Any, **__: Any) -> Iterator[None]:
    """At its end: what stands in for a recording communicates, and the other ranks wait for that."""
    yield
    raise torch.OutOfMemoryError("CUDA out of memory")


def _laid(mesh: DeviceMesh, seed: int) -> DTensor:
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
