"""NVIDIA Emerging-Optimizers' Muon, Megatron's, on one device; `emerging_optimizers` has to be on the path."""

from __future__ import annotations

import torch
from emerging_optimizers.orthogonalized_optimizers.muon import Muon

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_optimizer import Named, TorchOptimizerAdapter

# Of the one dialect that is claimed.
SCALES, POLYNOMIALS = {"nvidia": "spectral"}, {"you": "quintic"}
PRECISIONS = {"float32": "highest", "bfloat16": "medium"}


def build(params: Named, spec: Spec) -> torch.optim.Optimizer:
    """From a case's hyperparameters."""
    hyper = spec.hyper
    optimizer: torch.optim.Optimizer = Muon(
        [parameter for _, parameter in params],
        lr=hyper["lr"],
        momentum=hyper["mu"],
        weight_decay=hyper["weight_decay"],
        nesterov=hyper["nesterov"],
        fp32_matmul_prec=PRECISIONS[spec.compute_dtype],
        coefficient_type=POLYNOMIALS[hyper["polynomial_name"]],
        num_ns_steps=len(hyper["polynomial"]),
        scale_mode=SCALES[hyper["scale"]],
    )
    return optimizer


adapter = TorchOptimizerAdapter(
    Capabilities(
        name="NVIDIA Emerging-Optimizers",
        algorithms={"muon": ("nvidia",)},
        dtypes=("float32", "bfloat16"),
        features=("state", "schedule:lr", "schedule:mu"),
        distribution="emerging-optimizers",
    ),
    build,
    state={"momentum": "momentum_buffer"},
    hyper={"mu": "momentum"},
)
