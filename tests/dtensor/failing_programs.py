"""Processes that die in the middle: of a step, and of a save."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, state_dict_saver
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dion_dtensor import Dion2, Muon, atomic
from dion_dtensor.buckets import Bucket

NAMES = ("first.weight", "second.weight")


def trainer(
    kind: Any, mesh: DeviceMesh | None = None, **options: Any
) -> tuple[list[torch.nn.Parameter], Any]:
    """Two weights, on a mesh or not, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(12, 8, generator=generator, dtype=torch.float64) for _ in NAMES]
    laid = [weight if mesh is None else distribute_tensor(weight, mesh, [Shard(0)]) for weight in weights]
    parameters = [torch.nn.Parameter(weight) for weight in laid]
    group = {"params": list(zip(NAMES, parameters, strict=True))}
    return parameters, kind([group], lr=0.1, compile=False, **options)


def give_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    """The same on every rank."""
    for index, parameter in enumerate(parameters):
        drawn = torch.randn(
            12, 8, generator=torch.Generator().manual_seed(10 * step + index), dtype=torch.float64
        )
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        parameter.grad = (
            drawn if mesh is None else distribute_tensor(drawn, mesh, [Shard(0)], src_data_rank=None)
        )


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _between_buckets() -> None:
    really, calls = Bucket.step, []

    def step(bucket: Bucket, *args: Any) -> None:
        calls.append(bucket)
        return _die() if len(calls) == 2 else really(bucket, *args)

    # For good: this process dies of it.
    Bucket.step = step  # type: ignore[method-assign]


def _after_all_buckets() -> None:
    # It never returns what the function it stands for would.
    atomic.agreed = _die  # type: ignore[assignment]


DEATHS: dict[str, Callable[[], None]] = {
    "before": _die,
    "between buckets": _between_buckets,
    "after all buckets": _after_all_buckets,
}


def step_beside_a_dying_rank(rank: int, world: int, folder: Path, when: str) -> None:
    """The last rank dies in or before its second step; what the others meet goes to ``<rank>.json``."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    mesh = DeviceMesh("cpu", list(range(world)))
    parameters, optimizer = trainer(Dion2, mesh, max_bucket_bytes=1, atomic=when != "before")
    assert len(optimizer.buckets) == 2
    give_gradients(parameters, 0)
    optimizer.step()
    give_gradients(parameters, 1)
    if rank == world - 1:
        DEATHS[when]()
    held = [*parameters, *(optimizer.state[parameter]["momentum"] for parameter in parameters)]
    before = [_local(tensor) for tensor in held]
    said = "no error"
    try:
        optimizer.step()
    except RuntimeError as error:
        said = str(error)
    unchanged = all(torch.equal(_local(tensor), old) for tensor, old in zip(held, before, strict=True))
    (folder / f"{rank}.json").write_text(json.dumps({"said": said, "unchanged": unchanged}))
    os._exit(0)  # an orderly end would wait for the one that is gone


def save(parameters: list[torch.nn.Parameter], optimizer: Any, path: Path) -> None:
    """Weights and state, by torch.distributed.checkpoint."""
    content = {"weights": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}
    state_dict_saver.save(content, checkpoint_id=str(path), no_dist=True)


def die_in_the_second_save(folder: Path) -> None:
    """Saves after a step; after another the process is killed when the tensors are written and the index is not."""
    torch.set_num_threads(1)
    parameters, optimizer = trainer(Muon)
    give_gradients(parameters, 0)
    optimizer.step()
    save(parameters, optimizer, folder / "one")
    give_gradients(parameters, 1)
    optimizer.step()
    FileSystemWriter.finish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
    save(parameters, optimizer, folder / "two")
