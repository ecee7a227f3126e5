"""The ready-made wrappers: they parse, and what they call exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from conformance.cli import app

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "ci" / "examples"
OPTIONS = set(re.findall(r"^        (--\w+)\)", (ROOT / "ci" / "gpu").read_text(), flags=re.MULTILINE))


def _commands(line: str) -> list[str]:
    """The words of a command, with what a workflow or a shell would put in."""
    return shlex.split(re.sub(r"\$\{\{.*?\}\}|\$\w+", "8", line))


def _gpu_options(line: str) -> list[str]:
    words = _commands(line.partition("ci/gpu")[2])
    return [word for word in words if word.startswith("--")]


def _steps(name: str) -> list[dict[str, Any]]:
    workflow = yaml.safe_load((EXAMPLES / name).read_text())
    assert workflow[True]  # YAML reads `on` as true
    (job,) = workflow["jobs"].values()
    steps: list[dict[str, Any]] = job["steps"]
    return steps


def test_the_gpu_workflow_calls_the_command_for_each_number_of_gpus() -> None:
    (line,) = [step["run"] for step in _steps("github-gpu.yml") if "run" in step]
    assert set(_gpu_options(line)) == {"--nproc"} <= OPTIONS
    workflow = yaml.safe_load((EXAMPLES / "github-gpu.yml").read_text())
    assert workflow["jobs"]["meshes"]["strategy"]["matrix"]["gpus"] == [1, 2, 4, 8]
    # The report is where the command puts it by default.
    (kept,) = [step["with"]["path"] for step in _steps("github-gpu.yml") if "upload" in step.get("uses", "")]
    assert f"report={kept}" in (ROOT / "ci" / "gpu").read_text()


def test_the_port_workflow_runs_as_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a repository with nothing but a port: no file of known failures."""
    monkeypatch.chdir(tmp_path)
    lines = [step["run"] for step in _steps("github-port.yml") if "run" in step]
    (line,) = [line for line in lines if "conformance port" in line]
    words = shlex.split(line.replace("\\\n", " "), comments=True)
    assert words[:2] == ["conformance", "port"]
    # No such adapter: everything before it was understood.
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 2
    assert "my_port.adapter cannot be imported" in done.stderr
    assert "No such option" not in done.stderr


def test_the_kubernetes_job_asks_for_the_gpus_that_it_uses() -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes-gpu.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    shell, flag, script = container["command"]
    assert (shell, flag) == ("bash", "-c")
    subprocess.run(["bash", "-n", "-c", script], check=True)
    words = _commands(script.partition("ci/gpu")[2])
    gpus = str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert words == ["--nproc", gpus, "--report", "/report"]
    (kept,) = [one["name"] for one in spec["volumes"] if "persistentVolumeClaim" in one]
    assert {"name": kept, "mountPath": "/report"} in container["volumeMounts"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in spec["volumes"]}


@pytest.mark.slow
def test_the_command_for_gpus_runs_without_them(tmp_path: Path) -> None:
    options = ["--backend", "gloo", "--nproc", "2", "--report", str(tmp_path), "--case", "L4/muon/*/2-S0*"]
    command = ["nice", str(ROOT / "ci" / "gpu"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ci/gpu: pass (2 ranks, gloo)" in done.stdout
    written = {"vectors", "gloo", "gloo-compiled"}
    assert {f"{name}.{kind}" for name in written for kind in ("json", "xml", "html")} <= set(
        os.listdir(tmp_path)
    )
    compiled = json.loads((tmp_path / "gloo-compiled.json").read_text())
    assert compiled["verdicts"]
    assert {one["status"] for one in compiled["verdicts"]} <= {"pass", "not claimed"}


def test_the_slurm_file_joins_the_nodes(tmp_path: Path) -> None:
    repository, tools = tmp_path / "repository", tmp_path / "tools"
    (repository / "ci").mkdir(parents=True)
    tools.mkdir()

    def script(path: Path, text: str) -> None:
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    script(repository / "ci" / "environment", "setup_environment() { echo set up for $1; }")
    script(
        repository / "ci" / "gpu",
        'echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT in $TMPDIR: $*; ${SLURM_PROCID-none}"',
    )
    script(tools / "scontrol", "printf 'first\\nsecond\\n'")
    script(
        tools / "srun",
        'shift; for id in 0 1; do SLURM_NODEID=$id SLURM_PROCID=$id SLURM_STEP_ID=7 SLURM_GPUS_ON_NODE=4 "$@"; done',
    )
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_SUBMIT_DIR": str(repository),
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    file = EXAMPLES / "slurm-gpu.sbatch"
    done = subprocess.run(["bash", str(file)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    folder = repository / "report" / "tmp"
    assert done.stdout.splitlines() == [
        "set up for conformance",
        *(f"{node} of 2 at first:29500 in {folder}: --nproc 4; none" for node in (0, 1)),
    ]
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", file.read_text(), flags=re.MULTILINE))
    assert directives["ntasks-per-node"] == "1"  # torchrun starts the ranks
