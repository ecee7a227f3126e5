"""Meshes and groups that many cases share: each gloo group keeps three threads that wake up all the time."""

from __future__ import annotations

import functools
import threading
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, _redistribute

__all__ = ["shared_group", "shared_mesh", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor with all of ``tensor``, which is a DTensor on all ranks of its mesh, or plain.

    Gathered axis by axis: torch merges the axes of a mesh that was flattened too, and then takes uneven shards for
    those of the flat mesh (seen with 2.14).
    """
    tensor = tensor.detach()
    with _apart:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


class _Apart:
    """Torch merges no collectives while a thread is inside; its own context would outlast those that overlap."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._context: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                make = getattr(_redistribute, "disable_redistribute_transform_optimization", nullcontext)
                self._context = make()
                self._context.__enter__()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._context.__exit__(None, None, None)


_apart = _Apart()


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
