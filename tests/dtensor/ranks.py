"""Real processes with gloo, started once and used by many cases."""

from __future__ import annotations

import datetime
import os
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

TIMEOUT_SECONDS = 240.0
PATIENCE_SECONDS = 5.0
"""How long the other ranks may take once one has failed."""


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    """One rank: run what arrives on the pipe until None does."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import logging

    logging.disable(logging.WARNING)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.TCPStore("localhost", port, is_master=False),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=180),  # a loaded machine is slow to import
    )
    while (work := _received(pipe)) is not None:
        function, arguments = work
        try:
            pipe.send((True, function(*arguments)))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    torch.distributed.destroy_process_group()


def _received(pipe: Connection) -> Any:
    """What the test process sends; if it is gone, so is this rank."""
    try:
        return pipe.recv()
    except EOFError:
        os._exit(1)


class Ranks:
    """``world`` processes in one gloo group; ``run`` calls a module-level function on all of them."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # A port that the system chose; the store lives in this process. A file store polls, and slows all ranks down.
        self.store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world, self.store.port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, members: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of the first ``members`` ranks; the others must return None.

        Raises:
            RuntimeError: names the ranks that raised or died; the processes are then started anew.
        """
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        problems: dict[int, str] = {}
        waiting = dict(zip(self.pipes, range(self.world), strict=True))
        patience = TIMEOUT_SECONDS
        while waiting and (ready := wait(list(waiting), patience)):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    good, value = pipe.recv()
                except EOFError:
                    good, value = False, "died"
                (results if good else problems)[rank] = value
                if not good:  # the others may wait for it in a collective
                    patience = PATIENCE_SECONDS
        problems |= dict.fromkeys(waiting.values(), "no answer")
        if problems:
            if waiting:
                self._kill()
                self._start()
            raise RuntimeError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(problems.items())))
        assert [results[rank] is not None for rank in range(self.world)] == [
            rank < members for rank in range(self.world)
        ]
        return [results[rank] for rank in range(members)]

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(20)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
        self._kill()
