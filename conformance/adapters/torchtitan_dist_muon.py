"""torchtitan's DistMuon on meshes, when a folder that holds its package `flex_shard` is on the path.

It takes CUDA devices alone. What it plans, packs and sends does not depend on the device, so on CPUs its check of the
device is passed over, and streams and events, of which a CPU has none, do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from flex_shard import BucketConfig, ComputeLayout, Owned, _optimizer_reshard_runtime, build_dist_muon
from flex_shard.dist_muon import DistMuon, _zeropower_via_newtonschulz
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_muon import arguments, iteration
from conformance.adapters.torch_optimizer import Named, TorchOptimizerAdapter


class Nothing:
    """A stream or an event of a CPU, where all is done when a call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class TorchForItsRuntime:
    """The module `torch`, with streams for a CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def get_device_module(device: torch.device) -> Any:
        """That of the device, or what stands in for that of a CPU."""
        if device.type != "cpu":
            return torch.get_device_module(device)
        return SimpleNamespace(
            Stream=Nothing, Event=Nothing, stream=lambda _: nullcontext(), current_stream=lambda _: Nothing()
        )


def one_device(optimizer: DistMuon) -> torch.device:
    """In place of its check that this is a CUDA device."""
    device: torch.device = optimizer.param_groups[0]["params"][0].to_local().device
    return device


_optimizer_reshard_runtime.torch = TorchForItsRuntime()
DistMuon._validate_parameter_storage = one_device


def build(params: Named, spec: Spec) -> torch.optim.Optimizer:
    """From a case's hyperparameters; one rank of those that share a matrix owns it while it is orthonormalized."""
    made: torch.optim.Optimizer = build_dist_muon(
        [{"params": [p for _, p in params], "param_names": [name for name, _ in params]}],
        compute_sharding_by_fqn={name: _owned(parameter) for name, parameter in params},
        bucket_configs=[BucketConfig((name,), name) for name, _ in params],
        **arguments(spec.hyper),
    )
    return made


def orthonormalize(matrix: Tensor, hyper: Mapping[str, Any]) -> Tensor:
    """Its orthonormalizer, whose dtype is always bfloat16."""
    made: Tensor = _zeropower_via_newtonschulz(matrix, **iteration(hyper))
    return made.to(matrix.dtype)


def _owned(parameter: Tensor) -> ComputeLayout:
    """Owned along the axes that shard a parameter; along the first where none does."""
    assert isinstance(parameter, DTensor)
    names = parameter.device_mesh.mesh_dim_names or ()
    sharded = [
        name for name, placement in zip(names, parameter.placements, strict=True) if type(placement) is Shard
    ]
    return ComputeLayout({name: Owned() for name in sharded or names[:1]})


adapter = TorchOptimizerAdapter(
    Capabilities(
        name="torchtitan DistMuon",
        algorithms={"muon": ("torch",), "orthonormalize": ("keller",)},
        levels=("L0", "L3", "L4"),
        dtypes=("bfloat16",),
        features=("state",),
        distribution="torchtitan",
    ),
    build,
    state={"momentum": "momentum_buffer"},
    hyper={"mu": "momentum"},
    orthonormalize=orthonormalize,
)
