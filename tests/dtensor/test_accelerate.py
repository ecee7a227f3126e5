"""Hugging Face's Accelerate itself, on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_accelerate_may_shard_the_model_after_the_optimizer_was_made(algorithm: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = ("-m", "tests.dtensor.accelerate_script", algorithm, str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, *script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("alike") == 2, done.stderr[-5000:]
