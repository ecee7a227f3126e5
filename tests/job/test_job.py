from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conformance import launch
from conformance.job.command import QUICK, run_job
from conformance.job.model import GPTShape, is_matrix, loss_of, make_model
from conformance.job.settings import Settings
from conformance.job.text import batch, read_text
from conformance.meshes import SIMULATED, Mesh, mesh_for
from tests.job import programs

TINY = replace(QUICK, optimizers=("muon",), shape=GPTShape(width=32, layers=1, length=16), meshes=())


def test_the_text_is_the_one_that_its_readme_names() -> None:
    text = read_text()
    assert text.dtype == torch.uint8
    assert text.numel() == 974_298
    assert bytes(text[:200].tolist()).startswith(b"Matthew 1\n\n1 The book of the generation of Jesus Christ")


def test_batches_are_the_same_for_all_and_new_at_every_step() -> None:
    text = read_text()
    inputs, targets = batch(text, 3, sequences=4, length=64)
    assert inputs.shape == targets.shape == (4, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, batch(text, 3, sequences=4, length=64)[0])
    assert not torch.equal(inputs, batch(text, 4, sequences=4, length=64)[0])
    with pytest.raises(ValueError, match="no sequence of 65"):
        batch(text[:64], 0, sequences=1, length=64)


def test_the_model_has_a_million_parameters_and_sixteen_matrices() -> None:
    model = make_model(GPTShape(), torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 861_312
    matrices = [name for name, parameter in model.named_parameters() if is_matrix(name)]
    assert len(matrices) == 16
    assert all(name.split(".")[-2] in ("qkv", "proj", "up", "down") for name in matrices)


def test_the_sharded_gradient_is_the_single_process_gradient() -> None:
    gathered, layouts, same = launch.run(programs.sharded_gradients, None, ranks=4)[0]
    assert same
    model = make_model(programs.SMALL, torch.float64)
    inputs, targets = batch(read_text(), 0, sequences=4, length=programs.SMALL.length)
    loss_of(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = torch.linalg.vector_norm(gathered[name] - parameter.grad)
        assert difference <= 1e-12 * torch.linalg.vector_norm(parameter.grad), name
    assert layouts["blocks.0.attention.qkv.weight"] == "fsdp:_S(0) tp:S(0)"
    assert layouts["blocks.0.mlp.down.weight"] == "fsdp:S(0) tp:S(1)"
    assert layouts["norm.weight"] == "fsdp:S(0)"


def test_a_small_job_passes_and_leaves_a_report(tmp_path: Path) -> None:
    settings = replace(TINY, optimizers=("adamw", "lion", "muon", "dion"))
    assert run_job(settings, tmp_path / "report", tmp_path / "results.json") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["passed"]
    assert [row["optimizer"] for row in results["rows"]] == ["adamw", "lion", "muon", "dion"]
    for row in results["rows"]:
        assert 0 <= row["largest_update_error"] <= row["bound"] <= 1e-10
        assert len(row["losses"]) == settings.steps
        assert row["layouts"]["fsdp:_S(0) tp:S(0)"] == 2
    page = (tmp_path / "report" / "index.html").read_text()
    assert "pass: 4 of 4 passed" in page


@pytest.mark.parametrize("mutation", [{"lr": 0.0201}, {"weight_decay": 0.011}])
def test_a_mutated_optimizer_fails_the_job(tmp_path: Path, mutation: dict[str, float]) -> None:
    assert run_job(replace(TINY, mutation=mutation), tmp_path / "report") == 1
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert not results["passed"]
    assert "update of blocks.0." in results["rows"][0]["why"]


def test_a_nan_gradient_stops_the_job_by_name_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = replace(TINY, nan_at=(2, "blocks.0.attention.qkv.weight"))
    assert run_job(settings, tmp_path / "report", tmp_path / "results.json") == 1
    out = capfd.readouterr().out
    assert "blocks.0.attention.qkv.weight" in out
    assert "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


def test_a_rank_killed_in_the_middle_of_the_job_ends_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "conformance.cli",
        "run",
        "--quick",
        "--optimizer",
        "muon",
        "--mesh",
        "none",
    ]
    command += ["--steps", "100000", "--report", str(tmp_path / "report")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ranks = _wait_for_ranks(job, 4)
    time.sleep(5)
    os.kill(ranks[-1], signal.SIGKILL)
    began = time.monotonic()
    out, _ = job.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert job.returncode == 1, out
    assert "was killed by SIGKILL" in out
    assert "stopped: rank " in out
    assert list(tmp_path.iterdir()) == []
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def _wait_for_ranks(job: subprocess.Popen[str], count: int) -> list[int]:
    """Process ids of the job's ranks: the grandchildren, once all are there."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        assert job.poll() is None, job.communicate()[0]
        for child in _children(job.pid):
            ranks = _children(child)
            if len(ranks) == count:
                return ranks
        time.sleep(0.1)
    raise AssertionError("the ranks never came")


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
def test_every_simulated_mesh_passes(tmp_path: Path) -> None:
    settings = replace(TINY, optimizers=("muon", "dion"), meshes=tuple(SIMULATED))
    assert run_job(settings, tmp_path / "report") == 0


def test_one_simulated_mesh_passes(tmp_path: Path) -> None:
    settings = replace(TINY, steps=1, meshes=("4x4x4",))
    assert run_job(settings, tmp_path / "report", tmp_path / "results.json") == 0
    kinds = [row["kind"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]]
    assert kinds == ["trained", "simulated"]


def test_the_mesh_of_any_number_of_ranks() -> None:
    assert mesh_for(4, 4) == Mesh((("fsdp", 2), ("tp", 2)))
    assert mesh_for(8, 4).sizes == (4, 2)
    assert mesh_for(3, 4).sizes == (3, 1)
    assert mesh_for(1, 4).sizes == (1, 1)
    assert Settings().ranks == 4
    assert max(mesh.ranks for mesh in SIMULATED.values()) == 64
    with pytest.raises(ValueError, match="at least one rank"):
        mesh_for(0, 4)
