"""The samples and scripts of docs/training.md run as they stand, and its table of scales is what a step gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dion_dtensor import Dion, Dion2, Dion3, Muon, NorMuon, param_groups

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SCRIPTS = {match[1]: block for block in BLOCKS if (match := re.match(r"# (\w+\.py)\n", block))}
SAMPLES = [block for block in BLOCKS if block not in SCRIPTS.values()]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


# With gloo a process may abort as it ends (torch 2.14.1, with torch.optim.AdamW too); the script is done by then.
ABORTED = "terminate called without an active exception"


def run(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert result.returncode == 0 or ABORTED in result.stderr, result.stderr[-5000:]
    return result.stdout


def launched(folder: Path, script: str, *arguments: str) -> str:
    (folder / script).write_text(SCRIPTS[script])
    return run(folder, *LAUNCHER, script, *arguments)


def steps(printed: str) -> list[str]:
    return re.findall(r"^step .*$", printed, flags=re.MULTILINE)


def test_every_script_is_run_here() -> None:
    assert set(SCRIPTS) == {
        "train_fsdp.py",
        "train_ddp.py",
        "train_hf.py",
        "train_hf_fsdp.py",
        "titan.py",
        "my_rules.py",
        "memory.py",
    }
    assert len(SAMPLES) > 5


def test_the_memory_of_a_run_is_told_without_it(tmp_path: Path) -> None:
    (tmp_path / "memory.py").write_text(SCRIPTS["memory.py"])
    printed = run(tmp_path, "memory.py")
    assert re.search(r"Parameter: [0-9.]+ MiB", printed)
    assert re.search(r"Optstate: [0-9.]+ MiB", printed)


def test_the_samples_run_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "samples.py").write_text("\n".join(SAMPLES))
    printed = run(tmp_path, "samples.py")
    assert "orthonormalized" in printed
    assert "rms of the update" in printed


def test_a_resumed_run_under_fsdp2_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = steps(launched(tmp_path, "train_fsdp.py", "8", "whole"))
    first = steps(launched(tmp_path, "train_fsdp.py", "4", "parts"))
    second = steps(launched(tmp_path, "train_fsdp.py", "8", "parts"))
    assert len(whole) == 8
    assert first + second == whole
    losses = [float(line.split()[3]) for line in whole]
    assert losses[-1] < losses[0]


def test_replicas_of_ddp_share_the_work(tmp_path: Path) -> None:
    printed = launched(tmp_path, "train_ddp.py")
    assert len(steps(printed)) == 10
    assert set(re.findall(r"rank (\d) holds", printed)) == {"0", "1"}


def test_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    (tmp_path / "train_hf.py").write_text(SCRIPTS["train_hf.py"])
    assert "resumed" in run(tmp_path, "train_hf.py")


def test_hugging_face_trainer_that_makes_the_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    own = SCRIPTS["train_hf_fsdp.py"].replace("Muon(groups)", "Muon(groups, compile=False)")
    (tmp_path / "own_trainer.py").write_text(own)
    script = "from own_trainer import MuonTrainer\n" + SCRIPTS["train_hf.py"]
    given = "Trainer(model, options, train_dataset=data, optimizers=(optimizer, scheduler))"
    assert script.count(given) == 1
    (tmp_path / "train.py").write_text(
        script.replace(given, "MuonTrainer(model, options, train_dataset=data)")
    )
    assert "resumed" in run(tmp_path, "train.py")


# Of torchtitan, whose dependencies are many, what the script uses.
TITAN = """
import sys, types
from dataclasses import dataclass

import torch

class OptimizersContainer(torch.optim.Optimizer):
    @dataclass(kw_only=True, slots=True)
    class Config:
        implementation: str = "fused"

    def _validate_params(self, params):
        expected = {id(p) for part in self.model_parts for p in part.parameters() if p.requires_grad}
        assert expected == {id(p) for p in params}

    def _post_init(self, params):
        torch.optim.Optimizer.__init__(self, params, {})

