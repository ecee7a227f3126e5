"""What the engine needs to know of an algorithm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dion_dtensor.matrices import Split

__all__ = ["Rule", "Scalar", "StateSpec", "widest"]

Scalar = float | Tensor
"""A hyperparameter that may change at every step: the engine hands it to the rule as a 0-d tensor."""


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the widest of the tensors', float32 at least."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


@dataclass(frozen=True)
class StateSpec:
    """One state tensor of a logical matrix ``[row, column]``.

    Attributes:
        dims: the name of each dim, "row", "column", "rank", or None for a dim of size one; None for a state of the
            parameter's own shape.
        sizes: the size of each dim; None for the parameter's own.
        normal: start from standard normal values that depend on (seed, name, row, column) only, instead of zero.
    """

    dims: tuple[str | None, ...] | None = None
    sizes: tuple[int, ...] | None = None
    normal: bool = False


@dataclass(frozen=True, eq=False)
class Rule:
    """An algorithm as the engine sees it.

    Attributes:
        name: the value of ``algorithm`` in a param group.
        update: ``(grad, state, hyper) -> (direction, new state)``.  The engine decays the weight by
            ``1 - lr * weight_decay`` and subtracts ``lr * scale * direction``.  Inputs are not modified.
        hyper: NamedTuple of what ``update`` reads.  Fields of ``scalars`` arrive as 0-d tensors.
        state: NamedTuple of the state tensors; a field ``step`` is the 0-d count of steps, this one included.
        defaults: every hyperparameter of a param group and its default.
        scalars: names of the hyperparameters that may change at every step without a new compilation.
        states: ``(shape, group) -> {field: StateSpec}``, without ``step``.
        cuts: whether ``update`` takes stacks of whole parameters too, and cuts them by the field ``split`` of
            ``hyper``, a field of ``state`` being a tuple where matrices of several shapes have one each; under other
            splits it is handed the matrices of whole parameters that are assembled with all their state.
        way: what has to travel so that a sharded matrix is orthonormalized.
        reads_values: when the host waits for values of the device in the midst of ``update``, which no CUDA graph can:
            "never", "always", or "exchange", where chosen slices travel.
        pending_states: states that may differ among ranks which hold the same parameter, since ``update`` reads the
            gradient and them only through averages: then the gradient need not be averaged first.
        elementwise: works on each element by itself, so that parameters of any shape and layout share a bucket.
        counts_steps: ``group -> bool``, whether ``state`` has the field ``step`` there.
        fused: ``(weights, grads, states, group, step)``, a kernel of torch for the whole step, decay included, on lists
            of contiguous tensors of one dtype; states by name, all in place.  For elementwise rules.
        shapes_state: hyperparameters by which states have their shapes.
        check: raises ValueError for a param group with bad hyperparameters.
        prepare: ``(shape, group) -> {field: value}``, the fields of ``hyper`` that are not hyperparameters themselves.
    """

    name: str
    update: Callable[[Tensor, Any, Any], tuple[Tensor, Any]]
    hyper: Callable[..., Any]
    state: Callable[..., Any]
    defaults: Mapping[str, Any]
    scalars: tuple[str, ...]
    states: Callable[[tuple[int, ...], Mapping[str, Any]], dict[str, StateSpec]]
    way: str = "assembled"
    reads_values: str = "never"
    pending_states: tuple[str, ...] = ()
    elementwise: bool = False
    fused: Callable[..., None] | None = None
    shapes_state: tuple[str, ...] = ()
    cuts: Callable[[Split], bool] = field(default=lambda split: False)
    counts_steps: Callable[[Mapping[str, Any]], bool] = field(default=lambda group: False)
    check: Callable[[Mapping[str, Any]], None] = field(default=lambda group: None)
    prepare: Callable[[tuple[int, ...], Mapping[str, Any]], dict[str, Any]] = field(
        default=lambda shape, group: {}
    )
