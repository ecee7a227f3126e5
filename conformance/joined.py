"""Runs a function as one of the ranks that another launcher, `torchrun` or Slurm, has started.

That launcher ends all ranks as soon as one has ended. So a rank that fails tells rank 0 first, and lets it write what
it knows; rank 0 works in a thread, and so hears the others also while a collective hangs.
"""

from __future__ import annotations

import atexit
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from conformance.ranks import (
    GRACE_SECONDS,
    Rank,
    RankFailedError,
    backend_of,
    device_of,
    likely_cause,
    one_line,
)
from conformance.side_channel import LAST_WORDS, POLL_SECONDS, SideChannel

Argument = TypeVar("Argument")
Result = TypeVar("Result")

HEAR_SECONDS = 5.0  # after one rank has said that it ends itself, for the others to say so too


def joined_environment() -> Mapping[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR of ranks started by torchrun or Slurm, else None."""
    found = os.environ
    if "RANK" in found and "WORLD_SIZE" in found:
        return {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in found}
    if "SLURM_PROCID" in found and int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return {
            "RANK": found["SLURM_PROCID"],
            "WORLD_SIZE": found["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": found.get("SLURM_LOCALID", "0"),
            "MASTER_ADDR": found.get("MASTER_ADDR") or _first_slurm_host(),
            "MASTER_PORT": found.get("MASTER_PORT", "29500"),
        }
    return None


def _first_slurm_host() -> str:
    """Name of the first host of the Slurm step."""
    hosts = os.environ.get("SLURM_STEP_NODELIST", "localhost")
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()[0]


def run_joined(
    function: Callable[[Rank, Argument], Result],
    argument: Argument,
    environment: Mapping[str, str],
    device: str,
    on_event: Callable[[int, object], None] | None,
    timeout: float,
    backend: str | None = None,
) -> list[Result]:
    """Runs as one of the ranks that another launcher started; that launcher ends the others on failure."""
    os.environ.update(environment)
    index, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    place = device_of(device, int(environment.get("LOCAL_RANK", index)), backend)
    dist.init_process_group(backend_of(place, backend), timeout=timedelta(seconds=timeout))
    channel = SideChannel(index, count)
    inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def send(kind: str, content: object) -> None:
        if index == 0:
            inbox.put((kind, content))
        elif kind != "result":
            channel.say(kind, content)

    def linger() -> None:
        send("ends", None)
        if index == 0:
            time.sleep(3 * LAST_WORDS)  # ends with the process, as soon as the report is written
        else:
            channel.await_farewell()

    def work() -> list[Any]:
        if place.type == "cuda":
            torch.cuda.set_device(place)  # holds for one thread
        results: list[Any] = [None] * count
        try:
            result = function(Rank(index, count, place, lambda event: send("event", event), linger), argument)
            dist.all_gather_object(results, result)
        except Exception as error:  # whatever a port raises, rank 0 writes it down
            failure = one_line(error), traceback.format_exc()
            send("error", failure)
            if index:
                channel.await_farewell()
            raise RankFailedError(index, f"raised {failure[0]}", failure[1]) from error
        send("result", results)
        return results

    try:
        results = _lead(work, inbox, channel, count, on_event) if index == 0 else work()
    except BaseException:
        if index == 0:
            atexit.register(_leave, channel)
        raise
    dist.destroy_process_group()
    return results


def _lead(
    work: Callable[[], list[Any]],
    inbox: queue.SimpleQueue[tuple[str, Any]],
    channel: SideChannel,
    count: int,
    on_event: Callable[[int, object], None] | None,
) -> list[Any]:
    """Does rank 0's part in a thread, so that this one hears how the others fare also while a collective hangs."""

    def quietly() -> None:
        try:
            work()
        except RankFailedError:
            pass  # it came in as an error
        except BaseException as error:  # such as SystemExit, of which a thread would say nothing
            inbox.put(("error", (one_line(error), traceback.format_exc())))

    told = threading.Event()  # the launcher ends the ranks that are left
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set()) if in_main else None
    worker = threading.Thread(target=quietly, name="rank 0", daemon=True)
    worker.start()
    errors: dict[int, tuple[str, str]] = {}
    ended: list[int] = []
    deadline: float | None = None
    while deadline is None or (time.monotonic() < deadline and len({*errors, *ended}) < count):
        for rank, kind, content in [*_own(inbox), *channel.heard()]:
            if kind == "event" and on_event is not None:
                on_event(rank, content)
            elif kind == "result":
                worker.join()
                if in_main:
                    signal.signal(signal.SIGTERM, before)
                return list(content)
            elif kind == "error":
                errors[rank] = content
            elif kind == "ends":
                ended.append(rank)
        if deadline is None and (errors or ended or told.is_set()):
            deadline = time.monotonic() + (HEAR_SECONDS if ended else GRACE_SECONDS)
    if errors:
        raise likely_cause(errors)
    if ended:
        raise RankFailedError(ended[0], "ended itself")
    raise RankFailedError(0, "was told to end by its launcher; another rank has died")


def _own(inbox: queue.SimpleQueue[tuple[str, Any]]) -> Iterator[tuple[int, str, Any]]:
    """What rank 0 itself has said; waits a little for it."""
    with suppress(queue.Empty):
        yield 0, *inbox.get(timeout=POLL_SECONDS)
        while True:
            yield 0, *inbox.get_nowait()


def _leave(channel: SideChannel) -> None:
    """Ends rank 0 at its exit after a failure: in an orderly one, a thread that hangs in a collective can crash."""
    channel.say_farewell()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
