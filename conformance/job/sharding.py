"""The model on a mesh: tensor parallelism, then FSDP2, as users of torch combine them."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from conformance.job.model import GPT, Block

PLAN = {
    "attention.qkv": ColwiseParallel(),
    "attention.proj": RowwiseParallel(),
    "mlp.up": ColwiseParallel(),
    "mlp.down": RowwiseParallel(),
}


def shard(model: GPT, mesh: DeviceMesh, compute: torch.dtype | None = None) -> GPT:
    """Shards `model` in place over a mesh with axes "fsdp" and "tp", and returns it.

    Colwise weights end up as (_StridedShard(0), Shard(0)), rowwise ones as (Shard(0), Shard(1)), all others as
    (Shard(0),) on the axis "fsdp" alone. `compute`: dtype of forward and backward (None: the parameters');
    gradients are reduced and kept in the parameters' dtype.
    """
    storage = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy()
    if compute is not None and compute != storage:
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=storage)
    for block in model.blocks:
        assert isinstance(block, Block)
        if mesh["tp"].size() > 1:
            parallelize_module(block, mesh["tp"], dict(PLAN))
        fully_shard(block, mesh=mesh["fsdp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["fsdp"], mp_policy=policy)
    return model


def layout(tensor: torch.Tensor) -> str:
    """Placements in short, an axis after the other: `fsdp:_S(0) tp:S(0)`; "local" for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return "local"
    names = tensor.device_mesh.mesh_dim_names or tuple(map(str, range(tensor.device_mesh.ndim)))
    return " ".join(
        f"{axis}:{_short(placement)}" for axis, placement in zip(names, tensor.placements, strict=True)
    )


def _short(placement: object) -> str:
    kind = type(placement).__name__
    short = {"Shard": "S", "_StridedShard": "_S", "Replicate": "R", "Partial": "P"}.get(kind, kind)
    dim = getattr(placement, "dim", None)
    return f"{short}({dim})" if dim is not None else short
