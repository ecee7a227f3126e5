"""Loading optimizer state into place: checked against the parameters before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dion_dtensor.assembly import own_shard, scattered
from dion_dtensor.buckets import Member
from dion_dtensor.layout import StorageLayout

__all__ = ["load_states"]


def load_states(members: Sequence[Member], loaded: Sequence[Mapping[str, Any] | None]) -> None:
    """Copy each member's loaded state into its own, all or nothing.

    Args:
        members: the optimizer's parameters, in the order of its groups.
        loaded: the state of each as ``state_dict`` gives it; a DTensor of other placements on the same mesh is
            redistributed; a plain tensor is taken as the whole value.

    Raises:
        ValueError: a missing state, another algorithm's keys, another shape; the message names the parameter.
    """
    for member, state in zip(members, loaded, strict=True):
        needed = sorted(member.states)
        given = sorted(state or {})
        if given != needed:
            raise ValueError(
                f"{member.name} ({member.layout.describe()}): its state has {needed}, the loaded one has {given}; "
                "was it saved by another algorithm?"
            )
        assert state is not None
        for key, own in member.states.items():
            value = torch.as_tensor(state[key])
            if value.shape != own.shape:
                raise ValueError(
                    f"{member.name} ({member.layout.describe()}): state {key!r} has shape {list(own.shape)}, the "
                    f"loaded one has {list(value.shape)}; was it saved with another rank_fraction?"
                )
    for member, state in zip(members, loaded, strict=True):
        assert state is not None
        for key, own in member.states.items():
            _copy(own, torch.as_tensor(state[key]))


@torch.no_grad()
def _copy(own: Tensor, value: Tensor) -> None:
    if isinstance(own, DTensor) and not isinstance(value, DTensor):
        own.to_local().copy_(scattered(value.to(own.device), StorageLayout.of(own)))
    elif isinstance(own, DTensor):
        own.to_local().copy_(own_shard(value, StorageLayout.of(own)))
    else:
        own.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
