"""The adapter in docs/porting.md is run as it stands, on a Muon of twenty lines, by the command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conformance.vectors import load

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "porting.md").read_text()
PLAIN = """
import torch


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            mu, lr = group["momentum"], group["lr"]
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - mu)
                X = p.grad.lerp(buffer, mu)
                X = X / (X.norm() + 1e-7)
                for _ in range(5):
                    A = X @ X.mT
                    X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(X, alpha=lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)
"""


def run_port(folder: Path, muon: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 15
    package = folder / "my_port"
    package.mkdir()
    (package / "__init__.py").write_text(muon)
    (package / "adapter.py").write_text(blocks[0])
    command = re.search(r"^conformance port my_port.adapter:adapter$", PAGE, re.MULTILINE)
    assert command
    done = subprocess.run(
        [sys.executable, "-m", "conformance.cli", *command[0].split()[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=170,
    )
    return f"{done.stdout}{done.stderr}exit status {done.returncode}"


def test_a_plain_muon_passes_with_the_pages_adapter(tmp_path: Path) -> None:
    said = run_port(tmp_path, PLAIN)
    assert re.search(r"pass: \d\d pass, 2 acceptable, \d+ not claimed", said), said
    assert said.endswith("exit status 0")


def test_a_plain_muon_with_a_wrong_scale_fails_and_is_told_why(tmp_path: Path) -> None:
    said = run_port(
        tmp_path, PLAIN.replace("max(1, p.shape[0] / p.shape[1]) ** 0.5", "0.2 * max(p.shape) ** 0.5")
    )
    assert said.endswith("exit status 1")
    assert "matches torch-match-rms to" in said, said


def test_the_verdicts_are_those_on_the_vectors_of_now() -> None:
    table = (ROOT / "docs" / "ports.md").read_text()
    vectors = load()
    assert f"with vectors {vectors.version}, {len(vectors)} cases." in table
    assert f"a verdict on {len(vectors)} cases" in " ".join((ROOT / "README.md").read_text().split())


def test_every_option_on_the_page_exists() -> None:
    helps = subprocess.run(
        [sys.executable, "-m", "conformance.cli", "port", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    plugin = (ROOT / "conformance" / "plugin.py").read_text()
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE)) - {
        "--pyargs",
        "--port",
        "--index-url",
        "--no-deps",
    }:
        assert option in (plugin if option.startswith("--port-") else helps), option
