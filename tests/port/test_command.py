"""The command: files, exit status, and what it says when it cannot start."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.distributed import DistNetworkError
from typer.testing import CliRunner

from conformance import entry
from conformance.cli import app
from conformance.port.grading import FAIL, Verdict
from conformance.port.output import alike

ROOT = Path(__file__).parent.parent.parent
CASES = ["--case", "L1/muon/dion/7x1-warm", "--case", "L1/muon/dion/8x8-warm", "--dtype", "float64"]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_files_and_the_command_that_runs_a_failure_again(tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "junit", "html")}
    arguments = ["port", "tests.port.ports:wrong_shape", "--level", "L1", *CASES]
    done = CliRunner().invoke(
        app, [*arguments, *(part for name, path in files.items() for part in (f"--{name}", str(path)))]
    )
    assert done.exit_code == 1, done.output
    assert "1 pass, 1 error" in done.output
    data = json.loads(files["json"].read_text())
    assert not data["passed"]
    by_case = {one["case"]: one for one in data["verdicts"]}
    assert by_case["L1/muon/dion/8x8-warm"]["status"] == "pass"
    bad = by_case["L1/muon/dion/7x1-warm"]
    assert bad["command"] in done.output
    suite = ElementTree.fromstring(files["junit"].read_bytes())
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "2", "failures": "0", "errors": "1", "skipped": "0",
    }  # fmt: skip
    page = files["html"].read_text()
    assert bad["case"] in page
    assert "data:image/png;base64," in page
    assert "http" not in re.sub(r"http-equiv", "", page)
    again = CliRunner().invoke(app, shlex.split(bad["command"])[1:])
    assert again.exit_code == 1
    assert "the weight has shape [1, 7]" in again.output
    assert "Traceback" in again.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json", "out.junit"]


def test_a_pass_says_what_was_not_claimed() -> None:
    done = CliRunner().invoke(
        app, ["port", "tests.port.ports:mislabelled", "--level", "L0-L1", "--case", "*/dion/8x8*"]
    )
    assert done.exit_code == 2  # nothing was claimed, so nothing was run
    assert "not claimed: " in done.output
    assert "levels L0; algorithms adamw, " in done.output
    assert "; other dialects of muon (1)" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.such.module:adapter"], "no.such.module cannot be imported"),
        (["tests.port.ports:no_such"], "tests.port.ports has no 'no_such'"),
        (["tests/port/ports.py:perfect"], "names a file; give the module: tests.port.ports:perfect"),
        (["/some/where/ports.py:perfect"], "give the module: ports:perfect from /some/where"),
        (["tests.port.ports:no_such_dialect"], "has the dialect 'kellerjordan'; known are dion, keller, torch, "),
        (["tests.port.ports:no_adapter"], "is no adapter: it has no capabilities, init, step"),
        (["tests.port.ports:bad_claims"], "must return conformance.adapters.Capabilities"),
        (["no-such-name"], "neither package.module:object nor a registered adapter"),
        ([":x"], "is not package.module:object"),
        (["tests.port.ports:perfect", "--level", "L7"], "'L7' is no level"),
        (["tests.port.ports:perfect", "--dtype", "float16"], "'float16' is no compute dtype"),
        (["tests.port.ports:perfect", "--backend", "nccl"], "on cpu the backend is gloo or threads, not 'nccl'"),
        (["tests.port.ports:perfect", "--device", "tpu"], "'tpu' is no device"),
        (["tests.port.ports:perfect", "--json", "/no/such/folder/file"], "/no/such/folder does not exist"),
        (["tests.port.ports:perfect", "--html", "/"], "cannot be written"),
        (["tests.port.ports:perfect", "--vectors", "/no/such/folder"], "/no/such/folder is no folder of vectors: "),
        (["tests.port.ports:perfect", "--xfail", "/no/such/file"], "/no/such/file cannot be read"),
        (["tests.port.ports:perfect", "--case", "L1/moun/*"], "'L1/moun/*' matches no case of L0, L1, L2, L3, L4;"),
        (["tests.port.ports:perfect", "--case", "L0/*", "--level", "L1"], "--case 'L0/*' matches no case of L1;"),
        (["tests.port.ports:perfect", "--case", "L1/*@float32", "--dtype", "float64"], "matches no case of L0, "),
        (["tests.port.ports:perfect", "--case", "L4/muon/*"], "that dion_ref claims, on 4 ranks or fewer"),
        (["dion_dtensor", "--case", "L4/muon/dion/8x8-*"], "that dion_dtensor claims, on 4 ranks or fewer"),
        (["dion_dtensor", "--case", "L5/muon/nosuch", "--level", "L5"], "no case of L5; an id is like L5/muon/"),
    ],
)  # fmt: skip
def test_what_cannot_start_ends_with_one_line_and_status_two(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["port", *arguments])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_read_only_folder_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conformance.port.targets.os.access", lambda *_: False)  # root may write anywhere
    done = CliRunner().invoke(app, ["port", "tests.port.ports:perfect", "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_free_port_for_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_free(*_: object, **__: object) -> None:
        raise DistNetworkError("EADDRINUSE: no port is free")

    monkeypatch.setattr("conformance.launch.TCPStore", none_free)
    case = ["--level", "L4", "--case", "L4/muon/dion/2-S0", "--dtype", "float64"]
    target = ["--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, ["port", "conformance.mutants.gathering:adapter", *case, *target])
    assert done.exit_code == 2, done.output
    assert "the ranks cannot be started" in done.stderr
    assert "no port is free" in done.stderr
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there() -> None:
    done = CliRunner().invoke(app, ["port", "conformance.adapters.torch_muon:adapter", "--device", "cuda"])
    assert done.exit_code == 2
    assert "torch sees no GPU here" in done.stderr


def test_what_is_alike_is_told_once_and_what_is_open_with_its_reason() -> None:
    only = ["--level", "L1", "--case", "L1/muon/dion/*", "--dtype", "float64", "--dtype", "bfloat16"]
    done = CliRunner().invoke(app, ["port", "tests.port.ports:idle", *only])
    assert done.exit_code == 1
    assert re.search(
        r"fail: L1/muon/dion/\S+ on one device: update is off by .*\n    the case: .*\n    and \d\d more like it",
        done.output,
    )
    assert done.output.count("conformance port tests.port.ports:idle") < 8
    meshes = ["--level", "L4", "--case", "L4/muon/dion/8-S?", "--dtype", "float64"]
    done = CliRunner().invoke(app, ["port", "conformance.mutants.gathering:adapter", *meshes])
    assert done.exit_code == 2
    assert "skip: L4/muon/dion/8-S0@float64 and 1 more: needs 8 ranks; run it with --nproc 8" in done.output


def test_of_what_is_alike_an_ordinary_case_is_shown() -> None:
    def verdict(case: str, error: float) -> Verdict:
        said = f"update is off by {error}"
        return Verdict(
            case, "L1", "muon", "dion", "float32", FAIL, message=said, errors={"update": (error, 1.0)}
        )

    names = ("13x10-rank-deficient", "7x1-warm", "8x24-warm", "24x8-fresh", "8x24-cautious-fresh")
    verdicts = [verdict(f"L1/muon/dion/{name}", 9.0 - index) for index, name in enumerate(names)]
    ((shown, others),) = alike(verdicts)
    assert shown.case == "L1/muon/dion/8x24-warm"
    assert len(others) == 4
    ((shown, _),) = alike(verdicts[:2])
    assert shown.case == "L1/muon/dion/13x10-rank-deficient"


def test_a_pass_in_bfloat16_alone_says_how_much_that_is() -> None:
    one = ["--level", "L1", "--case", "L1/muon/torch/8x24-fresh"]
    done = CliRunner().invoke(app, ["port", "conformance.adapters.torch_muon:adapter", *one])
    assert done.exit_code == 0
    assert "bfloat16 leaves room" in done.output
    done = CliRunner().invoke(app, ["port", "tests.port.ports:perfect", *one])
    assert "bfloat16 leaves room" not in done.output


def test_the_command_without_its_libraries_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "conformance.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    assert "pip install '.[conformance]'" in capsys.readouterr().err


def test_what_is_acceptable_alone_is_a_pass() -> None:
    only = ["--level", "L1", "--case", "L1/muon/torch/8x8-nan", "--dtype", "bfloat16"]
    done = CliRunner().invoke(app, ["port", "conformance.adapters.torch_muon:adapter", *only])
    assert done.exit_code == 0, done.output
    assert "1 acceptable" in done.output


def test_meshes_that_match_nothing_are_no_pass() -> None:
    done = CliRunner().invoke(app, ["meshes", "--case", "no/such/case"])
    assert done.exit_code == 2
    assert "--case 'no/such/case' matches no case of L3, L4; an id is like L3/" in done.stderr
    assert "nothing was run" not in done.output


def test_a_file_that_hides_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conformance.py").write_text("adapter = None\n")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["port", "conformance:adapter"])
    assert done.exit_code == 2
    assert f"{tmp_path / 'conformance.py'} hides the package 'conformance'" in done.stderr


def run_pytest(*arguments: str, cwd: Path) -> str:
    """What pytest in a process of its own prints."""
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=170)
    return done.stdout + done.stderr


def test_the_plugin_runs_the_same_selection_in_parallel(tmp_path: Path) -> None:
    (tmp_path / "xfail").write_text(
        "*7x1-warm*  # broken there\nL2/muon/*  # of another run\nL1/dion3/*  # likewise\n"
    )
    (tmp_path / "skip").write_text("*1x7-warm*  # not today\n")
    (tmp_path / "test_it.py").write_text("def test_conformance(conformance_case):\n    conformance_case()\n")
    arguments = ["--port", "tests.port.ports:nan", "--port-level", "L1", "--port-dtype", "float64"]
    arguments += ["--port-case", "L1/muon/dion/*-warm", "--port-skip", str(tmp_path / "skip")]
    arguments += ["-c", os.devnull, "--rootdir", str(tmp_path)]

    def pytest_run(*more: str) -> str:
        return run_pytest(*arguments, *more, cwd=ROOT)

    said = pytest_run("-n", "2", "--port-xfail", str(tmp_path / "xfail"), str(tmp_path / "test_it.py"))
    assert re.search(r"\d+ passed, 1 skipped, 1 xfailed", said), said
    assert "test_conformance[L1/muon/dion/8x8-warm@float64]" in said
    said = pytest_run("--pyargs", "conformance.port.suite", "--port-case", "L1/muon/dion/7x1-warm")
    assert "1 failed" in said, said
    assert "NaN or infinite" in said
    assert "conformance: broken: nan" in said


def test_the_plugin_runs_the_convergence_gate(tmp_path: Path) -> None:
    arguments = ["--pyargs", "conformance.port.suite", "--port", "tests.port.ports:half_steps"]
    arguments += ["--port-level", "L4-L5", "--port-case", "L5/muon/facts"]
    out = run_pytest(*arguments, cwd=tmp_path)
    alone = "conformance port tests.port.ports:half_steps --level L5 --case L5/muon/facts"
    for said in (
        "FAILED",
        "test_port[L5/muon/facts@float64]",
        "must lie in",
        f"run it alone: {alone}",
        "1 failed",
    ):
        assert said in out, out


def test_the_plugin_runs_meshes_too(tmp_path: Path) -> None:
    (tmp_path / "xfail").write_text("L4/muon/dion/4-S0  # rank two raises there\n")
    (tmp_path / "test_it.py").write_text("def test_conformance(conformance_case):\n    conformance_case()\n")
    arguments = ["--port", "tests.port.ports:raises_on_ranks", "--port-level", "L3-L4"]
    arguments += ["--port-case", "L4/muon/dion/[248]-S0", "--port-xfail", str(tmp_path / "xfail")]
    out = run_pytest(*arguments, cwd=tmp_path)
    assert "1 passed, 1 skipped, 1 xfailed" in out, out
    assert "needs 8 ranks" in out
    assert "PASSED test_it.py::test_conformance[L4/muon/dion/2-S0@float64]" in out


@pytest.mark.parametrize(
    "more", [["--port", "no.such:adapter"], ["--port", "tests.port.ports:perfect", "--port-level", "L8"]]
)
def test_the_plugin_refuses_with_one_line(more: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
        "--pyargs",
        "conformance.port.suite",
    ]
    done = subprocess.run(
        [*command, *more],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 4
    assert re.search(r"no\.such cannot be imported|'L8' is no level", done.stderr + done.stdout)
    assert "Traceback" not in done.stderr
