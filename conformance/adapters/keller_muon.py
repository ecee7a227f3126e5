"""KellerJordan/Muon on one device, when its `muon.py` is on the path: always bfloat16, always Nesterov."""

from __future__ import annotations

import torch
from muon import SingleDeviceMuon

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_optimizer import Named, TorchOptimizerAdapter


def build(params: Named, spec: Spec) -> torch.optim.Optimizer:
    """From a case's hyperparameters."""
    hyper = spec.hyper
    optimizer: torch.optim.Optimizer = SingleDeviceMuon(
        [parameter for _, parameter in params],
        lr=hyper["lr"],
        weight_decay=hyper["weight_decay"],
        momentum=hyper["mu"],
    )
    return optimizer


adapter = TorchOptimizerAdapter(
    Capabilities(
        name="KellerJordan/Muon",
        algorithms={"muon": ("keller",)},
        dtypes=("bfloat16",),
        features=("state", "split:Experts", "split:Flatten", "schedule:lr", "schedule:mu"),
        distribution="muon",
    ),
    build,
    state={"momentum": "momentum_buffer"},
    hyper={"mu": "momentum"},
)
