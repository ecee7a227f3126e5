"""Tensors without values, of torch's FakeTensorMode: they tell the shapes and the memory of a run without its data."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor

__all__ = ["is_fake", "with_real_tensors"]

with_real_tensors = unset_fake_temporarily
"""Context or decorator of what reads values of tensors that it makes itself, or keeps them for later steps."""


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` (or the local shard of a DTensor) has no values that could be looked at."""
    return isinstance(tensor._local_tensor if isinstance(tensor, DTensor) else tensor, FakeTensor)
