"""`torch.optim.Muon`: its polynomial runs in bfloat16 whatever the parameter's dtype."""

from __future__ import annotations

import torch

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_optimizer import Named, TorchOptimizerAdapter


def build(params: Named, spec: Spec) -> torch.optim.Optimizer:
    """From a case's hyperparameters."""
    hyper = spec.hyper
    a, b, c = hyper["polynomial"][0]
    return torch.optim.Muon(
        [parameter for _, parameter in params],
        lr=hyper["lr"],
        weight_decay=hyper["weight_decay"],
        momentum=hyper["mu"],
        nesterov=hyper["nesterov"],
        ns_coefficients=(a, b, c),
        ns_steps=len(hyper["polynomial"]),
        eps=hyper["epsilon"],
        adjust_lr_fn="match_rms_adamw" if hyper["scale"] == "moonlight" else "original",
    )


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
