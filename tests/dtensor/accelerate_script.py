"""Two processes train by Accelerate, which shards the model after the optimizer was made, saves, and goes on."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import load_fsdp_optimizer, save_fsdp_optimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dion_dtensor import Dion, Muon, audit, param_groups
from tests.dtensor.split_programs import whole


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 10), nn.ReLU(), nn.Linear(10, 6))
    return nn.Sequential(*layers).double()


def make_optimizer(model: nn.Module, algorithm: str) -> torch.optim.Optimizer:
    groups = param_groups(model, algorithm, lr=0.02)
    return (Dion if algorithm == "dion" else Muon)(groups, compile=False)


def prepared(algorithm: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """By Accelerate, whose FSDP refuses CPUs: it is told that it is asked for."""
    model = make_model(seed)
    with mock.patch.object(Accelerator, "is_fsdp2", True):
        model, optimizer = accelerator.prepare(model, make_optimizer(model, algorithm))
    assert all("S(0)" in row.layout for row in audit(optimizer.optimizer).rows)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> list[torch.Tensor]:
    for step in range(first, first + 2):
        source = torch.Generator().manual_seed(2 * step + accelerator.process_index)
        inputs = torch.randn(8, 6, generator=source, dtype=torch.float64)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(parameter.detach()) for parameter in model.parameters()]


algorithm, folder = sys.argv[1:]
accelerator = Accelerator(cpu=True)
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1)
accelerator.state.fsdp_plugin = plugin

model, optimizer = prepared(algorithm)
by_hand = make_model()
fully_shard(by_hand, mesh=init_device_mesh("cpu", (2,)))
expected = make_optimizer(by_hand, algorithm)
pairs = zip(train(model, optimizer, 0), train(by_hand, expected, 0), strict=True)
assert all(torch.equal(*pair) for pair in pairs), "another step than that of shards made by hand"

save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
again, other = prepared(algorithm, seed=1)
load_fsdp_optimizer(plugin, accelerator, other, again, folder)
with torch.no_grad():
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        ours.copy_(theirs)
pairs = zip(train(again, other, 2), train(model, optimizer, 2), strict=True)
assert all(torch.equal(*pair) for pair in pairs), "another step after a load"
print("alike", flush=True)
accelerator.end_training()
