"""A process for each contender, so that none shares compiled code, caches or memory with another."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any
from unittest import mock

from conformance.bench.contenders import Case
from conformance.bench.timing import keep_freed_memory, timed

__all__ = ["LIMIT", "Worker", "WorkerError", "silence"]

LIMIT = 3600.0  # seconds for one answer
TURN = 0.3  # seconds of steps at least; the first of short ones finds threads asleep and caches full of others' data
STARTING = threading.Lock()  # the environment is that of all threads


class WorkerError(RuntimeError):
    """A contender that raised, died or did not answer."""


class Worker:
    """A contender in a process of its own, with an empty folder for compiled code; a context manager.

    Args:
        name: of the contender.
        case: what it steps.
        patience: seconds for an answer.

    Raises:
        WorkerError: see above; by every method.
    """

    def __init__(self, name: str, case: Case, patience: float = LIMIT) -> None:
        self.name, self.case, self._patience = name, case, patience

    def __enter__(self) -> Worker:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(self.name, self.case, other), daemon=True)
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": self._folder.name,
            "OMP_NUM_THREADS": str(self.case.threads),
        }
        with STARTING, mock.patch.dict(os.environ, environment):  # read when its torch is imported
            self._process.start()
        other.close()
        try:
            self._answer()
        except WorkerError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
        self._folder.cleanup()

    def step(self) -> float:
        """Seconds of one step."""
        return float(self._ask("step"))

    def turn(self) -> float:
        """Median seconds of as many steps as a turn has time for, one at least."""
        return float(self._ask("turn"))

    def memory(self) -> float:
        """Bytes at the peak of one step, beyond what is held before it."""
        return float(self._ask("memory"))

    def _ask(self, question: str) -> Any:
        try:
            self._pipe.send(question)
        except OSError as error:
            raise WorkerError(f"{self.name} died while it ran {self.case}") from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(self._patience):
                self._process.kill()  # it would go on beside the others' steps
                raise WorkerError(f"{self.name} gave no answer on {self.case} for {self._patience:.0f} s")
            good, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(f"{self.name} died while it ran {self.case}") from error
        if not good:
            raise WorkerError(f"{self.name} on {self.case}: {value}")
        return value


def _work(name: str, case: Case, pipe: Connection) -> None:
    silence()
    try:
        import torch

        from conformance.bench.contenders import stepper

        torch.set_num_threads(case.threads)
        keep_freed_memory()
        step = stepper(name, case)
        answers = {
            "step": partial(timed, step, case.device),
            "turn": partial(_turn, step, case.device),
            "memory": partial(_peak, step, case.device),
        }
        pipe.send((True, None))
        while True:
            question = pipe.recv()
            pipe.send((True, answers[question]()))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))


def _turn(step: Callable[[], object], device: str) -> float:
    times: list[float] = []
    while not times or sum(times) < TURN:
        times.append(timed(step, device))
    return statistics.median(times)


def silence() -> None:
    """Take this process off the terminal: the profiler and the compiler write there, from C++ too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _peak(step: Callable[[], object], device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what is held now and not allocated is that of CUDA graphs
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = torch.cuda.memory_reserved() - before
        step()
        torch.cuda.synchronize()
        return float(kept + torch.cuda.max_memory_allocated() - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    # Every allocation and release of the allocator, in order; the sums of them are what is held.
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak)
