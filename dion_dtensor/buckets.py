"""Parameters that share a rule, a layout and hyperparameters are stepped together, by one compiled function.

The state of a bucket is kept stacked; ``optimizer.state[parameter]`` holds views of it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dion_dtensor.assembly import own_shard, scattered
from dion_dtensor.layout import StorageLayout
from dion_dtensor.philox import normal
from dion_dtensor.rules import Rule, StateSpec
from dion_dtensor.scale import scale_factor

__all__ = ["Bucket", "Member", "make_buckets"]


@dataclass(eq=False)
class Member:
    """A parameter in a bucket: its fully qualified name, its layout, and views of its slice of the bucket's state."""

    name: str
    parameter: Tensor
    layout: StorageLayout
    views: dict[str, Tensor] = field(default_factory=dict)

    @property
    def local(self) -> Tensor:
        """The parameter's own shard."""
        return local_of(self.parameter.detach())


@dataclass(frozen=True)
class Plan:
    """What distinguishes one compiled function from another, but for the number and shape of its members."""

    rule: Rule
    hyper: tuple[tuple[str, Hashable], ...]
    scale: float
    maximize: bool
    grad_layout: StorageLayout | None
    state_layouts: tuple[tuple[str, StorageLayout | None], ...]
    size: int
    compile: bool


