"""A small model, and how to train it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dion_dtensor import param_groups
from dion_dtensor.optimizer import OrthonormalOptimizer
from tests.dtensor.programs import OPTIMIZERS, OWN

RULES = ["muon", "normuon", "dion", "orth_dion", "dion2", "dion3", "adamw", "lion"]
MATRIX_RULES = RULES[:6]


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6, dtype=dtype)
        self.up = nn.Linear(6, 12, dtype=dtype)
        self.norm = nn.LayerNorm(12, dtype=dtype)
        self.down = nn.Linear(12, 6, bias=False, dtype=dtype)
        self.lm_head = nn.Linear(6, 11, bias=False, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.down(self.norm(self.up(self.embedding(tokens)).relu())))


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (4, 9), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[Tensor]:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def optimizer_of(model: nn.Module, algorithm: str = "muon", **options: Any) -> OrthonormalOptimizer:
    groups = param_groups(model, algorithm="dion" if algorithm == "orth_dion" else algorithm, lr=0.02)
    made: OrthonormalOptimizer = OPTIMIZERS[algorithm](
        groups, **{"compile": False} | OWN.get(algorithm, {}) | options
    )
    return made


def make(algorithm: str, named: list[tuple[str, nn.Parameter]], **options: Any) -> OrthonormalOptimizer:
    """An optimizer of parameters that all follow ``algorithm``."""
    group = {"params": named, "algorithm": "dion" if algorithm == "orth_dion" else algorithm}
    made: OrthonormalOptimizer = OPTIMIZERS[algorithm](
        [group], **{"compile": False} | OWN.get(algorithm, {}) | options
    )
    return made
