"""``W <- decay * W + change``, outside of what is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["add", "add_in_one_pass", "plain"]


def add_in_one_pass(weights: Sequence[Tensor], changes: Sequence[Tensor], decay: float) -> None:
    """Each weight is read and written once.

    Args:
        weights: float32 or wider; written in place.
        changes: of the same shapes.
        decay: factor on the weights.
    """
    for weight, change in zip(weights, changes, strict=True):
        torch.add(change, weight, alpha=decay, out=weight)


def add(weights: Sequence[Tensor], changes: Sequence[Tensor], decay: Tensor, *, cautious: bool) -> None:
    """By one kernel for all, without waiting for the value of ``decay``.

    Args:
        weights: of one dtype; written in place.
        changes: of the same shapes.
        decay: 0-d, factor on the weights.
        cautious: decay only where the change shrinks the weight.
    """
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    narrow = wide != weights[0].dtype
    # Rounded once: in bfloat16 a decay of 1 - 1e-4 alone would be rounded away.
    values = [weight.to(wide) for weight in weights] if narrow else list(weights)
    factor = decay.to(wide)  # of the weights' dtype, for which CUDA has one kernel for all of them
    if cautious:
        for value, change in zip(values, changes, strict=True):
            agree = change.sign() * value.sign() <= 0  # the product itself could underflow
            value.mul_(torch.where(agree, factor, 1.0))
    else:
        torch._foreach_mul_(values, factor)
    torch._foreach_add_(values, list(changes))
    if narrow:
        torch._foreach_copy_(list(weights), values)


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are contiguous, since a graph is of given strides, and no two overlap, since it may write early."""
    held = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.numel())
    apart = all(start + size <= after for (start, size), (after, _) in pairwise(held))
    return apart and all(tensor.is_contiguous() for tensor in tensors)
