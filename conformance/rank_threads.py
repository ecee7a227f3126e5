"""More ranks than this machine has processes for: each is a thread, on torch's process group of threads.

Every rank runs its own code on its own shards, as a process would; only the collectives are copies in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import HashStore, Store
from torch.testing._internal.distributed import multi_threaded_pg

from conformance.process_groups import forget

__all__ = ["on_threads", "told_to_stop"]

Result = TypeVar("Result")

threaded: Any = multi_threaded_pg  # untyped
# Torch's stubs leave it out.
isolate_threads: Any = _distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
END_SECONDS = 10.0
"""After a failure, for the others to leave the collectives in which they wait."""


class _Worker:
    """A thread that makes one call after another, and does not outlast the process."""

    def __init__(self, rank: int) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        threading.Thread(target=self._serve, name=f"rank {rank}", daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, function, arguments))
        return future

    def _serve(self) -> None:
        while True:
            future, function, arguments = self._calls.get()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            del future, function, arguments


# A rank is the same thread in every run: torch keeps what it knows of a mesh by the thread that made it.
_WORKERS: list[_Worker] = []


def on_threads(function: Callable[[], Result], ranks: int, timeout: float | None = 600.0) -> list[Result]:
    """Call ``function`` once on each rank, with a default process group of all of them.

    Tensors are on the CPU, on one thread a rank. The caller must not use ``torch.distributed`` meanwhile.

    Args:
        function: of no arguments; ``dist.get_rank()`` says where it runs.
        ranks: how many.
        timeout: seconds until ranks that still run count as hanging; None for never.

    Returns:
        What it returned, by rank.

    Raises:
        TimeoutError: some rank did not return.
        Exception: what a rank raised; the others are told to stop where they wait.
    """
    _WORKERS.extend(_Worker(rank) for rank in range(len(_WORKERS), ranks))
    before, store = torch.get_num_threads(), HashStore()
    isolate_threads(True)
    world = threaded._install_threaded_pg()
    if not hasattr(world, "comms"):
        world.comms = []  # torch 2.11 forgot it, and looks for it when a group is destroyed
    try:
        futures: list[Future[Result]] = []
        try:
            for rank in range(ranks):
                futures.append(_WORKERS[rank].submit(_on_rank, function, rank, ranks, store))
            _, waiting = wait(futures, timeout, return_when=FIRST_EXCEPTION)
        except BaseException:  # a keyboard interrupt, or the time limit of a test
            _stopped(futures)
            raise
        hanging = _stopped(futures) if waiting else []
        for future in futures:
            error = future.exception() if future.done() else None
            if error is not None and not told_to_stop(error):
                raise error
        if waiting:
            late = hanging or [rank for rank, future in enumerate(futures) if future in waiting]
            raise TimeoutError(f"ranks {late} of {ranks} did not return in time")
        return [future.result() for future in futures]
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        isolate_threads(False)
        torch.set_num_threads(before)
        forget()


def _on_rank(function: Callable[[], Result], rank: int, ranks: int, store: Store) -> Result:
    torch.set_num_threads(1)
    dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
    world = threaded.dist.distributed_c10d._world
    try:
        return function()
    finally:
        # One that comes too late would end another's group.
        if threaded.dist.distributed_c10d._world is world:
            dist.destroy_process_group()


def _stopped(futures: Sequence[Future[Any]]) -> list[int]:
    """End the collectives that wait for a rank that will not come.

    Returns:
        The ranks that do not stop. Others take their places, since they may never be free again.
    """
    group = threaded.ProcessLocalGroup
    group._terminate.set()
    for _ in range(int(10 * END_SECONDS)):
        with group._coll_lock:
            collectives = list(group._cur_coll_on_pgs.values())
        for collective in collectives:
            for condition in (collective._start_cond, collective._done_cond):
                with condition:
                    condition.notify_all()
        if not wait(futures, 0.1).not_done:
            break
    hanging = [rank for rank, future in enumerate(futures) if not future.done()]
    for rank in hanging:
        _WORKERS[rank] = _Worker(rank)
    return hanging


def told_to_stop(error: BaseException) -> bool:
    """Whether torch raised it in a thread that waited, since another one had failed."""
    return isinstance(error, SystemExit) and str(error) == "Test termination event occurs."
