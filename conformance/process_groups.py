"""Meshes and groups that many cases share: each gloo group keeps three threads that wake up all the time."""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from dion_dtensor.assembly import everywhere

__all__ = ["forget", "shared_group", "shared_mesh", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor with all of ``tensor``, which is a DTensor on all ranks of its mesh, or plain.

    Gathered axis by axis: torch merges the axes of a mesh that was flattened too, and then takes uneven shards for
    those of the flat mesh (seen with 2.14).
    """
    tensor = tensor.detach()
    return everywhere(tensor) if isinstance(tensor, DTensor) else tensor.clone()


def shared_mesh(sizes: tuple[int, ...], names: tuple[str, ...], device: str = "cpu") -> DeviceMesh:
    """The mesh of the first ranks, made once a default process group; all ranks must come here."""
    return _mesh(sizes, names, device, dist.group.WORLD)


def shared_group(ranks: int) -> Any:
    """The group of the first ``ranks``, made once a default process group; all ranks must come here.

    On the other ranks it is torch's mark for no member, hence the type.
    """
    return _group(ranks, dist.group.WORLD)


@functools.cache
def _mesh(sizes: tuple[int, ...], names: tuple[str, ...], device: str, world: object) -> DeviceMesh:
    return init_device_mesh(device, sizes, mesh_dim_names=names)


@functools.cache
def _group(ranks: int, world: object) -> Any:
    return dist.new_group(list(range(ranks)))


def forget() -> None:
    """Let the meshes and groups go of process groups that are gone."""
    _mesh.cache_clear()
    _group.cache_clear()
