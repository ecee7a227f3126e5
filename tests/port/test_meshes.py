"""L3 and L4 on real ranks: a right port passes, one that raises or hangs on a rank is named, and the run goes on."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.adapters import find
from conformance.launch import RankFailedError
from conformance.port.grading import ERROR, FAIL, PASS, SKIP, UNCLAIMED, Verdict
from conformance.port.mesh_cases import LAYOUTS, RESHARDINGS, claimed_hypers, mesh_cases
from conformance.port.mesh_program import Hung, Started
from conformance.port.meshes import Log, run_meshes
from conformance.port.runner import Selection
from conformance.port.watchdog import HANG_EXIT, where
from conformance.vectors import load

ROOT = Path(__file__).parents[2]
OURS = (
    *(
        "L4/muon/dion/2x2-PS0",
        "L4/dion/dion/2x2-PS0",
        "L4/muon/dion/2x2-T0S0",
        "L4/muon/dion/4-S0",
        "L4/dion/dion/2x2-S0S1",
        "L4/muon/dion/8-S0",
    ),
    "L3/dion/dion/4-S0-to-2x2-S0S1",
)

BUCKET = ("blocks_0_weight", "blocks_1_weight", "blocks_2_weight")
"""The first one of `L4/muon/dion/4-S0`."""


def run(path: str, *only: str, **options: Any) -> dict[str, Verdict]:
    adapter = find(path)
    selection = Selection(("L3", "L4"), ("float64",), only)
    given = {"ranks": 4, "timeout": 60.0, **options}
    return {one.case: one for one in run_meshes(path, adapter.capabilities(), load(), selection, **given)}


def test_layouts_cover_one_to_three_axes_and_strided_shards() -> None:
    assert {len(one.mesh) for one in LAYOUTS} == {1, 2, 3}
    assert {one.ranks for one in LAYOUTS} == {1, 2, 3, 4, 8}
    assert any("T0" in one.codes for one in LAYOUTS if len(one.mesh) == 3)
    assert any(before != after for before, after in RESHARDINGS)
    claims = find("conformance.mutants.gathering:adapter").capabilities()
    ids = [one.id for one in mesh_cases(claimed_hypers(claims, load()), ("L3", "L4"))]
    assert len(ids) == len(set(ids)) == 8 * (len(LAYOUTS) + len(RESHARDINGS))


def test_compiled_cases_share_the_shapes_out_among_the_algorithms() -> None:
    claims = find("conformance.mutants.gathering:adapter").capabilities()
    compiled = list(mesh_cases(claimed_hypers(claims, load()), ("L3", "L4"), compiled=True))
    for place in (*RESHARDINGS, *((one, None) for one in LAYOUTS)):
        shapes = [one.shapes for one in compiled if (one.layout, one.resume) == place]
        assert {len(one) for one in shapes} == {4}
        assert {index for one in shapes for index in one} == {0, 1, 2, 3, 5, 7}
    alone = mesh_cases(claimed_hypers(claims, load()), ("L4",), compiled=True)
    assert all(one in compiled for one in alone)  # whatever levels are selected


def test_right_ports_pass_and_what_needs_more_ranks_is_skipped() -> None:
    alive: dict[str, bool] = {}

    def said(verdict: Verdict) -> None:
        alive[verdict.case] = bool(multiprocessing.active_children())

    ours = run("conformance.adapters.ours:adapter", *OURS, on_verdict=said)
    assert sum(alive.values()) >= 3  # verdicts come while the ranks work, not at their end
    assert {one.status for name, one in ours.items() if name != "L4/muon/dion/8-S0"} == {PASS}
    assert len(ours) == len(OURS)
    assert ours["L4/muon/dion/8-S0"].status == SKIP
    assert "--nproc 8" in ours["L4/muon/dion/8-S0"].message
    brute = run("conformance.mutants.gathering:adapter", "L?/dion3/*/4-S0*", "L3/adamw/*/2x2-R*")
    assert {one.status for one in brute.values()} == {PASS}
    assert len(brute) == 4
    # What a port does not claim is never run.
    plain = find("conformance.mutants.gathering:adapter").capabilities()
    plain = replace(plain, features=())
    selection = Selection(("L4",), ("float64",), ("L4/muon/*/2x2-P*",))
    left = run_meshes("no.such:adapter", plain, load(), selection, ranks=4)
    assert [(one.status, one.message) for one in left] == [(UNCLAIMED, "feature gradients:Partial")] * 2


def test_a_port_that_does_nothing_fails_every_case() -> None:
    found = run(
        "tests.port.ports:idle_on_ranks", "*/1-S0", "L?/muon/*/2-S0*", "L4/dion3/*/4-S0", "L3/adamw/*/2x2-*"
    )
    assert len(found) > 8
    assert {one.status for one in found.values()} == {FAIL}


def test_a_rank_that_raises_is_named_and_the_run_goes_on() -> None:
    found = run("tests.port.ports:raises_on_ranks", "L4/muon/*/2-S?", "L4/muon/*/4-S0")
    assert found["L4/muon/dion/4-S0"].status == ERROR
    assert "rank 2 raised ArithmeticError: on rank two alone" in found["L4/muon/dion/4-S0"].message
    assert found["L4/muon/dion/2-S0"].status == found["L4/muon/dion/2-S1"].status == PASS


def test_a_hang_ends_in_time_with_the_rank_and_what_the_others_wait_in() -> None:
    found = run("tests.port.ports:hangs_on_ranks", "L4/muon/*/4-S0", "L4/muon/*/2-S0", timeout=12.0)
    hung = found["L4/muon/dion/4-S0"]
    assert hung.status == ERROR
    culprit, _, waiting = hung.message.partition("; the others waited for it: ")
    assert culprit.startswith("rank 2 hung for 12 s in tests.port.ports.misbehave")
    assert [f"rank {rank} hung" in waiting for rank in range(4)] == [True, True, False, True]
    assert waiting.count("in the collective 'full_tensor'") == 3
    assert found["L4/muon/dion/2-S0"].status == PASS
    # For --traceback, the culprit first.
    assert hung.details.startswith("rank 2:\n  File ")
    assert ", in misbehave\n" in hung.details.partition("rank 0:")[0]
    assert all(f"rank {rank}:\n" in hung.details for rank in range(4))


def test_a_hang_prints_one_line_and_no_stack() -> None:
    code = (
        "import time\n"
        "from conformance.port import watchdog\n"
        "watchdog.OTHERS_SECONDS = 0.0\n"
        "def said(line, waits, stack): print(waits, stack)\n"
        "with watchdog.watched(1.0, 7, said): time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-uc", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == HANG_EXIT
    assert done.stderr == "rank 7 hung for 1 s in __main__.<module>\n"
    assert done.stdout.startswith('False   File "<string>", line 5, in <module>\n')


def test_ranks_may_be_threads_of_one_process() -> None:
    cases = ("L4/muon/dion/16-S0", "L4/dion2/dion/4x4-T0S0", "L3/dion/dion/4-S0-to-2x2-S0S1")
    ours = run("conformance.adapters.ours:adapter", *cases, ranks=16, backend="threads")
    assert [(name, one.status) for name, one in sorted(ours.items())] == [
        (name, PASS) for name in sorted(cases)
    ]
    assert not run("conformance.adapters.ours:adapter", cases[0])  # with four ranks there is no such case


def test_a_thread_that_raises_or_hangs_is_named_and_the_run_goes_on() -> None:
    two, four = "L4/muon/dion/2-S0", "L4/muon/dion/4-S0"
    found = run("tests.port.ports:raises_on_ranks", two, four, backend="threads")
    assert found[four].status == ERROR
    assert found[four].message == "rank 2 raised ArithmeticError: on rank two alone"
    assert found[two].status == PASS
    found = run("tests.port.ports:hangs_on_ranks", two, four, backend="threads", timeout=8.0)
    culprit, _, waiting = found[four].message.partition("; the others waited for it: ")
    assert culprit.startswith("rank 2 hung for 8 s in tests.port.ports.misbehave")
    assert waiting.count("in the collective 'full_tensor'") == 3
    assert found[two].status == PASS


def test_ranks_of_another_launcher_are_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="cannot be threads of one process"):
        run("conformance.adapters.ours:adapter", "L4/muon/dion/1-S0", backend="threads")


def test_a_hang_of_our_own_step_names_the_parameters() -> None:
    found = run("tests.port.ports:hangs_before_our_step", "L4/muon/*/4-S0", timeout=12.0)
    culprit, _, waiting = found["L4/muon/dion/4-S0"].message.partition("; the others waited for it: ")
    assert culprit.startswith("rank 2 hung for 12 s in tests.port.ports.before")
    assert waiting.count("in the collective ") == 3
    every = "blocks_0_weight, blocks_1_weight, blocks_2_weight, blocks_3_weight and 5 more"
    assert waiting.count(f"of dion_dtensor.assembly.agreed_maximum, parameters {every}") == 3


def test_a_hang_in_the_step_of_our_bucket_names_its_parameters_on_every_rank() -> None:
    found = run("tests.port.ports:hangs_in_our_bucket", "L4/muon/*/4-S0", timeout=12.0)
    culprit, _, waiting = found["L4/muon/dion/4-S0"].message.partition("; the others waited for it: ")
    bucket = f"bucket of {', '.join(BUCKET)}"
    assert culprit == f"rank 2 hung for 12 s in tests.port.ports.<lambda>, {bucket}"
    one = f"in the collective '_c10d_functional.wait_tensor' of dion_dtensor.alltoall.finish, {bucket}"
    assert waiting == "; ".join(f"rank {rank} hung for 12 s {one}" for rank in (0, 1, 3))


@pytest.mark.parametrize(
    ("operator", "waits"),
    [
        ("_c10d_functional.wait_tensor.default", True),
        ("dion_dtensor.finish_rows.default", True),
        ("aten.mm.default", False),
    ],
)
def test_a_wait_inside_an_operator_is_one_for_other_ranks(operator: str, waits: bool) -> None:
    module: dict[str, Any] = {"__name__": "torch._ops", "sys": sys}
    exec("def redispatch(self): return sys._getframe()", module)
    place, found = where(module["redispatch"](operator))
    assert found == waits
    assert (f"in the collective {operator!r}" in place) == waits


def test_a_desynchronized_collective_names_what_each_rank_waits_in() -> None:
    log = Log(lambda *_: None)
    log(1, Hung("rank 1 hung for 9 s in the collective 'all_gather'", True))
    log(0, Hung("rank 0 hung for 9 s in the collective 'all_reduce'", True))
    both = (
        "rank 0 hung for 9 s in the collective 'all_reduce'",
        "rank 1 hung for 9 s in the collective 'all_gather'",
    )
    assert log.hang() == "; ".join(both)


def test_what_joined_ranks_could_not_run_is_in_the_report_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(adapter: Any, todo: Any, log: Any, *_: Any) -> RankFailedError:
        log(0, Started(0))
        return RankFailedError(0, "raised ArithmeticError")

    monkeypatch.setattr("conformance.port.meshes._start", fails)
    monkeypatch.setattr("conformance.port.meshes.launch.joined", lambda: True)
    found = run("conformance.mutants.gathering:adapter", "L4/muon/*/2-S?", "L4/muon/*/4-S0")
    assert [one.status for one in found.values()] == [ERROR] * 3
    assert [one.message.startswith("not run") for one in found.values()] == [False, True, True]


@pytest.mark.slow
def test_ours_pass_every_mesh_of_eight_ranks() -> None:
    found = run("conformance.adapters.ours:adapter", ranks=8, timeout=120.0)
    assert {one.status for one in found.values()} == {PASS}
