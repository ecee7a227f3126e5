"""`pytorch_optimizer.Muon`: bfloat16 whatever the parameter's dtype, epsilon fixed at 1e-7 as a clamp."""

from __future__ import annotations

import torch
from pytorch_optimizer import Muon

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_optimizer import Named, TorchOptimizerAdapter


def build(params: Named, spec: Spec) -> torch.optim.Optimizer:
    """From a case's hyperparameters."""
    hyper = spec.hyper
    optimizer: torch.optim.Optimizer = Muon(
        [{"params": [parameter for _, parameter in params], "use_muon": True}],
        lr=hyper["lr"],
        momentum=hyper["mu"],
        weight_decay=hyper["weight_decay"],
        nesterov=hyper["nesterov"],
        ns_steps=len(hyper["polynomial"]),
        ns_coeffs=[tuple(triple) for triple in hyper["polynomial"]],
        use_adjusted_lr=hyper["scale"] == "moonlight",
    )
    return optimizer


adapter = TorchOptimizerAdapter(
    Capabilities(
        name="pytorch-optimizer",
        algorithms={"muon": ("torch", "torch-match-rms")},
        dtypes=("bfloat16",),
        features=("state", "split:Flatten", "schedule:lr", "schedule:mu"),
        distribution="pytorch-optimizer",
    ),
    build,
    state={"momentum": "momentum_buffer"},
    hyper={"mu": "momentum"},
)
