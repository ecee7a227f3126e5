"""L3 and L4 from the outside: starts ranks, takes their results, and starts anew after a rank failed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from conformance import launch
from conformance.adapters import Adapter, Capabilities
from conformance.port.grading import ERROR, FAIL, PASS, SKIP, UNCLAIMED, UNDECIDED, Verdict, in_words
from conformance.port.mesh_cases import MeshCase, claimed_hypers, mesh_cases
from conformance.port.mesh_program import Finished, Hung, Started, Work, checkpoint_folder, program
from conformance.port.runner import Selection
from conformance.port.selection import reason
from conformance.vectors import VectorSet

Job = tuple[MeshCase, str]


@dataclass
class Log:
    """What the ranks of one start have said.

    Attributes:
        started: by rank, the last case that it began.
        finished: by index.
        hung: by rank that ended itself, what it said.
    """

    on_finished: Callable[[int, Finished], None]
    started: dict[int, int] = field(default_factory=dict)
    finished: dict[int, Finished] = field(default_factory=dict)
    hung: dict[int, Hung] = field(default_factory=dict)

    def __call__(self, rank: int, event: object) -> None:
        """Takes an event."""
        if isinstance(event, Started):
            self.started[rank] = event.index
        elif isinstance(event, Hung):
            self.hung[rank] = event
        elif isinstance(event, Finished):
            self.finished[event.index] = event
            self.on_finished(event.index, event)

    def hang(self) -> str:
        """Who hung and where, and who only waited for them; empty if none did."""
        hung = {True: "", False: ""}
        for rank in sorted(self.hung):
            one = self.hung[rank]
            hung[one.waits] += ("; " if hung[one.waits] else "") + one.message
        if hung[False] and hung[True]:
            return f"{hung[False]}; the others waited for it: {hung[True]}"
        return hung[False] or hung[True]

    def stacks(self) -> str:
        """Of all ranks that hung, those that waited for no other first."""
        every = sorted(self.hung.items(), key=lambda item: (item[1].waits, item[0]))
        return "\n".join(f"rank {rank}:\n{one.stack}" for rank, one in every)


def run_meshes(
    adapter: str | Adapter,
    port: Capabilities,
    vectors: VectorSet,
    selection: Selection,
    *,
    ranks: int,
    device: str = "cpu",
    backend: str | None = None,
    timeout: float = 60.0,
    compiled: bool = False,
    on_verdict: Callable[[Verdict], None] = lambda _: None,
    keep: Callable[[Job, Finished], None] = lambda _, __: None,
) -> list[Verdict]:
    """The verdicts on every selected case of L3 and L4.

    Args:
        adapter: its path or, if it can be pickled, the object; it needs `build`.
        port: what it claims.
        vectors: for the hyperparameters.
        selection: levels, dtypes, patterns, known failures.
        ranks: local processes (those of another launcher are taken).
        device: "cpu" (gloo) or "cuda" (NCCL).
        backend: "gloo" on "cuda": ranks share GPUs; "threads": they are threads; None for the device's own.
        timeout: seconds a case, and a collective.
        compiled: fewer parameters a case.
        on_verdict: called with each, as soon as it is known.
        keep: called with each job and its results, to compare backends.
    """
    verdicts: list[Verdict] = []
    todo: list[Job] = []
    for case, dtype, known in mesh_jobs(port, vectors, selection, ranks, compiled):
        if known is not None:
            verdicts.append(known)
            on_verdict(known)
        else:
            todo.append((case, dtype))
    folder = checkpoint_folder()
    try:
        while todo:

            def finish(index: int, finished: Finished, jobs: Sequence[Job] = todo) -> None:
                verdict = selection.judged(graded(jobs[index], finished))
                verdicts.append(verdict)
                keep(jobs[index], finished)
                on_verdict(verdict)

            log = Log(finish)
            failure = _start(adapter, todo, log, ranks, device, backend, timeout, folder)
            done = set(log.finished)
            if failure is not None:
                blamed = log.started.get(failure.rank, max(log.started.values(), default=0))
                blamed = blamed if blamed not in done else min(set(range(len(todo))) - done, default=blamed)
                message = log.hang() or str(failure)
                verdict = selection.judged(
                    replace(_blank(todo[blamed], ERROR, message), details=log.stacks() or failure.details)
                )
                verdicts.append(verdict)
                on_verdict(verdict)
                done.add(blamed)
            # Without a failure all is done, though joined ranks but the first hear nothing of it. After one, the other
            # joined ranks are gone, and only their launcher can start them again.
            if failure is not None and launch.joined():
                for index, job in enumerate(todo):
                    if index not in done:
                        verdicts.append(
                            _blank(job, ERROR, f"not run: the ranks ended in {todo[blamed][0].id}")
                        )
                        on_verdict(verdicts[-1])
            if failure is None or launch.joined():
                break
            todo = [job for index, job in enumerate(todo) if index not in done]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return verdicts


def mesh_jobs(
    port: Capabilities,
    vectors: VectorSet,
    selection: Selection,
    ranks: int,
    compiled: bool = False,
) -> list[tuple[MeshCase, str, Verdict | None]]:
    """Every selected (case, dtype) of L3 and L4, with the verdict where it is known without running it."""
    return [
        (case, dtype, _known(case, dtype, port, selection, ranks))
        for case in mesh_cases(claimed_hypers(port, vectors), selection.levels, compiled, ranks)
        for dtype in selection.dtypes or port.dtypes
        if selection.wants(case.id, case.level, dtype)
    ]


def _start(
    adapter: str | Adapter,
    todo: Sequence[Job],
    log: Log,
    ranks: int,
    device: str,
    backend: str | None,
    timeout: float,
    folder: str,
) -> launch.RankFailedError | None:
    work = Work(adapter, tuple(todo), timeout, folder)
    try:
        launch.run(
            program,
            work,
            ranks=ranks,
            device=device,
            backend=backend,
            on_event=log,
            timeout=timeout + 30,  # the watchdog, which can say more, comes first
            preload=["conformance.port.mesh_program"],
        )
    except launch.RankFailedError as failure:
        return failure
    except (RuntimeError, OSError) as error:  # torch's network errors are RuntimeErrors
        raise OSError(f"the ranks cannot be started: {launch.one_line(error, 300)}") from error
    return None


def _known(
    case: MeshCase, dtype: str, port: Capabilities, selection: Selection, ranks: int
) -> Verdict | None:
    """The verdict that needs no run."""
    if case.level not in port.levels or dtype not in port.dtypes:
        return _blank(
            (case, dtype),
            UNCLAIMED,
            f"level {case.level}" if case.level not in port.levels else f"dtype {dtype}",
        )
    if missing := [one for one in case.requires if one not in port.features]:
        return _blank((case, dtype), UNCLAIMED, f"feature {', '.join(missing)}")
    if (why := reason(selection.skip, case.id, dtype)) is not None:
        return _blank((case, dtype), SKIP, why)
    if case.ranks > ranks:
        return _blank((case, dtype), SKIP, f"needs {case.ranks} ranks; run it with --nproc {case.ranks}")
    return None


def _blank(job: Job, status: str, message: str = "") -> Verdict:
    case, dtype = job
    layout = str(case.layout) + (f" to {case.resume}" if case.resume else "")
    return Verdict(
        case.id, case.level, case.algorithm, case.dialect, dtype, status, layout=layout, message=message
    )


def graded(job: Job, finished: Finished) -> Verdict:
    """The verdict on what the ranks found."""
    verdict = replace(
        _blank(job, PASS), errors=finished.errors, seconds=finished.seconds, spectrum=finished.spectrum
    )
    wrong = [
        in_words(name, error, allowed) + (f", {finished.off[name]}" if name in finished.off else "")
        for name, (error, allowed) in finished.errors.items()
        if allowed is not None and not (math.isfinite(error) and error <= allowed)
    ]
    if finished.problem:
        wrong.insert(0, finished.problem)
    if wrong:
        return verdict.with_status(FAIL, "; ".join(wrong))
    if finished.errors.get("update", (0.0, None))[1] is None:
        return verdict.with_status(UNDECIDED, "this dtype decides nothing here")
    return verdict
