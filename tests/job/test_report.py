from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from conformance.cli import app
from conformance.job.events import Started, Stepped
from conformance.job.grading import Series
from conformance.job.results import SIMULATED, TRAINED, Row
from conformance.report.page import facts_of_run, write, write_json
from conformance.report.terminal import Monitor, summary, table


def rows(error: float = 1e-14) -> list[Row]:
    made = []
    for optimizer in ("muon", "dion"):
        for dtype in ("float64", "float32"):
            rerun = (1e-6, 2e-6) if dtype == "float32" else ()
            bound = 4e-6 if rerun else 1e-12
            one = Series("blocks.0.mlp.up.weight", optimizer, "update", (error, error / 2), rerun, bound)
            two = Series("norm.weight", "adamw", "update", (0.0, 1e-16), rerun, bound)
            made.append(
                Row(
                    optimizer,
                    dtype,
                    "2x2 fsdp,tp",
                    TRAINED,
                    (one, two),
                    (5.0, 4.0),
                    1.0,
                    1.0,
                    0.1,
                    {"local": 2},
                )
            )
        one = Series("blocks.0.mlp.up.weight", optimizer, "update", (error,), (), 1e-12)
        made.append(Row(optimizer, "float64", "8x8 fsdp,tp", SIMULATED, (one,), (), 1.0, 1.0, 0.1))
    return made


def test_the_report_is_whole(tmp_path: Path) -> None:
    page = write(tmp_path / "report", rows(), 6, facts_of_run({"model": "<small>"}, 12.0))
    text = page.read_text()
    assert "pass: 6 of 6 passed" in text
    assert text.count("data:image/png;base64,") == 3
    assert "&lt;small&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
    names = sorted(file.name for file in page.parent.iterdir())
    assert names == ["errors.png", "index.html", "losses.png", "meshes.png", "results.json"]
    results = json.loads((page.parent / "results.json").read_text())
    assert results["passed"]
    assert len(results["rows"]) == 6
    assert results["rows"][0]["series"][0]["errors"] == [1e-14, 5e-15]
    assert list(tmp_path.iterdir()) == [page.parent]


@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_a_failure_is_told_with_its_reason(tmp_path: Path, error: float) -> None:
    text = write(tmp_path / "report", rows(error), 6, {}).read_text()
    assert "FAIL: 0 of 6 passed" in text
    assert "update of blocks.0.mlp.up.weight (muon) is off by" in text


def test_a_missing_row_is_no_pass(tmp_path: Path) -> None:
    assert "FAIL: 6 of 7 passed" in write(tmp_path / "report", rows(), 7, {}).read_text()


def test_an_old_report_is_replaced_and_anything_else_is_kept(tmp_path: Path) -> None:
    page = write(tmp_path / "report", rows(), 6, {})
    (page.parent / "old.png").write_text("")
    write(tmp_path / "report", rows(), 6, {})
    assert not (page.parent / "old.png").exists()
    other = tmp_path / "work"
    other.mkdir()
    (other / "thesis.tex").write_text("dear")
    with pytest.raises(FileExistsError, match="neither empty nor a report"):
        write(other, rows(), 6, {})
    assert (other / "thesis.tex").read_text() == "dear"


def test_a_report_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr("conformance.report.page.render", fail)
    with pytest.raises(RuntimeError, match="no page"):
        write(tmp_path / "report", rows(), 6, {})
    assert list(tmp_path.iterdir()) == []


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "results.json", rows(), 6, {"took": "1 s"})
    assert json.loads((tmp_path / "deep" / "results.json").read_text())["run"] == {"took": "1 s"}
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_lines_and_table_without_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100)
    with Monitor(console, 1, 2, 0) as monitor:
        monitor(0, Started("muon", "float64", "2x2 fsdp,tp", 2))
        monitor(0, Stepped(0, 5.0))
        for row in rows():
            monitor(0, row)
    console.print(table(monitor.in_order()))
    text = out.getvalue()
    assert "pass muon float64 on 2x2 fsdp,tp: largest update error 1.0e-14, bound 1.0e-12" in text
    assert [row.kind for row in monitor.in_order()] == [TRAINED] * 4 + [SIMULATED] * 2
    assert summary(rows(), 6, 61.4) == "6 of 6 passed in 61 s"


def test_live_progress_on_a_terminal() -> None:
    out = io.StringIO()
    with Monitor(Console(file=out, width=100, force_terminal=True), 1, 2, 0) as monitor:
        monitor(0, Started("muon", "float64", "2x2 fsdp,tp", 2))
        monitor(0, Stepped(0, 5.0))
    assert "muon float64 2x2 fsdp,tp" in out.getvalue()


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["certify", "--help"]])
def test_help(command: list[str]) -> None:
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert "inject" not in done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--optimizer", "sgd"], "sgd"),
        (["--dtype", "int8"], "int8"),
        (["--mesh", "9x9"], "9x9"),
        (["--inject-nan", "nowhere"], "STEP:PARAMETER"),
    ],
)
def test_unknown_choices_are_refused_before_anything_runs(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["run", *options])
    assert done.exit_code == 2
    assert words in done.output


def test_a_folder_with_other_things_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    done = CliRunner().invoke(app, ["run", "--quick", "--report", str(tmp_path)])
    assert done.exit_code == 1
    assert "neither empty nor a report" in done.output
