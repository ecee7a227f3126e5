"""A pytest plugin: every case that a port claims is a test.

In a project's own tests, with `addopts = "--port my_port.adapter:adapter"`:

    def test_conformance(conformance_case):
        conformance_case()

or without a line of code: `pytest --pyargs conformance.port.suite --port my_port.adapter:adapter`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conformance.adapters import Capabilities
    from conformance.port.execute import Outcome
    from conformance.port.grading import Verdict
    from conformance.port.runner import Selection
    from conformance.port.worker import Worker
    from conformance.vectors import VectorSet

FIXTURE = "conformance_case"
MESHES = ("L3", "L4")
GATE = "L5"
SETUP = pytest.StashKey["tuple[Selection, VectorSet, Capabilities]"]()
"""Selection, vectors and claims, read once a session."""
SUITE = "conformance.port.suite"
ON_VECTORS = re.compile(r"\[(L[12]/\S+)@(\w+)\]$")
"""The end of a test's id: its case of L1 or L2, and the dtype."""


@dataclass
class Tried:
    """What was run on vectors in this process.

    Attributes:
        outcomes: by (case, dtype).
        failed: those of L1 and L2 whose numbers are wrong.
    """

    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    failed: set[tuple[str, str]] = field(default_factory=set)


TRIED = pytest.StashKey[Tried]()
"""Kept for what is said at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The selection of `conformance port`, under the same names."""
    group = parser.getgroup("conformance", "hold a port to the oracle")
    group.addoption("--port", help="adapter: package.module:object, or a registered name")
    group.addoption("--port-level", default="L0-L2", help="levels, such as L0-L4; L5 takes minutes")
    group.addoption("--port-dtype", action="append", help="only this compute dtype (repeatable)")
    group.addoption("--port-case", action="append", help="only ids that match this glob (repeatable)")
    group.addoption("--port-skip", type=Path, help="file of cases not to run: `pattern  # reason`")
    group.addoption("--port-xfail", type=Path, help="file of cases that have to fail, likewise")
    group.addoption("--port-vectors", type=Path, help="folder of another set of vectors")
    group.addoption("--port-timeout", type=float, default=60.0, help="seconds that a case may take")
    group.addoption("--port-nproc", type=int, default=4, help="local ranks for L3 and L4")
    group.addoption("--port-device", default="cpu", choices=("cpu", "cuda"), help="where the port computes")
    group.addoption(
        "--port-backend", help="gloo, nccl (cuda) or threads (cpu): ranks are threads of one process"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist starts its processes
def pytest_sessionstart(session: pytest.Session) -> None:
    """A bad option ends the session here, with one line; in collection it would be an internal error."""
    if session.config.getoption("--port") is not None:
        _setup(session.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and dtype; what is not claimed is no test, and is counted in the header."""
    if FIXTURE not in metafunc.fixturenames:
        return
    path = metafunc.config.getoption("--port")
    if path is None:
        if metafunc.module.__name__ == SUITE:
            raise pytest.Collector.CollectError(
                f"{SUITE} tests a port: give it with --port package.module:object"
            )
        skipped = pytest.param(None, marks=pytest.mark.skip(reason="no --port was given"), id="no-port")
        metafunc.parametrize(FIXTURE, [skipped], indirect=True)
        return
    from conformance.port.selection import reason

    selection, _, _ = _setup(metafunc.config)
    parameters = []
    for case, dtype, known in _jobs(metafunc.config):
        if known is not None and known.status != "skip":
            continue
        marks = [] if known is None else [pytest.mark.skip(reason=known.message)]
        if (why := reason(selection.xfail, case, dtype)) is not None:
            marks.append(pytest.mark.xfail(reason=why, strict=True))
        parameters.append(pytest.param((case, dtype), marks=marks, id=f"{case}@{dtype}"))
    metafunc.parametrize(FIXTURE, parameters, indirect=True)


def _jobs(config: pytest.Config) -> list[tuple[str, str, Verdict | None]]:
    """Ids and dtypes of all selected cases, with the verdict where it is known without running it."""
    from conformance.port.listing import listed

    selection, vectors, claims = _setup(config)
    return listed(claims, vectors, selection, config.getoption("--port-nproc"))


def _setup(config: pytest.Config) -> tuple[Selection, VectorSet, Capabilities]:
    """Selection, vectors and claims; a bad option ends the session with one line."""
    if (cached := config.stash.get(SETUP, None)) is not None:
        return cached
    from conformance.adapters import AdapterError, check_dialects
    from conformance.port.command import check_backend, claims_of, selection_of
    from conformance.port.listing import check_only, claimed_cases
    from conformance.port.selection import SelectionError, check_known
    from conformance.vectors import VectorError, load

    option = config.getoption
    sys.path.insert(0, os.getcwd())
    try:
        selection = selection_of(
            option("--port-level"),
            option("--port-dtype"),
            option("--port-case"),
            option("--port-skip"),
            option("--port-xfail"),
        )
        check_backend(option("--port-device"), option("--port-backend"))
        vectors = load(option("--port-vectors")) if option("--port-vectors") else load()
        claims = claims_of(option("--port"), option("--port-timeout"), option("--port-device"))
        check_dialects(claims, vectors, option("--port"))
        check_known((*selection.skip, *selection.xfail), lambda: claimed_cases(claims, vectors))
        check_only(claims, vectors, selection, option("--port-nproc"), "--port-case")
        config.stash[SETUP] = selection, vectors, claims
        if all(known is not None and known.status != "skip" for _, _, known in _jobs(config)):
            raise SelectionError(f"no case that {option('--port')} claims is selected")
    except (AdapterError, SelectionError, VectorError) as error:
        raise pytest.UsageError(str(error)) from error
    return selection, vectors, claims


def pytest_report_header(config: pytest.Config) -> str | None:
    """The port, its version, and the vectors."""
    path = config.getoption("--port", None)
    if path is None:
        return None
    _, vectors, claims = _setup(config)
    return f"conformance: {claims.name} {claims.version()} ({path}), vectors {vectors.version}"


@pytest.fixture(scope="session")
def _conformance_worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    """One process for the adapter in every test process."""
    from conformance.port.worker import Worker

    option = request.config.getoption
    worker = Worker(option("--port"), option("--port-timeout"), option("--port-device"))
    yield worker
    worker.close()


@pytest.fixture
def conformance_case(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Calling it runs one case on the port, and fails with the verdict's message."""
    from conformance.port.grading import ACCEPTABLE, PASS, UNDECIDED

    case, dtype = request.param
    if case.startswith(MESHES):
        verdict_on = _on_ranks
    else:
        in_its_process = _through_the_gate if case.startswith(GATE) else _on_vectors
        verdict_on = partial(in_its_process, request.getfixturevalue("_conformance_worker"))

    def run() -> None:
        verdict = verdict_on(request.config, case, dtype)
        if verdict.status == UNDECIDED:
            pytest.skip(verdict.message)
        if verdict.status not in (PASS, ACCEPTABLE):
            again = f"run it alone: {_command(request.config, verdict)}"
            about = f"the case: {verdict.about}\n" if verdict.about else ""
            said = f"{verdict.status}: {verdict.message}\n{about}{again}\n{verdict.details}"
            pytest.fail(said, pytrace=False)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """After failures on vectors, what the port seems to do; or, where other processes ran them, what says so."""
    found = (ON_VECTORS.search(one.nodeid) for one in terminalreporter.getreports("failed"))
    failed = {(one[1], one[2]) for one in found if one is not None}
    tried = config.stash.get(TRIED, Tried())
    if config.getoption("--port", None) is None or not failed:
        return
    if failed <= tried.outcomes.keys():
        from conformance.port.fit import fits

        _, vectors, claims = _setup(config)
        found_fits = fits(vectors, tried.outcomes, failed & tried.failed, given="state" in claims.features)
        lines = [f"claimed {one.claimed} ({one.algorithm}, {one.dtype}): {one}" for one in found_fits]
    else:
        words = ["conformance", "port", config.getoption("--port"), "--level", "L1-L2"]
        words += [word for dtype in config.getoption("--port-dtype") or () for word in ("--dtype", dtype)]
        words += _options(config)
        lines = [f"other processes ran the cases; this says it: {shlex.join(words)}"]
    if lines:
        terminalreporter.write_sep("=", "what the port does otherwise than it claims")
    for line in lines:
        terminalreporter.write_line(line)


def _command(config: pytest.Config, verdict: Verdict) -> str:
    """What runs one case again outside of pytest."""
    from conformance.port.output import command_of
    from conformance.port.runner import Run

    _, _, claims = _setup(config)
    return command_of(Run(claims, options=_options(config)), config.getoption("--port"), verdict)


def _options(config: pytest.Config) -> tuple[str, ...]:
    """Of the command, those that are not its defaults."""
    from conformance.port.command import RANKS, SECONDS
    from conformance.port.output import changed

    option = config.getoption
    return changed(
        {
            "--device": (option("--port-device"), "cpu"), "--backend": (option("--port-backend"), None),
            "--nproc": (option("--port-nproc"), RANKS), "--vectors": (option("--port-vectors"), None),
            "--timeout": (option("--port-timeout"), SECONDS),
        }
    )  # fmt: skip


def _on_vectors(worker: Worker, config: pytest.Config, case: str, dtype: str) -> Verdict:
    """The verdict on one case of L0 to L2, in the adapter's process."""
    from conformance.port.grading import FAIL, grade

    _, vectors, claims = _setup(config)
    found, tried = vectors[case], config.stash.setdefault(TRIED, Tried())
    outcome = tried.outcomes[case, dtype] = worker.run(found, dtype)
    verdict = grade(found, dtype, outcome, claims.states)
    if verdict.status == FAIL and found.level in ("L1", "L2") and found.result == "valid":
        tried.failed.add((case, dtype))
    return verdict


def _on_ranks(config: pytest.Config, case: str, dtype: str) -> Verdict:
    """The verdict on one case of L3 or L4, on ranks of its own."""
    from conformance.port.meshes import run_meshes
    from conformance.port.runner import Selection

    _, vectors, claims = _setup(config)
    option = config.getoption
    (verdict,) = run_meshes(
        option("--port"), claims, vectors, Selection(MESHES, (dtype,), (case,)),
        ranks=option("--port-nproc"), device=option("--port-device"), backend=option("--port-backend"),
        timeout=option("--port-timeout"),
    )  # fmt: skip
    return verdict


def _through_the_gate(worker: Worker, config: pytest.Config, case: str, dtype: str) -> Verdict:
    """The verdict on one case of L5, in the adapter's process."""
    from conformance.port.convergence import gate_case, judge

    _, vectors, claims = _setup(config)
    return judge(worker, *gate_case(case, dtype, claims, vectors))