for name in ("torchtitan", "torchtitan.components", "torchtitan.components.optimizer"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].OptimizersContainer = OptimizersContainer
"""
TITAN_STEP = """
layers = {"embedding": torch.nn.Embedding(9, 4), "up": torch.nn.Linear(4, 8), "norm": torch.nn.LayerNorm(8)}
last = {"down": torch.nn.Linear(8, 4), "norm": torch.nn.LayerNorm(4)}
parts = [torch.nn.ModuleDict(layers), torch.nn.ModuleDict(last)]
container = Optimizers(Optimizers.Config(compile=False), model_parts=parts)
for part, optimizer in zip(parts, container.optimizers, strict=True):
    for p in part.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in part.named_parameters())
    assert set(optimizer.state_dict()["state"]) == set(range(len(names)))
print("stepped", sum(map(len, container.optimizers[0].state.values())))
"""


def test_a_contender_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "my_rules.py").write_text(SCRIPTS["my_rules.py"])
    (tmp_path / "ask.py").write_text(
        "from conformance.convergence.studies import contender\n"
        "print(contender('my_rules:signed_muon').hyper)\n"
    )
    assert "(('mu', 0.9),)" in run(tmp_path, "ask.py")


def test_torchtitan_container(tmp_path: Path) -> None:
    (tmp_path / "titan.py").write_text(f"{TITAN}\n{SCRIPTS['titan.py']}\n{TITAN_STEP}")
    printed = run(tmp_path, "titan.py")
    assert re.search(r"up\.weight +muon", printed)
    assert re.search(r"embedding\.weight +adamw", printed)
    assert re.search(r"down\.weight +muon", printed)
    assert "stepped 13" in printed  # momentum of one matrix, and step and two moments of four others


SCALES = re.findall(
    r'^\| ("\w+"|None)(?: \(default\))? \| .* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$', PAGE, re.M
)


def test_the_table_has_every_scale() -> None:
    assert [row[0].strip('"') for row in SCALES] == ["spectral_norm", "keller", "moonlight", "nvidia", "None"]


@pytest.mark.parametrize("row", SCALES, ids=lambda row: row[0].strip('"'))
def test_a_step_changes_weights_by_what_the_table_says(row: tuple[str, ...]) -> None:
    scale = None if row[0] == "None" else row[0].strip('"')
    torch.manual_seed(0)
    for shape, shown in zip(((256, 256), (1024, 256), (256, 1024)), row[1:], strict=True):
        weight = torch.nn.Parameter(torch.zeros(shape))
        optimizer = Muon([("weight", weight)], lr=1.0, weight_decay=0.0, scale=scale, compile=False)
        weight.grad = torch.randn(shape)
        optimizer.step()
        size = weight.detach().square().mean().sqrt().item()
        assert size == pytest.approx(float(shown), rel=0.04)


@pytest.mark.parametrize(
    ("optimizer", "algorithm", "options", "size"),
    [
        (Muon, "adamw", {}, 8),
        (Muon, "muon", {}, 4),
        (NorMuon, "normuon", {}, 4 + 4 / 32),
        (Dion, "dion", {"rank_fraction": 0.25}, 4 + 4 * 8 / 64),
        (Dion2, "dion2", {}, 4),
        (Dion3, "dion3", {}, 4 + 4 / 32),
    ],
)
def test_state_takes_the_bytes_of_the_table(
    optimizer: Any, algorithm: str, options: dict[str, Any], size: float
) -> None:
    layer = torch.nn.Linear(32, 64, bias=False)
    made = optimizer(param_groups(layer, algorithm), compile=False, **options)
    state = {key: value for key, value in made.state[layer.weight].items() if key != "step"}
    assert sum(value.nbytes for value in state.values()) == size * layer.weight.numel()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", PAGE))))
def test_links_lead_somewhere(link: str) -> None:
    page, _, anchor = link.partition("#")
    text = (ROOT / "docs" / page).read_text() if page else PAGE
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert not anchor or anchor in slugs
