"""More ranks than this machine has processes for: each is a thread, on torch's process group of threads.

Every rank runs its own code on its own shards, as a process would; only the collectives are copies in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import HashStore, Store
from torch.testing._internal.distributed import multi_threaded_pg

__all__ = ["on_threads"]

Result = TypeVar("Result")

threaded: Any = multi_threaded_pg  # untyped
isolate_threads: Any = _distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
# A rank is the same thread in every run: torch keeps what it knows of a mesh by the thread that made it.
_THREADS: list[ThreadPoolExecutor] = []


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
    while len(_THREADS) < ranks:
        _THREADS.append(ThreadPoolExecutor(1, thread_name_prefix=f"rank {len(_THREADS)}"))
    before, store = torch.get_num_threads(), HashStore()
    isolate_threads(True)
    world = threaded._install_threaded_pg()
    if not hasattr(world, "comms"):
        world.comms = []  # torch 2.11 forgot it, and looks for it when a group is destroyed
    try:
        futures = [_THREADS[rank].submit(_on_rank, function, rank, ranks, store) for rank in range(ranks)]
        _, running = wait(futures, timeout, return_when=FIRST_EXCEPTION)
        if running:
            _stop_waiting(running)
        _raise_first(futures)
        if running:
            names = [rank for rank, future in enumerate(futures) if future in running]
            raise TimeoutError(f"ranks {names} of {ranks} did not return within {timeout:g} s")
        return [future.result() for future in futures]
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        isolate_threads(False)
        torch.set_num_threads(before)


def _on_rank(function: Callable[[], Result], rank: int, ranks: int, store: Store) -> Result:
    torch.set_num_threads(1)
    dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
    try:
        return function()
    finally:
        dist.destroy_process_group()


def _stop_waiting(running: set[Future[Any]]) -> None:
    """End the collectives that wait for a rank that will not come, until no rank is left in one."""
    group = threaded.ProcessLocalGroup
    group._terminate.set()
    for _ in range(100):
        with group._coll_lock:
            waiting = list(group._cur_coll_on_pgs.values())
        for collective in waiting:
            for condition in (collective._start_cond, collective._done_cond):
                with condition:
                    condition.notify_all()
        if not wait(running, 0.1).not_done:
            return


def _raise_first(futures: Sequence[Future[Any]]) -> None:
    """What the first rank raised that was not told to stop."""
    for future in futures:
        error = future.exception() if future.done() else None
        if error is not None and not isinstance(error, SystemExit):
            raise error
