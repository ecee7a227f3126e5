"""Optimizer state: loaded into place after it was checked against the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dion_dtensor.assembly import everywhere, scattered
from dion_dtensor.checks import check_group
from dion_dtensor.layout import StorageLayout
from dion_dtensor.members import Member

__all__ = ["WRAPPER_PREFIXES", "adopt", "check_states", "load_states", "loaded_groups", "without_wrappers"]

# Wrappers that put a prefix into a parameter's name without changing the model.
WRAPPER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def without_wrappers(names: Sequence[str]) -> list[str]:
    """The names of one model's parameters or modules as if it was not wrapped."""
    for prefix in WRAPPER_PREFIXES:
        names = [name.replace(prefix, "") for name in names]
    if all(name.startswith("module.") for name in names if name):  # DistributedDataParallel
        names = [name.removeprefix("module.") for name in names]
    return list(names)


def loaded_groups(
    groups: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]], members: Sequence[Member]
) -> list[dict[str, Any]]:
    """The param groups of a state dict, with the keys and names of here that they lack.

    Args:
        groups: of the optimizer.
        given: as many, of the same sizes.
        members: of all groups, one after the other.

    Raises:
        ValueError: another algorithm or split, other names, or a hyperparameter out of range; names the parameter.
    """
    found: list[dict[str, Any]] = []
    rest = iter(members)
    for position, (own, saved) in enumerate(zip(groups, given, strict=True)):
        here = [next(rest) for _ in own["params"]]
        for key, does in (("algorithm", "follows"), ("split", "is split as")):
            if saved.get(key) != own[key]:
                first = f"{here[0].name} ({here[0].layout.describe()})" if here else f"group {position}"
                raise ValueError(
                    f"{first} {does} {own[key]!r} here; in the loaded group it {does} {saved.get(key)!r}"
                )
        _check_names(position, own, saved)
        kept = {key: value for key, value in own.items() if key != "params"}
        # The names stay those of here: other wrappers, or another order of torch.distributed.checkpoint's.
        taken = {key: value for key, value in saved.items() if key not in ("param_names", "reasons")}
        found.append({**kept, **taken})
        check_group(found[-1], foreign=True)  # users keep keys of their own in groups
    return found


def _check_names(position: int, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a saved group whose parameters are named otherwise; a group without names is taken in its order.

    Raises:
        ValueError: names the first parameter that differs.
    """
    if any(isinstance(key, str) for key in given["params"]):
        return  # torch.distributed.checkpoint finds states by name, and leaves the names in the saved order
    names, saved = (group.get("param_names") or () for group in (own, given))
    plain = zip(without_wrappers(names), without_wrappers(saved), strict=False)
    for index, (here, there) in enumerate(plain):
        if here != there:
            raise ValueError(
                f"parameter {index} of group {position} is {names[index]} here and {saved[index]} in the saved state; "
                "give the optimizer its parameters in the saved order, or, if they were renamed only, delete "
                "'param_names' from the saved groups"
            )


def check_states(members: Sequence[Member], states: Sequence[Mapping[str, Any] | None]) -> None:
    """Refuse states that are not those of the members' rules.

    Raises:
        ValueError: a missing state of a parameter that is not frozen, another algorithm's keys, another shape, a
            DTensor on another mesh; the message names the parameter.
    """
    for member, state in zip(members, states, strict=True):
        needed, given = sorted(member.views), sorted(state or {})
        where = f"{member.name} ({member.layout.describe()})"
        if _left_out(member, state):
            continue
        if needed and not given:
            raise ValueError(
                f"{where}: the saved state has nothing of it; was it frozen, or not there, when that was saved? Freeze "
                "it to load the rest, which leaves its state as it is"
            )
        if not set(needed) <= set(given):  # what a user keeps there besides goes along
            raise ValueError(
                f"{where}: its state has {needed}, the given one has {given}; was it saved by another algorithm?"
            )
        for key, own in member.views.items():
            value = torch.as_tensor((state or {})[key])
            if value.shape != own.shape:
                raise ValueError(
                    f"{where}: state {key!r} has shape {list(own.shape)}, the given one has {list(value.shape)}; "
                    "was it saved with another rank_fraction?"
                )
            if (
                isinstance(own, DTensor)
                and isinstance(value, DTensor)
                and value.device_mesh != own.device_mesh
            ):
                raise ValueError(
                    f"{where}: state {key!r} lies on another mesh, {value.device_mesh}; load it by "
                    "torch.distributed.checkpoint, or give its full_tensor()"
                )


def load_states(members: Sequence[Member], states: Sequence[Mapping[str, Any] | None]) -> None:
    """Copy each member's state into its bucket, in the bucket's dtype; :func:`check_states` comes first.

    Args:
        members: of the optimizer, in the order of its groups.
        states: one a member; a DTensor of other placements on the same mesh is redistributed, a plain tensor is
            taken as the whole value.
    """
    for member, state in zip(members, states, strict=True):
        for key, own in member.views.items() if not _left_out(member, state) else ():
            _copy(own, torch.as_tensor((state or {})[key]))


def adopt(members: Sequence[Member], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Take over what a user has put into ``optimizer.state`` in place of the tensors that the optimizer steps.

    Raises:
        ValueError: the state was taken out, or see :func:`check_states`.
    """
    for member in members:
        state = states.get(member.parameter)
        if _left_out(member, state):
            continue
        if member.views and not state:
            raise ValueError(
                f"{member.name} ({member.layout.describe()}): its state is no longer in optimizer.state; to start "
                "afresh zero the tensors there in place, or make a new optimizer"
            )
        if state is None or any(state.get(key) is not view for key, view in member.views.items()):
            check_states([member], [state])
            load_states([member], [state])
            assert state is not None
            state.update(member.views)


def _left_out(member: Member, state: Mapping[str, Any] | None) -> bool:
    """Of a frozen parameter torch.distributed.checkpoint saves no state: it stays as it is."""
    return not state and not member.parameter.requires_grad


@torch.no_grad()
def _copy(own: Tensor, value: Tensor) -> None:
    if own is value:
        return
    if isinstance(own, DTensor) and isinstance(value, DTensor) and value.placements == own.placements:
        own.to_local().copy_(value.to_local())
    elif isinstance(own, DTensor):
        own.to_local().copy_(scattered(everywhere(value).to(own.device), StorageLayout.of(own)))
    else:
        own.copy_(everywhere(value))
