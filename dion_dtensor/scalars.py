"""The hyperparameters of a step, in tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dion_dtensor.rules import Rule

__all__ = ["filled"]


def filled(
    cells: dict[str, Any], rule: Rule, group: Mapping[str, Any], device: torch.device, count: float | None
) -> dict[str, Any]:
    """``cells`` with the values of this step: 0-d float64 tensors, so that nothing recompiles.

    Args:
        cells: as returned by the last step, or empty; they live as long as the bucket.
        rule: names its scalars.
        group: has their values, numbers or tensors, and ``lr`` and ``weight_decay``.
        device: of the cells.
        count: steps of the members, None for a rule that reads none.
    """
    values = {name: group[name] for name in rule.scalars} | {"lr": group["lr"]}
    # In float64, also of tensors: 1 - lr * weight_decay is close to one.
    lr, decay = (
        value.double() if isinstance(value, Tensor) else value
        for value in (group["lr"], group["weight_decay"])
    )
    values["decay"] = 1 - lr * decay
    if count is not None:
        values["step"] = count
    for name, value in values.items():
        several = isinstance(value, tuple | list)
        parts = value if several else (value,)
        if name not in cells:
            made = tuple(torch.zeros((), dtype=torch.float64, device=device) for _ in parts)
            cells[name] = made if several else made[0]
        for cell, part in zip(cells[name] if several else (cells[name],), parts, strict=True):
            if isinstance(part, Tensor) and part.device.type != "cpu":
                cell.copy_(part.reshape(()))
            else:  # as a number: to copy from the host's memory would wait for the device
                cell.fill_(float(part))
    return cells
