"""Runs one function on several ranks, and never leaves a rank behind.

Started by hand, it starts the ranks as local processes, watches them, and ends all of them when one dies or
raises. Started under `torchrun` or Slurm, it joins the ranks that are already there.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from conformance.joined import joined_environment, run_joined
from conformance.ranks import (
    GRACE_SECONDS,
    THREADS,
    Rank,
    RankFailedError,
    backend_of,
    device_of,
    likely_cause,
    lost_peer,
    one_line,
)

__all__ = ["Rank", "RankFailedError", "describe_exit", "is_main", "joined", "one_line", "run"]

Argument = TypeVar("Argument")
Result = TypeVar("Result")

END_SECONDS = 3.0  # between SIGTERM and SIGKILL


@dataclass
class _Watched:
    """A started rank, seen from the process that started it."""

    process: BaseProcess
    channel: Connection
    lifeline: Connection
    result: object = None
    finished: bool = False
    error: tuple[str, str] | None = None  # one line, whole traceback
    ended: float | None = field(default=None)


def joined() -> bool:
    """True when another launcher (torchrun, Slurm) has already started the ranks."""
    return joined_environment() is not None


def is_main() -> bool:
    """True in the one process that prints and writes: the starting one, or rank 0 of joined ranks."""
    environment = joined_environment()
    return environment is None or environment["RANK"] == "0"


def run(
    function: Callable[[Rank, Argument], Result],
    argument: Argument,
    *,
    ranks: int,
    device: str = "cpu",
    on_event: Callable[[int, object], None] | None = None,
    process_group: bool = True,
    timeout: float = 120.0,
    preload: Sequence[str] = (),
    backend: str | None = None,
) -> list[Result]:
    """Calls `function(rank, argument)` on every rank and returns the results in the order of the ranks.

    Args:
        function: importable by name; its result must be picklable.
        argument: picklable; the same for every rank.
        ranks: number of local processes, or threads. Ignored under another launcher, whose ranks are taken.
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU a local rank).
        on_event: called with (rank, event) for every `Rank.emit`.
        process_group: set up the default process group. Without it, ranks are always local processes.
        timeout: seconds that a collective may take.
        preload: modules imported once, before the ranks are forked from that process.
        backend: "gloo" on "cuda" lets ranks share GPUs; "threads" makes them threads of one process, without a limit
            to the time of a collective; None for the device's own.

    Raises:
        RuntimeError: threads under another launcher, or on another device than the CPU.
        RankFailedError: a rank raised or died; every other rank has been ended.
    """
    environment = joined_environment()
    if backend == THREADS:
        if environment is not None:
            raise RuntimeError("ranks that another launcher has started cannot be threads of one process")
        if device != "cpu":
            raise RuntimeError(f"ranks that are threads compute on the CPU, not on {device}")
        return _run_on_threads(_Together(function, argument, ranks), on_event, preload)
    if process_group and environment is not None:
        return run_joined(function, argument, environment, device, on_event, timeout, backend)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conformance.launch", *preload])
    store = _local_store() if process_group else None
    port = store.port if store is not None else 0
    watched: list[_Watched] = []
    try:
        for index in range(ranks):
            ours, theirs = context.Pipe()
            lifeline_end, lifeline = context.Pipe(duplex=False)
            call = (index, ranks, port, device, backend, timeout, function, argument, theirs, lifeline_end)
            process = context.Process(target=_local_rank, args=call, name=f"rank {index}", daemon=True)
            process.start()
            theirs.close()
            lifeline_end.close()
            watched.append(_Watched(process, ours, lifeline))
        _watch(watched, on_event)
    finally:
        _end(watched)
    return [one.result for one in watched]  # type: ignore[misc]


@dataclass(frozen=True)
class _Together:
    """What is called on as many threads of one process."""

    function: Callable[[Rank, Any], Any]
    argument: Any
    ranks: int


@dataclass(frozen=True)
class _Raised:
    """What a thread raised: one line, and the whole traceback."""

    line: str
    details: str


def _run_on_threads(
    job: _Together, on_event: Callable[[int, object], None] | None, preload: Sequence[str]
) -> list[Any]:
    """A process of its own, which a watch may end."""
    errors: dict[int, tuple[str, str]] = {}

    def relayed(_: int, event: Any) -> None:
        index, what = event
        if isinstance(what, _Raised):
            errors[index] = (what.line, what.details)
        elif on_event is not None:
            on_event(index, what)

    try:
        (results,) = run(_on_threads, job, ranks=1, on_event=relayed, process_group=False, preload=preload)
    except RankFailedError:
        if errors:
            raise likely_cause(errors) from None
        raise
    return results


def _on_threads(rank: Rank, job: _Together) -> list[Any]:
    """The body of that process."""
    # With torch's testing package: only where it is asked for.
    from conformance.rank_threads import on_threads, told_to_stop

    def one() -> Any:
        index = dist.get_rank()
        own = Rank(index, job.ranks, rank.device, lambda event: rank.emit((index, event)))
        try:
            return job.function(own, job.argument)
        except BaseException as error:
            if not told_to_stop(error):
                own.emit(_Raised(one_line(error), traceback.format_exc()))
            raise

    return on_threads(one, job.ranks, timeout=None)


def _local_store() -> TCPStore:
    """A store on a port that the system chooses; this process holds it, so no other can take it."""
    return TCPStore(
        "127.0.0.1", 0, world_size=None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )


def _watch(watched: list[_Watched], on_event: Callable[[int, object], None] | None) -> None:
    """Returns when every rank has delivered its result; raises RankFailedError soon after one failed."""
    deadline: float | None = None
    while not all(one.finished for one in watched):
        sources: list[Any] = [one.channel for one in watched if not one.channel.closed]
        sources += [one.process.sentinel for one in watched if one.ended is None]
        ready = wait(sources, timeout=0.2 if deadline is not None else None)
        for index, one in enumerate(watched):
            if one.channel in ready or one.process.sentinel in ready:
                _drain(index, one, on_event)
            if one.process.sentinel in ready and one.ended is None:
                one.ended = time.monotonic()
        failed = any(one.error or (one.ended is not None and not one.finished) for one in watched)
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() >= deadline:
            raise _failure(watched)


def _drain(index: int, one: _Watched, on_event: Callable[[int, object], None] | None) -> None:
    """Takes in all that a rank has sent."""
    try:
        while not one.channel.closed and one.channel.poll():
            kind, content = pickle.loads(one.channel.recv_bytes())
            if kind == "event" and on_event is not None:
                on_event(index, content)
            elif kind == "result":
                one.result, one.finished = content, True
            elif kind == "error":
                one.error = content
    except (EOFError, OSError):
        one.channel.close()


def _failure(watched: list[_Watched]) -> RankFailedError:
    """The failure that most likely caused the others: a signal, then an exception, then a lost peer."""

    def suspicion(item: tuple[int, _Watched]) -> tuple[int, float]:
        index, one = item
        if one.error is None and one.ended is not None and not one.finished:
            return 0, one.ended
        if one.error is not None:
            return (2 if lost_peer(one.error[0]) else 1), index
        return 3, index

    index, one = min(enumerate(watched), key=suspicion)
    if one.error is not None:
        return likely_cause({rank: peer.error for rank, peer in enumerate(watched) if peer.error is not None})
    one.process.join(1.0)
    return RankFailedError(index, describe_exit(one.process.exitcode))


def describe_exit(code: int | None) -> str:
    """In words: how a process ended, from its exit code (negative: minus the signal)."""
    if code is None:
        return "closed its channel without a result"
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with exit code {code} and no result"


def _end(watched: list[_Watched]) -> None:
    """Ends every rank that is still there: SIGTERM, and SIGKILL for those that do not listen."""
    finished = all(one.finished for one in watched)
    for one in watched:
        if finished:
            one.process.join(END_SECONDS)  # all results are in: let them leave by themselves
        if one.process.is_alive():
            one.process.terminate()
    limit = time.monotonic() + END_SECONDS
    for one in watched:
        one.process.join(max(0.0, limit - time.monotonic()))
        if one.process.is_alive():
            one.process.kill()
            one.process.join()
        one.channel.close()
        one.lifeline.close()


def _local_rank(
    index: int,
    count: int,
    port: int,
    device: str,
    backend: str | None,
    timeout: float,
    function: Callable[[Rank, Any], object],
    argument: object,
    channel: Connection,
    lifeline: Connection,
) -> None:
    """Body of a started process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the starting process, which ends the ranks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, args=(lifeline,), daemon=True).start()
    lock = threading.Lock()

    def send(kind: str, content: object) -> None:
        with lock:
            channel.send_bytes(pickle.dumps((kind, content)))

    try:
        torch.set_num_threads(1)
        place = device_of(device, index, backend)
        if port:
            if sys.platform.startswith("linux"):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
            store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
            dist.init_process_group(
                backend_of(place, backend),
                store=store,
                rank=index,
                world_size=count,
                timeout=timedelta(seconds=timeout),
            )
        result = function(Rank(index, count, place, lambda event: send("event", event)), argument)
        if port:
            dist.barrier()
        send("result", result)
        if port:
            dist.destroy_process_group()
    except BaseException as error:
        send("error", (one_line(error), traceback.format_exc()))
        sys.stderr.flush()
        os._exit(1)  # an orderly exit could wait for ranks that are gone


def _leave_with_parent(lifeline: Connection) -> None:
    """Ends this process when the one that started it is gone, however that came about."""
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
