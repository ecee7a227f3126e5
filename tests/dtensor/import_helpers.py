"""Runs of torch.optim.Muon and torch.optim.AdamW, and the optimizer here that takes their state."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dion_dtensor import Muon, import_state_dict, param_groups
from dion_dtensor.optimizer import OrthonormalOptimizer
from tests.dtensor.small import Small, backward

TORCH_MUON: dict[str, Any] = {
    "momentum": "ema",
    "nesterov": True,
    "polynomial": "keller",
    "epsilon": 1e-7,
    "epsilon_rule": "clamp",
    "scale": "keller",
}
TORCH_ADAMW: dict[str, Any] = {"betas": (0.9, 0.999)}
MATRICES = ("up.weight", "down.weight")
Saved = dict[str, Any]


def theirs(model: nn.Module, named: bool = False, **options: Any) -> list[Any]:
    """torch.optim.Muon and AdamW as its documentation has them."""
    parts: list[list[Any]] = [[], []]
    for name, parameter in model.named_parameters():
        parts[name not in MATRICES].append((name, parameter) if named else parameter)
    return [
        torch.optim.Muon(parts[0], **{"lr": 0.02, "weight_decay": 0.1} | options),
        torch.optim.AdamW(parts[1], lr=3e-3, weight_decay=0.01),
    ]


def ours(model: nn.Module, named: bool = True, **options: Any) -> Muon:
    groups = param_groups(model)
    for group in groups:
        if group["algorithm"] == "adamw":
            group |= {"lr": 3e-3, "weight_decay": 0.01, **TORCH_ADAMW}
        if not named:
            group["params"] = [parameter for _, parameter in group["params"]]
    settings = {"lr": 0.02, "weight_decay": 0.1, "compile": False, **TORCH_MUON}
    return Muon(groups, **settings | options)


def run(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[Any],
    steps: range,
) -> list[Tensor]:
    losses = []
    for step in steps:
        model.zero_grad()
        losses.append(backward(model, step))
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    return losses


def decay(optimizer: torch.optim.Optimizer, done: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule after so many steps."""
    if done:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step, last_epoch=done - 1)


def trained(named: bool = False, steps: int = 2, **options: Any) -> tuple[Small, list[Saved]]:
    model = Small(torch.float64)
    optimizers = theirs(model, named, **options)
    run(model, optimizers, [], range(steps))
    return model, [optimizer.state_dict() for optimizer in optimizers]


def states(optimizer: OrthonormalOptimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}


def filled(optimizer: OrthonormalOptimizer, saved: list[Saved], model: nn.Module, **options: Any) -> None:
    """Load ``saved``, whose parameters by name hold what ``model``'s names say (see :func:`marked`)."""
    optimizer.load_state_dict(import_state_dict(optimizer, *saved, **options))
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert key == "step" or torch.equal(value, torch.full_like(value, mark(name))), (name, key)


def mark(name: str) -> float:
    return float(sum(map(ord, name)))


def marked(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[Saved]:
    """State dicts in which each tensor is filled with a number that belongs to its parameter's name."""
    run(model, optimizers, [], range(1))
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if key != "step":
                    value.fill_(mark(name))
    return [optimizer.state_dict() for optimizer in optimizers]


def float64_newton_schulz() -> AbstractContextManager[Any]:
    """torch's Muon casts to bfloat16 by a method, and divides what that gives in place."""
    return mock.patch.object(Tensor, "bfloat16", Tensor.clone)
