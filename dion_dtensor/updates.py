"""The function that steps a bucket, compiled once for each plan."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dion_dtensor.assembly import own_shard
from dion_dtensor.layout import StorageLayout
from dion_dtensor.matrices import Split
from dion_dtensor.rules import Rule
from dion_dtensor.whole_matrices import on_whole_matrices

__all__ = ["Plan", "update_of"]

# The order in which collectives are started and waited for is that of the code, which lets them overlap with work.
AS_WRITTEN = {"reorder_for_locality": False, "reorder_for_peak_memory": False}

# Before 2.14, Inductor may write a state in place before the chosen rows of the old one are read (seen with 2.11).
IN_PLACE = TorchVersion(torch.__version__) >= "2.14"

Fixed = tuple[tuple[str, Hashable], ...]


@dataclass(frozen=True)
class Plan:
    """What distinguishes one compiled function from another.

    Attributes:
        rule: the algorithm.
        hyper: its fixed hyperparameters, for each piece of ``split``.
        maximize: ascend.
        grad_layout: of the stacked gradients; None for a plain tensor.
        change_layout: of the result.
        states: layouts of the stacked states by key, and the piece that a state belongs to alone.
        size: entries of the stack, or elements.
        groups: names of the mesh's process groups, which are part of a compiled function.
        split: cuts whole parameters into logical matrices once they are assembled, state and all.
        compile: under ``torch.compile(fullgraph=True)``.
    """

    rule: Rule
    hyper: tuple[Fixed, ...]
    maximize: bool
    grad_layout: StorageLayout | None
    change_layout: StorageLayout | None
    states: tuple[tuple[str, StorageLayout | None, int | None], ...]
    size: int
    groups: tuple[str, ...]
    split: Split | None
    compile: bool


@functools.cache
def update_of(plan: Plan) -> Callable[..., Tensor | None]:
    """``(grads, stacks, scalars, scale) -> -lr * scale * direction``, with the stacks of state updated in place.

    Given ``weights`` as well, one local tensor for each entry of the stack, they become ``decay`` times themselves plus
    that, which is not returned then.
    """
    rule, layouts = plan.rule, {key: layout for key, layout, _ in plan.states}

    def wrap(local: Tensor, layout: StorageLayout | None) -> Tensor:
        return local if layout is None else layout.wrap(local)

    def unwrap(tensor: Tensor, layout: StorageLayout | None) -> Tensor:
        return tensor if layout is None else own_shard(tensor, layout)

    def update(
        grads: Tensor,
        stacks: dict[str, Tensor],
        scalars: dict[str, Any],
        scale: Any,
        weights: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        old: dict[str, Any] = {name: wrap(stacks[name], layout) for name, layout in layouts.items()}
        grad = wrap(-grads if plan.maximize else grads, plan.grad_layout)
        if plan.split is None:
            if "step" in scalars:
                old["step"] = scalars["step"]
            direction, state = rule.update(grad, rule.state(**_by_field(old)), _hyper(plan, 0, scalars))
            new = _by_key(state._asdict(), layouts)
        else:
            direction, *values = on_whole_matrices(_on_pieces(plan, scalars), grad, *old.values())
            new = dict(zip(old, values, strict=True))
        left: dict[str, Tensor] = {}
        for name, layout in layouts.items():
            # What was assembled whole is averaged already.
            averaged = layout and (layout.reduced() if plan.split else layout)
            left[name] = unwrap(new[name], averaged)
            if in_place:
                stacks[name].copy_(left.pop(name))
        shard = unwrap(direction, plan.change_layout)
        # Scaled in float32 or wider, also when the direction was computed in bfloat16.
        wide = torch.promote_types(shard.dtype, torch.float32)
        change: Tensor = shard.to(wide) * -(scalars["lr"] * scale).to(wide)
        if weights:
            for weight, part in zip(weights, change.unbind(), strict=True):
                weight.copy_(weight * scalars["decay"] + part.view(weight.shape))
            return None, left
        # Also where matrices were transposed: it is added faster to weights that lie alike.
        return change.contiguous() if plan.compile else change, left

    def step(grads: Tensor, stacks: dict[str, Tensor], *others: Any) -> Tensor | None:
        now = update if plan.compile and _must_run_eagerly() else function
        change, left = now(grads, stacks, *others)
        for name, value in left.items():
            stacks[name].copy_(value)
        return change

    in_place = IN_PLACE or not plan.compile
    function: Callable[..., tuple[Tensor | None, dict[str, Tensor]]] = update
    if not plan.compile:
        return step
    # Dynamo keeps its cache by code object and limits its length: a code object of its own for each plan.
    own = types.FunctionType(
        update.__code__.replace(co_name=f"{rule.name}_update"),
        globals(),
        update.__name__,
        update.__defaults__,
        update.__closure__,
    )
    sharded = plan.grad_layout is not None and plan.grad_layout.mesh is not None
    options: dict[str, Any] = {"options": dict(AS_WRITTEN)} if sharded else {}
    function = torch.compile(own, fullgraph=True, dynamic=False, **options)
    return step


def _must_run_eagerly() -> bool:
    """Whether torch compiles nothing now, and says so only after ``fullgraph=True`` has run the whole eagerly.

    So it is with ``TORCH_COMPILE_DISABLE=1``, and within a mode that counts FLOPs, collectives or memory.
    """
    return bool(torch._dynamo.config.disable) or _get_current_dispatch_mode() is not None


def _by_field(states: dict[str, Any]) -> dict[str, Any]:
    """``Q.0``, ``Q.1``, ... as one tuple ``Q``."""
    found: dict[str, Any] = {}
    for key, value in states.items():
        field, _, index = key.partition(".")
        found[field] = (*found.get(field, ()), value) if index else value
    return found


def _by_key(fields: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The inverse of :func:`_by_field`."""
    found = {}
    for key in keys:
        field, _, index = key.partition(".")
        found[key] = fields[field][int(index)] if index else fields[field]
    return found


def _hyper(plan: Plan, index: int, scalars: dict[str, Any]) -> Any:
    return plan.rule.hyper(**dict(plan.hyper[index]), **{name: scalars[name] for name in plan.rule.scalars})


def _on_pieces(plan: Plan, scalars: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The rule on stacks of whole parameters, plain tensors: each piece as on one device, then joined again."""
    split, rule = plan.split, plan.rule
    assert split is not None

    def function(grads: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        directions: list[Tensor] = []
        joint: dict[str, list[Tensor]] = {}
        own: dict[str, Tensor] = {}
        cut = [
            piece.contiguous() for piece in split.split(grads)
        ]  # so that sums run in the same order everywhere
        for index, grad in enumerate(cut):
            states = {}
            for (key, _, piece), value in zip(plan.states, values, strict=True):
                if piece is None:
                    states[key] = split.split(value)[index].contiguous()
                elif piece == index:
                    states[key.partition(".")[0]] = value.reshape(len(grad), *value.shape[-2:])
            direction, new = rule.update(grad, rule.state(**states), _hyper(plan, index, scalars))
            directions.append(direction)
            for (key, _, piece), value in zip(plan.states, values, strict=True):
                if piece is None:
                    joint.setdefault(key, []).append(getattr(new, key))
                elif piece == index:
                    own[key] = getattr(new, key.partition(".")[0]).reshape(value.shape)
        merged = [
            split.merge(joint[key], value.shape[1:]) if piece is None else own[key]
            for (key, _, piece), value in zip(plan.states, values, strict=True)
        ]
        return split.merge(directions, grads.shape[1:]), *merged

    return function
