"""Runs the levels on every mutant, and says which of them notice."""

from __future__ import annotations

import functools
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from conformance import launch
from conformance.adapters import oracle as oracle_adapter
from conformance.adapters import ours
from conformance.launch import Rank, one_line
from conformance.mutants.catalogue import mutants
from conformance.mutants.gathering import KINDS, GatheringAdapter
from conformance.mutants.mutant import ORACLE, PRODUCTION, Mutant
from conformance.port.execute import execute
from conformance.port.grading import FAIL, grade
from conformance.port.mesh_cases import MeshCase, claimed_hypers, mesh_cases
from conformance.port.mesh_grading import grade as grade_values
from conformance.port.mesh_program import _digest, checkpoint_folder, run_case
from conformance.port.runner import Selection, jobs
from conformance.port.watchdog import watched
from conformance.vectors import VectorSet

RANKS = 4
SECONDS = 40.0
LOCAL = ("L0", "L1", "L2")


@dataclass
class Catch:
    """What became of a mutant.

    Attributes:
        mutant: the mistake.
        caught: by level, the first case that noticed and what it said.
        missed: levels on which all of its cases passed.
        seconds: wall time.
        unfit: why it could not be put in at all; such a mutant is neither caught nor missed.
    """

    mutant: Mutant
    caught: dict[str, tuple[str, str]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    unfit: str = ""

    @property
    def right(self) -> bool:
        """True when the level that should notice did."""
        return not self.unfit and self.mutant.level in self.caught


def hunt(
    vectors: VectorSet,
    chosen: Sequence[Mutant] | None = None,
    on_catch: Callable[[Catch], None] = lambda _: None,
) -> list[Catch]:
    """Every mutant through the levels.

    Args:
        vectors: the cases of L0 to L2.
        chosen: the mutants; all by default.
        on_catch: called with each as it is done.
    """
    every = mutants() if chosen is None else list(chosen)
    found: dict[int, Catch] = {}
    for index, one in enumerate(every):
        if (why := unfit(one)) is not None:
            found[index] = Catch(one, unfit=why)
        elif one.level in LOCAL:
            found[index] = _local(one, vectors)
        else:
            continue
        on_catch(found[index])
    on_ranks = {index: one for index, one in enumerate(every) if index not in found}
    for index, catch in _on_ranks(on_ranks, vectors):
        found[index] = catch
        on_catch(catch)
    return [found[index] for index in sorted(found)]


def unfit(mutant: Mutant) -> str | None:
    """Why a mutant does not apply to the code as it is, or None: found out here, since a rank's death is a catch."""
    try:
        if mutant.applied is not None:
            with mutant.applied():
                pass
        elif mutant.kind not in KINDS:
            return f"there is no {mutant.kind!r} among the gathering ports"
    except Exception as error:
        return one_line(error, 200)
    return None


def _local(mutant: Mutant, vectors: VectorSet) -> Catch:
    """L0 to L2 in this process: at each level, until a case notices."""
    began, catch = time.perf_counter(), Catch(mutant)
    adapter: Any = oracle_adapter.adapter if mutant.subject == ORACLE else ours.adapter
    claims = adapter.capabilities()
    assert mutant.applied is not None
    with mutant.applied():
        for level in LOCAL:
            work = [
                case
                for case, _, known in jobs(claims, vectors, Selection((level,), (mutant.dtype,)))
                if known is None and case.algorithm in mutant.algorithms and case.result == "valid"
            ]
            for case in work:
                verdict = grade(case, mutant.dtype, execute(adapter, case, mutant.dtype), claims.states)
                # What raises where a wrong number was meant does not fit the code, or a case that has no such thing.
                if verdict.status == FAIL:
                    catch.caught[level] = case.id, verdict.message
                    break
            else:
                if work:
                    catch.missed.append(level)
            if level in catch.caught and level == mutant.level:
                break
    catch.seconds = time.perf_counter() - began
    return catch


@dataclass(frozen=True)
class _Done:
    """From rank 0: a mutant's cases are through."""

    index: int
    caught: tuple[str, str] | None
    seconds: float


def _on_ranks(todo: Mapping[int, Mutant], vectors: VectorSet) -> Iterator[tuple[int, Catch]]:
    """L3 and L4 on real ranks; a mutant that ends a rank is caught, and the others go on with new ranks."""
    left = {index: (one, _cases(one, vectors)) for index, one in todo.items()}
    folder = checkpoint_folder()
    try:
        while left:
            events: list[Any] = []
            broken = None
            try:
                launch.run(
                    _program,
                    (tuple((index, one.name, one.subject, cases) for index, (one, cases) in left.items()), folder),
                    ranks=RANKS, timeout=SECONDS + 20, on_event=functools.partial(_keep, events),
                    preload=["conformance.mutants.hunt"],
                )  # fmt: skip
            except launch.RankFailedError as failure:
                broken = str(failure)
            for event in events:
                if isinstance(event, _Done):
                    one, _ = left.pop(event.index)
                    catch = Catch(one, seconds=event.seconds)
                    if event.caught is None:
                        catch.missed.append(one.level)
                    else:
                        catch.caught[one.level] = event.caught
                    yield event.index, catch
            if broken is not None and left:
                index = next(iter(left))
                one, cases = left.pop(index)
                yield index, Catch(one, {one.level: (cases[0].id, broken)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(events: list[Any], rank: int, event: object) -> None:
    events.append(event)


def _cases(mutant: Mutant, vectors: VectorSet) -> list[MeshCase]:
    """Its algorithm's cases on its layouts.

    Raises:
        LookupError: a layout that no case has.
    """
    claims = GatheringAdapter().capabilities()
    every = [
        case
        for case in mesh_cases(claimed_hypers(claims, vectors), (mutant.level,))
        if case.algorithm == mutant.algorithms[0]
    ]
    found = [case for name in mutant.layouts for case in every if case.id.endswith(f"/{name}")]
    if len(found) != len(mutant.layouts):
        raise LookupError(f"{mutant.name}: no case for one of {mutant.layouts}")
    return found


def _program(rank: Rank, work: tuple[tuple[tuple[int, str, str, list[MeshCase]], ...], str]) -> None:
    """On every rank: the mutants in order, each on its cases until one notices."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    assigned, folder = work
    every = {(one.name, one.subject): one for one in mutants()}
    for index, name, subject, cases in assigned:
        mutant = every[name, subject]
        began = time.perf_counter()
        caught = None
        with watched(SECONDS, rank.index, lambda *_: None):
            for case in cases:
                caught = caught or _judge(mutant, case, rank, f"{folder}/{index}")
        if rank.index == 0:
            rank.emit(_Done(index, caught, time.perf_counter() - began))


def _judge(mutant: Mutant, case: MeshCase, rank: Rank, folder: str) -> tuple[str, str] | None:
    """What the case says of the mutant; the same on every rank."""
    adapter: Any = ours.adapter if mutant.subject == PRODUCTION else GatheringAdapter(mutant.kind)
    values, problem = None, None
    with nullcontext() if mutant.applied is None else mutant.applied():
        try:
            values = run_case(adapter, case, mutant.dtype, rank, folder)
        except Exception as error:
            problem = f"rank {rank.index} raised {one_line(error, 200)}"
    said: list[Any] = [None] * rank.count
    dist.all_gather_object(said, (problem, None if values is None else _digest(values)))
    problems = [one for one, _ in said if one is not None]
    if problems:
        return case.id, problems[0]
    if len({digest for _, digest in said if digest is not None}) > 1:
        return case.id, "the ranks hold different values"
    verdict: list[Any] = [None]
    if rank.index == 0:
        assert values is not None
        errors = grade_values(case, mutant.dtype, values)
        wrong = {
            name: pair for name, pair in errors.items() if pair[1] is not None and not pair[0] <= pair[1]
        }
        name, (off, allowed) = next(iter(wrong.items()), ("", (0.0, None)))
        verdict[0] = (
            f"{name.removeprefix('state/')} is off by {off:.2g}, allowed {allowed:.2g}" if wrong else None
        )
    dist.broadcast_object_list(verdict, src=0)
    return None if verdict[0] is None else (case.id, verdict[0])
