"""What ranks run: the same steps on a layout, and on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conformance.process_groups import whole
from dion_dtensor import Dion, Dion2, Dion3, Muon, NorMuon
from tests.dtensor.layouts import Layout, build_mesh, lay_out

# Uneven on every axis, two orientations, more and fewer matrices than ranks, dims smaller than an axis.
SHAPES = (
    (13, 10),
    (13, 10),
    (13, 10),
    (10, 13),
    (5, 12),
    (5, 12),
    (9, 9),
    (1, 7),
    (7, 1),
    (3, 3),
    (16, 8),
    (16, 8),
)


OPTIMIZERS: dict[str, Any] = {
    "muon": Muon,
    "normuon": NorMuon,
    "dion": Dion,
    "orth_dion": Dion,
    "dion2": Dion2,
    "dion3": Dion3,
    "adamw": Muon,
    "lion": Muon,
}
OWN: dict[str, dict[str, Any]] = {
    "orth_dion": {"right_factor": "orthonormalize"},
    # Where rows are sharded, the harder way, which "auto" does not take for some of such small matrices.
    "dion2": {"fraction": 0.4, "path": "exchange"},
    "dion3": {"fraction": 0.4, "path": "exchange"},
}

Problem = tuple[list[Tensor], list[list[Tensor]]]


def problem(shapes: Sequence[tuple[int, ...]], steps: int, dtype: torch.dtype = torch.float64) -> Problem:
    """Weights, and gradients by step; the same on every rank."""
    generator = torch.Generator().manual_seed(7)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    return draw(), [draw() for _ in range(steps)]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor or DTensor, on every rank."""
    return whole(tensor)


def run_steps(
    name: str,
    layout: Layout | None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    steps: int = 2,
    dtype: torch.dtype = torch.float64,
    data: Problem | None = None,
    states: bool = True,
    split: str | None = None,
    flattened: bool = False,
    **options: Any,
) -> dict[str, list[Tensor]] | None:
    """Full weights and state after ``steps``; on one device if ``layout`` is None; None on ranks outside the mesh.

    ``flattened``: the mesh has been flattened too, all of it.
    """
    weights, gradients = data or problem(shapes, steps, dtype)
    mesh = None if layout is None else build_mesh(layout, flattened=flattened)
    if mesh is not None and mesh.get_coordinate() is None:
        return None

    def laid(tensor: Tensor) -> Tensor:
        return tensor.clone() if mesh is None or layout is None else lay_out(tensor, layout, mesh)

    parameters = [torch.nn.Parameter(laid(weight)) for weight in weights]
    named = [(f"w{index}", parameter) for index, parameter in enumerate(parameters)]
    group = {"params": named, "algorithm": "dion" if name == "orth_dion" else name}
    if split is not None:
        group["split"] = split
    optimizer = OPTIMIZERS[name]([group], lr=0.05, weight_decay=0.1, **(OWN.get(name, {}) | options))
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = laid(gradient)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    result = {"weight": [full(parameter) for parameter in parameters]}
    for key in optimizer.state[parameters[0]] if states else ():
        result[key] = [full(optimizer.state[parameter][key]) for parameter in parameters]
    return result


def run_steps_with(
    name: str, layout: Layout | None, options: dict[str, Any]
) -> dict[str, list[Tensor]] | None:
    """``run_steps`` with its options in a dict, as it travels through a pipe."""
    return run_steps(name, layout, **options)
