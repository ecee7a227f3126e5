"""`timm.optim.muon.Muon` (pytorch-image-models): bfloat16 whatever the parameter's dtype, epsilon as a clamp."""

from __future__ import annotations

import torch
from timm.optim.muon import Muon

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_optimizer import Named, TorchOptimizerAdapter

SCALES = {"keller": "original", "moonlight": "match_rms_adamw", "spectral_norm": "rms_to_rms", None: None}


def build(params: Named, spec: Spec) -> torch.optim.Optimizer:
    """From a case's hyperparameters."""
    hyper = spec.hyper
    optimizer: torch.optim.Optimizer = Muon(
        [{"params": [parameter for _, parameter in params], "use_fallback": False}],
        lr=hyper["lr"],
        weight_decay=hyper["weight_decay"],
        momentum=hyper["mu"],
        nesterov=hyper["nesterov"],
        ns_steps=len(hyper["polynomial"]),
        ns_coefficients=[tuple(triple) for triple in hyper["polynomial"]],
        eps=hyper["epsilon"],
        safety_factor=hyper["norm_factor"] or 1.0,
        adjust_lr_fn=SCALES[hyper["scale"]],
    )
    return optimizer


adapter = TorchOptimizerAdapter(
    Capabilities(
        name="timm",
        algorithms={"muon": ("torch", "torch-match-rms")},
        dtypes=("bfloat16",),
        features=("state", "split:Flatten", "schedule:lr", "schedule:mu"),
        distribution="timm",
    ),
    build,
    state={"momentum": "momentum_buffer"},
    hyper={"mu": "momentum"},
)
