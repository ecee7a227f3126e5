"""Under `torchrun` a case that hangs, raises or dies on one rank leaves the same report as on local ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

BEFORE, ITSELF, AFTER = (f"L4/muon/dion/{layout}" for layout in ("2-S0", "4-S0", "4-S1"))
SECONDS = 15


def launched(port: str, folder: Path, *cases: str) -> dict[str, dict[str, Any]]:
    """The verdicts in the report of four joined ranks that must have failed, by case."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
        "-m", "conformance.cli", "meshes", "--adapter", f"tests.port.ports:{port}", "--dtype", "float64",
        "--timeout", str(SECONDS), "--json", "report.json", "--junit", "report.xml", "--html", "report.html",
        "--save", "results.safetensors", *(word for case in cases for word in ("--case", case)),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout
    data = json.loads((folder / "report.json").read_text())
    assert data["passed"] is False
    return {one["case"]: one for one in data["verdicts"]}


def test_a_hang_leaves_all_files_with_the_bucket_of_every_rank(tmp_path: Path) -> None:
    found = launched("hangs_in_our_bucket", tmp_path, BEFORE, ITSELF, AFTER)
    assert [found[case]["status"] for case in (BEFORE, ITSELF, AFTER)] == ["pass", "error", "error"]
    bucket = "bucket of blocks_0_weight, blocks_1_weight, blocks_2_weight"
    waits = f"in the collective '_c10d_functional.wait_tensor' of dion_dtensor.alltoall.finish, {bucket}"
    others = "; ".join(f"rank {rank} hung for {SECONDS} s {waits}" for rank in (0, 1, 3))
    message = f"rank 2 hung for {SECONDS} s in tests.port.ports.<lambda>, {bucket}; the others waited for it: {others}"
    assert found[ITSELF]["message"] == message
    assert found[AFTER]["message"] == f"not run: the ranks ended in {ITSELF}"
    root = ET.parse(tmp_path / "report.xml").getroot()
    assert [len(list(root.iter(kind))) for kind in ("testcase", "error")] == [3, 2]
    page = (tmp_path / "report.html").read_text()
    assert "rank 2 hung" in page
    assert f"not run: the ranks ended in {ITSELF}" in page
    with safe_open(tmp_path / "results.safetensors", "pt") as kept:
        names = list(kept.keys())
    assert names
    assert all(name.startswith(BEFORE) for name in names)


def test_a_hang_of_the_rank_that_writes_the_report_is_in_it(tmp_path: Path) -> None:
    message = launched("hangs_on_rank_zero", tmp_path, ITSELF)[ITSELF]["message"]
    culprit, _, waiting = message.partition("; the others waited for it: ")
    assert culprit == f"rank 0 hung for {SECONDS} s in tests.port.ports.misbehave"
    assert [f"rank {rank} hung" in waiting for rank in range(4)] == [False, True, True, True]
    assert waiting.count("in the collective 'full_tensor' of conformance.mutants.gathering.") == 3


@pytest.mark.parametrize(
    ("port", "message"),
    [
        ("raises_on_ranks", "rank 2 raised ArithmeticError: on rank two alone"),
        ("dies_on_ranks", "Connection (closed|reset) by peer|was told to end by its launcher"),
    ],
)
def test_an_error_or_a_death_of_a_rank_leaves_the_report(port: str, message: str, tmp_path: Path) -> None:
    found = launched(port, tmp_path, BEFORE, ITSELF, AFTER)
    assert [found[case]["status"] for case in (BEFORE, ITSELF, AFTER)] == ["pass", "error", "error"]
    assert re.search(message, found[ITSELF]["message"])
    assert found[AFTER]["message"] == f"not run: the ranks ended in {ITSELF}"
