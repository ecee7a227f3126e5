from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conformance import launch
from tests.job import programs


def test_results_come_in_the_order_of_the_ranks_and_events_arrive() -> None:
    events: list[tuple[int, object]] = []
    results = launch.run(
        programs.total, 10, ranks=3, on_event=lambda rank, event: events.append((rank, event))
    )
    assert results == [13, 13, 13]
    assert sorted(events) == [(index, f"rank {index} of 3") for index in range(3)]


def test_an_exception_ends_the_others_and_is_named() -> None:
    began = time.monotonic()
    with pytest.raises(
        launch.RankFailedError, match=r"^rank 2 raised ValueError: no such luck second line$"
    ) as caught:
        launch.run(programs.raise_on, 2, ranks=3)
    assert time.monotonic() - began < 50
    assert caught.value.rank == 2
    assert "raise_on" in caught.value.details


def test_the_same_exception_everywhere_is_told_once() -> None:
    with pytest.raises(
        launch.RankFailedError, match=r"rank 0 raised ValueError: all together \(the same on ranks 1\)"
    ):
        launch.run(programs.raise_everywhere, None, ranks=2)


def test_a_killed_rank_ends_the_others_and_is_named_with_its_signal() -> None:
    began = time.monotonic()
    with pytest.raises(launch.RankFailedError, match=r"^rank 1 was killed by SIGKILL$"):
        launch.run(programs.kill_on, 1, ranks=3)
    assert time.monotonic() - began < 50


def test_a_rank_that_leaves_silently_is_noticed_though_no_other_waits_for_it() -> None:
    with pytest.raises(launch.RankFailedError, match=r"^rank 0 ended with exit code 7 and no result$"):
        launch.run(programs.exit_on, 0, ranks=2)


def test_ranks_that_ignore_sigterm_are_killed() -> None:
    began = time.monotonic()
    with pytest.raises(launch.RankFailedError, match="rank 1 raised ValueError: over"):
        launch.run(programs.ignore_the_end, 1, ranks=2)
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_process_that_started_it(tmp_path: Path, ending: signal.Signals) -> None:
    code = (
        "import signal\n"
        # a shell's background job ignores SIGINT, and its children inherit that
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from conformance import launch\n"
        "from tests.job import programs\n"
        f"launch.run(programs.write_pid_and_wait, {str(tmp_path)!r}, ranks=2)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 100
    while len(files := [file for file in tmp_path.iterdir() if file.read_text()]) < 2:
        assert starter.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)
    starter.send_signal(ending)
    starter.wait(30)
    limit = time.monotonic() + 20
    while any(_alive(int(file.read_text())) for file in files):
        assert time.monotonic() < limit
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_ranks_of_another_launcher_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    events: list[object] = []
    assert launch.joined()
    assert launch.is_main()
    results = launch.run(programs.total, 5, ranks=4, on_event=lambda rank, event: events.append(event))
    assert results == [5]
    assert events == ["rank 0 of 1"]


def test_torchrun_reaches_the_same_entry(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from conformance import launch\n"
        "from tests.job import programs\n"
        "result = launch.run(programs.total, 0, ranks=7)\n"
        "if launch.is_main():\n"
        "    print(result)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(program),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1, 1]" in done.stdout


def test_only_rank_zero_is_main(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.joined()
    assert not launch.is_main()


def test_slurm_ranks_are_joined_and_single_slurm_tasks_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert not launch.joined()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert launch.joined()
    assert not launch.is_main()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (3, "ended with exit code 3 and no result"),
        (None, "closed its channel without a result"),
    ],
)
def test_exits_are_described(code: int | None, words: str) -> None:
    assert launch.describe_exit(code) == words


def test_a_missing_device_is_refused() -> None:
    with pytest.raises(launch.RankFailedError, match="device must be cpu or cuda, not 'tpu'"):
        launch.run(programs.total, 0, ranks=1, device="tpu")
