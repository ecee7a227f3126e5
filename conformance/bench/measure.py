"""Contenders step in turn, round by round, so that what slows the machine slows all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from conformance.bench.contenders import BARE, OURS, Case, available
from conformance.bench.products import flops
from conformance.bench.worker import LIMIT, Worker, WorkerError

__all__ = ["Entry", "measure", "measure_all"]


@dataclass
class Entry:
    """What one contender showed on one case.

    Attributes:
        case: what was stepped.
        name: of the contender.
        first: seconds of its first step, compilation included, nothing compiled before.
        steps: seconds of the steps after three more, the median of a turn in each round.
        ratios: of ours to it, round by round; none for ours.
        bare: seconds of the bare products of the case, the roofline; 0 where it has none.
        memory: bytes at the peak of a step, beyond parameters, gradients and state.
        peak: FLOP/s that the device was seen to give in the case's dtype; 0 where it was not measured.
        planned: seconds of a step by `conformance plan --hardware here`; 0 where that was not asked for.
        failure: what stopped it, or "".
    """

    case: Case
    name: str
    first: float = 0.0
    steps: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    bare: float = 0.0
    memory: float = 0.0
    peak: float = 0.0
    planned: float = 0.0
    failure: str = ""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.steps)

    @property
    def spread(self) -> float:
        """Half of the range between the quartiles, relative to the median."""
        low, high = _middle(self.steps)
        return (high - low) / 2 / self.median

    @property
    def ratio(self) -> float:
        """Median of ours over this one, pair by pair."""
        return statistics.median(self.ratios)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """The quartiles of the ratios."""
        return _middle(self.ratios)

    @property
    def roofline(self) -> float:
        """Time of the bare products over that of the step."""
        return self.bare / self.median

    @property
    def rate(self) -> float:
        """FLOP/s of the textbook's products, as if these were what it computed."""
        case = self.case
        return flops(case.algorithm, case.count, case.shape, case.part) / self.median


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles; of fewer than four values the least and the largest."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def measure(
    case: Case,
    rounds: int,
    *,
    names: Sequence[str] | None = None,
    memory: bool = True,
    told: Callable[[str], None] = lambda _: None,
) -> list[Entry]:
    """First steps one after the other, then ``rounds`` of a turn each, in an order that turns.

    Args:
        case: what is stepped.
        rounds: at least 1.
        names: of the contenders; None for all that are here.
        memory: whether to look at the peak.
        told: is called with what is going on.

    Returns:
        An entry a contender, ours first; one that failed says so and takes no further part.
    """
    return next(measure_all([case], rounds, names=names, memory=memory, told=told))


def measure_all(
    cases: Sequence[Case],
    rounds: int,
    *,
    jobs: int = 1,
    patience: float = LIMIT,
    names: Sequence[str] | None = None,
    further: Sequence[str] = (),
    memory: bool = True,
    told: Callable[[str], None] = lambda _: None,
) -> Iterator[list[Entry]]:
    """:func:`measure` of several cases whose contenders are all there at once.

    Args:
        cases: what is stepped, one after the other.
        rounds: at least 1.
        jobs: first steps that may run at a time; the others never do.
        patience: seconds for an answer; who takes longer has failed.
        further: contenders beside those that are here, see :func:`~conformance.bench.contenders.builder_of`.
        names, memory, told: as there.
    """
    entries = [Entry(case, name) for case in cases for name in names or available(case, further)]
    workers: dict[int, Worker] = {}
    with ExitStack() as stack:

        def asked(entry: Entry, question: Callable[[Worker], float]) -> float | None:
            try:
                return question(workers[id(entry)])
            except WorkerError as error:
                entry.failure = str(error)
                return None

        def begin(entry: Entry) -> None:
            told(f"{entry.case}: first step of {entry.name}")
            worker = Worker(entry.name, entry.case, patience)
            try:
                workers[id(entry)] = stack.enter_context(worker)
                entry.first = worker.step()
                worker.step()
                worker.step()
                worker.step()
            except WorkerError as error:
                entry.failure = str(error)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(begin, entries))
        for case in cases:
            own = [entry for entry in entries if entry.case == case]
            for index in range(rounds):
                told(f"{case}: round {index + 1} of {rounds}")
                alive = [entry for entry in own if not entry.failure]
                turn = index % max(1, len(alive))
                for entry in alive[turn:] + alive[:turn]:
                    if (seconds := asked(entry, Worker.turn)) is not None:
                        entry.steps.append(seconds)
            for entry in own:
                if memory and not entry.failure:
                    told(f"{case}: memory of {entry.name}")
                    entry.memory = asked(entry, Worker.memory) or 0.0
            _compare(own)
            yield own


def _compare(entries: Sequence[Entry]) -> None:
    """Ours with each other, round by round, and all with the bare products."""
    ours, bare = (
        next((entry for entry in entries if entry.name == name and not entry.failure), None)
        for name in (OURS, BARE)
    )
    for entry in entries:
        entry.bare = bare.median if bare is not None else 0.0
        if ours is not None and entry is not ours and not entry.failure:
            entry.ratios = [mine / other for mine, other in zip(ours.steps, entry.steps, strict=True)]
