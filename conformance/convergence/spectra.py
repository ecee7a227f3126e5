"""Singular values of one update by different rules, after the same gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conformance.convergence.drivers import Port
from conformance.convergence.training import Run, Trainer
from conformance.convergence.workloads import Spec
from dion_ref import ALGORITHMS
from dion_ref.linalg import polar_factor

MATRICES = {"gpt": "blocks.0.mlp.up.weight", "teacher": "2.weight"}
"""The matrix that is looked at, by the kind of the model."""
STEPS = 60
RULES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Muon, Polar Express": ("muon", {"polynomial": "polar_express"}),
    "Muon, Keller's polynomial": ("muon", {"polynomial": "keller"}),
    "Dion 1": ("dion", {"rank_fraction": 1.0}),
    "Dion 1/4": ("dion", {"rank_fraction": 0.25}),
    "Orth-Dion 1/4": ("orth_dion", {"rank_fraction": 0.25}),
    "Dion2 1/4": ("dion2", {"fraction": 0.25}),
}


def singular_values(port: Port, spec: Spec, batch: int, lr: float) -> dict[str, list[float]]:
    """Singular values of the update of one MLP matrix, largest first.

    The model is trained by Muon; the float64 oracle of each rule is fed the same gradients of the matrix.  The update
    is without learning rate and scale, so the polar factor of Muon's momentum has ones only.

    Args:
        port: trains the model.
        spec: of a kind in MATRICES.
        batch: of a step.
        lr: Muon's.

    Returns:
        By name in RULES, and "exact polar factor".
    """
    trainer = Trainer(Run(spec, "muon", (), batch, STEPS, lr, 0), port)
    gradients: list[Tensor] = []
    name_of_matrix = MATRICES[spec.kind]
    parameter = dict(trainer.model.named_parameters())[name_of_matrix]

    def keep(gradient: Tensor) -> None:
        gradients.append(gradient.double().clone())

    hook = parameter.register_hook(keep)  # type: ignore[no-untyped-call]
    for number in range(STEPS):
        trainer.step(number)
    hook.remove()
    found = {}
    for name, (algorithm, hyper) in RULES.items():
        rule = ALGORITHMS[algorithm]
        chosen = rule.Hyper(lr=1.0, weight_decay=0.0, scale=None, **hyper)
        weight = torch.zeros(parameter.shape, dtype=torch.float64)
        state = rule.init(weight, chosen, name=name_of_matrix)
        for gradient in gradients:
            before = weight
            weight, state = rule.step(weight, gradient, state, chosen)
        found[name] = torch.linalg.svdvals(before - weight).tolist()
        if algorithm == "muon":
            found["exact polar factor"] = torch.linalg.svdvals(polar_factor(state.momentum)).tolist()
    return found