class Bucket:
    """Members with the same rule, shape, dtype, mesh and placements (an elementwise rule: the same dtype and device).

    Args:
        rule: the algorithm.
        group: the param group, read anew at every step.
        members: in an order that all ranks share.
        seed: of the initial normal values.
        momentum_dtype: dtype of the state; None for that of the parameter.
        compute_dtype: dtype of the orthonormalization.
        compile: whether the update runs under ``torch.compile(fullgraph=True)``.
    """

    def __init__(
        self,
        rule: Rule,
        group: Mapping[str, Any],
        members: Sequence[Member],
        *,
        seed: int,
        momentum_dtype: torch.dtype | None,
        compute_dtype: torch.dtype,
        compile: bool,
    ) -> None:
        self.rule, self.group, self.members = rule, group, list(members)
        self.compile, self.compute_dtype = compile, compute_dtype
        first = self.members[0]
        self.shape, self.device = first.layout.shape, first.layout.device
        self.specs = rule.states(self.shape, group)
        self.state_dtype = momentum_dtype or first.layout.dtype
        self._scalars: dict[str, Any] = {}
        self.stacks = {name: self._initial_stack(spec, seed) for name, spec in self.specs.items()}
        for member in self.members:
            if rule.counts_steps:
                member.views["step"] = torch.zeros((), dtype=torch.float32)
        self._views = {name: self._split(stack, name, self.members) for name, stack in self.stacks.items()}
        for name, views in self._views.items():
            for member, view in zip(self.members, views, strict=True):
                member.views[name] = self._state_layout(member, name).wrap(view)

    @property
    def scale(self) -> float:
        """The factor on the learning rate."""
        return scale_factor(self.group.get("scale"), self.shape)

    def step(self, members: Sequence[Member], grads: Sequence[Tensor]) -> None:
        """Step ``members`` (all of the bucket, or those that have a gradient) with their ``grads``."""
        if not self.rule.counts_steps:
            return self._step(members, grads, None)
        counts: dict[float, list[int]] = {}
        for index, member in enumerate(members):
            counts.setdefault(float(member.views["step"].add_(1)), []).append(index)
        for count, indices in counts.items():  # one turn, unless some member was skipped before
            self._step([members[i] for i in indices], [grads[i] for i in indices], count)
        return None

    def _step(self, members: Sequence[Member], grads: Sequence[Tensor], count: float | None) -> None:
        every = len(members) == len(self.members)
        stacks = self.stacks if every else {name: self._joined(name, members) for name in self.specs}
        scalars = self._filled_scalars(count)
        plan = self._plan(len(members))
        updates = _compiled_update(plan)(self._join(grads), stacks, scalars)
        if not every:
            for name, stack in stacks.items():
                for member, slice_ in zip(members, self._split(stack, name, members), strict=True):
                    local_of(member.views[name]).copy_(slice_)
        self._apply(members, self._split(updates, None, members), scalars["decay"])

    def _apply(self, members: Sequence[Member], updates: Sequence[Tensor], decay: Tensor) -> None:
        """``W <- decay * W - update``; cautious decay only where the update shrinks the weight."""
        weights = [member.local for member in members]
        if self.group["cautious"]:
            for weight, change in zip(weights, updates, strict=True):
                agree = change.sign() * weight.sign() >= 0  # the product itself could underflow
                weight.mul_(torch.where(agree, decay.to(weight.dtype), 1.0))
        else:
            torch._foreach_mul_(weights, decay)
        torch._foreach_sub_(weights, list(updates))

    def _filled_scalars(self, count: float | None) -> dict[str, Any]:
        """The hyperparameters of this step in 0-d tensors that live as long as the bucket, so nothing recompiles."""
        group = self.group
        values = {name: group[name] for name in self.rule.scalars} | {"lr": group["lr"]}
        # In float64, whatever the dtype of a tensor lr: 1 - lr * weight_decay is close to one.
        lr = group["lr"].double() if isinstance(group["lr"], Tensor) else group["lr"]
        values["decay"] = 1 - lr * group["weight_decay"]
        if count is not None:
            values["step"] = count
        for name, value in values.items():
            parts = value if isinstance(value, tuple | list) else (value,)
            if name not in self._scalars:
                cells = tuple(torch.zeros((), dtype=torch.float64, device=self.device) for _ in parts)
                self._scalars[name] = cells if isinstance(value, tuple | list) else cells[0]
            stored = self._scalars[name]
            for cell, part in zip(stored if isinstance(stored, tuple) else (stored,), parts, strict=True):
                cell.copy_(part.reshape(())) if isinstance(part, Tensor) else cell.fill_(part)
        return self._scalars

    def _plan(self, count: int) -> Plan:
        group, rule = self.group, self.rule
        fields = rule.hyper._fields  # type: ignore[attr-defined]
        own = {name: group[name] for name in rule.defaults}
        fixed = own | {"compute_dtype": self.compute_dtype} | rule.prepare(self.shape, group)
        hyper = tuple((name, fixed[name]) for name in fields if name not in rule.scalars)
        layout = None if rule.elementwise else self.members[0].layout.stacked(count)
        states = tuple(
            (name, None if rule.elementwise else self._state_layout(self.members[0], name).stacked(count))
            for name in self.specs
        )
        size = sum(member.local.numel() for member in self.members) if rule.elementwise else count
        return Plan(rule, hyper, self.scale, bool(group["maximize"]), layout, states, size, self.compile)

    def _state_layout(self, member: Member, name: str) -> StorageLayout:
        spec = self.specs[name]
        if spec.dims is None:
            return replace(member.layout, dtype=self.state_dtype)
        assert spec.sizes is not None
        return member.layout.derived(spec.dims, spec.sizes, self.state_dtype)

    def _initial_stack(self, spec: StateSpec, seed: int) -> Tensor:
        if not spec.normal:
            return self._join(
                [torch.zeros_like(m.local, dtype=self.state_dtype) for m in self.members]
            ).clone()
        assert spec.dims is not None
        assert spec.sizes is not None
        rows, columns = spec.sizes
        slices = []
        for member in self.members:
            values = normal(rows, columns, seed=seed, name=member.name).to(self.device, self.state_dtype)
            layout = member.layout.derived(spec.dims, spec.sizes, self.state_dtype)
            slices.append(scattered(values, layout))
        return torch.stack(slices)

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Local shards to the local stack; a view if there is one only."""
        if self.rule.elementwise:
            flat = [tensor.reshape(-1) for tensor in tensors]
            return flat[0] if len(flat) == 1 else torch.cat(flat)
        return tensors[0].unsqueeze(0).contiguous() if len(tensors) == 1 else torch.stack(list(tensors))

    def _joined(self, name: str, members: Sequence[Member]) -> Tensor:
        return self._join([local_of(member.views[name]) for member in members]).clone()

    def _split(self, stack: Tensor, name: str | None, members: Sequence[Member]) -> list[Tensor]:
        """Views of a local stack, one a member."""
        if not self.rule.elementwise:
            return list(stack.unbind(0))
        sizes = [member.local.numel() for member in members]
        parts = torch.split(stack, sizes)
        return [part.view(member.local.shape) for part, member in zip(parts, members, strict=True)]


def make_buckets(
    rule: Rule, group: Mapping[str, Any], members: Sequence[Member], options: Mapping[str, Any]
) -> list[Bucket]:
    """Sort ``members`` into buckets, in the order of first appearance, which all ranks share.

    Args:
        rule: the algorithm of ``group``.
        group: the param group.
        members: its parameters.
        options: ``seed``, ``momentum_dtype``, ``compute_dtype``, ``compile`` of the optimizer.
    """
    sorted_: dict[Hashable, list[Member]] = {}
    for member in members:
        layout = member.layout
        key: Hashable = (layout.dtype, layout.device) if rule.elementwise else layout
        sorted_.setdefault(key, []).append(member)
    return [
        Bucket(
            rule,
            group,
            same,
            seed=options["seed"],
            momentum_dtype=options["momentum_dtype"],
            compute_dtype=_compute_dtype(same[0].layout, options["compute_dtype"]),
            compile=options["compile"],
        )
        for same in sorted_.values()
    ]


def _compute_dtype(layout: StorageLayout, asked: torch.dtype | None) -> torch.dtype:
    """float64 parameters are computed in float64 throughout; else as asked, else bfloat16 where it is fast."""
    if layout.dtype == torch.float64:
        return torch.float64
    return asked or (torch.bfloat16 if layout.device.type == "cuda" else torch.float32)


def local_of(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@functools.cache
def _compiled_update(plan: Plan) -> Callable[..., Tensor]:
    """``(grads, stacks, scalars) -> lr * scale * direction``, with the stacks of state updated in place."""
    rule, fixed, layouts = plan.rule, dict(plan.hyper), dict(plan.state_layouts)

    def wrap(local: Tensor, layout: StorageLayout | None) -> Tensor:
        return local if layout is None else layout.wrap(local)

    def unwrap(tensor: Tensor, layout: StorageLayout | None) -> Tensor:
        return tensor if layout is None else own_shard(tensor, layout)

    def update(grads: Tensor, stacks: dict[str, Tensor], scalars: dict[str, Any]) -> Tensor:
        hyper = rule.hyper(**fixed, **{name: scalars[name] for name in rule.scalars})
        old = {name: wrap(stacks[name], layout) for name, layout in layouts.items()}
        if rule.counts_steps:
            old["step"] = scalars["step"]
        grad = wrap(-grads if plan.maximize else grads, plan.grad_layout)
        direction, new = rule.update(grad, rule.state(**old), hyper)
        for name, layout in layouts.items():
            stacks[name].copy_(unwrap(getattr(new, name), layout))
        shard = unwrap(direction, plan.grad_layout)
        # Scaled in float32 or wider, also when the direction was computed in bfloat16.
        change: Tensor = shard.to(torch.promote_types(shard.dtype, torch.float32)) * (
            scalars["lr"] * plan.scale
        )
        return change

    if not plan.compile:
        return update
    # Dynamo keeps its cache by code object and limits its length: a code object of its own for each plan.
    own = types.FunctionType(
        update.__code__.replace(co_name=f"{rule.name}_update"),
        globals(),
        update.__name__,
        None,
        update.__closure__,
    )
    compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled
