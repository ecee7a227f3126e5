"""microsoft/dion's Muon, NorMuon, Dion, Dion2 and NorDion2, when its package `dion` is on the path."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_optimizer import Named, TorchOptimizerAdapter, eagerly

with mock.patch("torch.compile", eagerly):  # the cases have many small shapes
    import dion

SCALES = {"spectral_norm": "spectral_norm", "moonlight": "rms_norm", None: None}
CLASSES = {"muon": "Muon", "normuon": "NorMuon", "dion": "Dion", "dion2": "Dion2", "dion3": "NorDion2"}
OWN = {"muon": "muon", "normuon": "normuon", "dion": "dion", "dion2": "dion2", "dion3": "nordion2"}


def build(params: Named, spec: Spec) -> torch.optim.Optimizer:
    """From a case's hyperparameters."""
    hyper, algorithm = spec.hyper, spec.algorithm
    parameters = [parameter for _, parameter in params]
    options: dict[str, Any] = {key: hyper[key] for key in ("lr", "weight_decay", "epsilon")}
    if algorithm == "dion":
        options |= {"mu": hyper["mu"], "rank_fraction": hyper["rank_fraction"], "qr_method": "rcqr"}
        options["rank_multiple_of"] = hyper["rank_multiple"]
    else:
        options |= _mesh(parameters[0]) | {
            "adjust_lr": SCALES[hyper["scale"]],
            "flatten": len(spec.shape) > 3,
        }
        options["use_polar_express"] = hyper.get("polynomial_name") == "polar_express"
        options["ef_decay" if algorithm == "dion2" else "mu"] = hyper["mu"]
        if algorithm in ("dion2", "dion3"):
            options |= {"fraction": hyper["fraction"], "selection_scope": "global"}
        if algorithm in ("normuon", "dion3"):
            options["muon_beta2"] = hyper["beta2"]
        if algorithm in ("muon", "normuon"):
            options |= {"nesterov": hyper["nesterov"], "cautious_wd": hyper["cautious"]}
    optimizer: Any = getattr(dion, CLASSES[algorithm])(parameters, **options)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer._get_or_initialize_state(parameter, group if algorithm == "dion" else OWN[algorithm])
    made: torch.optim.Optimizer = optimizer
    return made


def _mesh(parameter: Tensor) -> dict[str, Any]:
    """The one axis that its documentation asks for: that over which parameters are sharded."""
    if not isinstance(parameter, DTensor):
        return {}
    mesh = parameter.device_mesh
    axes = [mesh] if mesh.ndim == 1 else [mesh[name] for name in mesh.mesh_dim_names or ()]
    sharded = [axis for axis, laid in zip(axes, parameter.placements, strict=True) if laid.is_shard()]
    return {"distributed_mesh": (sharded or axes)[0]}


CAPABILITIES = Capabilities(
    name="microsoft/dion",
    algorithms={
        "muon": ("dion", "dion-you", "dion-unscaled"),
        "normuon": ("dion",),
        "dion": ("dion",),
        "dion2": ("dion",),
        "dion3": ("dion",),
    },
    levels=("L1", "L2", "L5"),
    dtypes=("bfloat16",),
    features=("state", "split:Flatten", "split:Experts", "schedule:lr", "schedule:mu"),
    distribution="dion",
)
STATE = {"momentum": "momentum", "Q": "Q", "variance": "variance_neuron"}
adapter = TorchOptimizerAdapter(CAPABILITIES, build, state=STATE, hyper={"mu": ("mu", "ef_decay")})
