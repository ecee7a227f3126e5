"""`torch.optim.Muon`: its polynomial runs in bfloat16 whatever the parameter's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_optimizer import Named, TorchOptimizerAdapter


def iteration(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the orthonormalization, from a case's hyperparameters."""
    a, b, c = hyper["polynomial"][0]
    return {"ns_coefficients": (a, b, c), "ns_steps": len(hyper["polynomial"]), "eps": hyper["epsilon"]}


def arguments(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of torch.optim.Muon, and of what is called like it, from a case's hyperparameters."""
    return {
        "lr": hyper["lr"],
        "weight_decay": hyper["weight_decay"],
        "momentum": hyper["mu"],
        "nesterov": hyper["nesterov"],
        "adjust_lr_fn": "match_rms_adamw" if hyper["scale"] == "moonlight" else "original",
        **iteration(hyper),
    }


def build(params: Named, spec: Spec) -> torch.optim.Optimizer:
    """From a case's hyperparameters."""
    return torch.optim.Muon([parameter for _, parameter in params], **arguments(spec.hyper))


adapter = TorchOptimizerAdapter(
    Capabilities(
        name="torch.optim.Muon",
        algorithms={"muon": ("torch", "torch-match-rms")},
        dtypes=("bfloat16",),
        features=("state", "schedule:lr", "schedule:mu"),
        distribution="torch",
    ),
    build,
    state={"momentum": "momentum_buffer"},
    hyper={"mu": "momentum"},
)
