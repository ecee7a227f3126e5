"""Parameters that share a rule, a layout and hyperparameters are stepped together, by one compiled function.

The state of a bucket is kept stacked; ``optimizer.state[parameter]`` holds views of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dion_dtensor import updates
from dion_dtensor.assembly import agreed_maximum, averaged, scattered
from dion_dtensor.captured import Recorder, joined
from dion_dtensor.fake import is_fake
from dion_dtensor.members import Member, StateForm, initial_entries, scale_entries, state_forms
from dion_dtensor.paths import chosen_path, path_of
from dion_dtensor.planning import Choice
from dion_dtensor.planning.buckets import FEW_WEIGHTS
from dion_dtensor.rules import Rule
from dion_dtensor.scalars import filled
from dion_dtensor.scale import scale_factor
from dion_dtensor.updates import Plan, update_of
from dion_dtensor.weights import add, add_in_one_pass, plain

__all__ = ["Bucket"]

FUSED_DEVICES = ("cpu", "cuda")
WAYS = {
    "assemble": "assembled",
    "gram": "Gram matrices alone",
    "exchange": "chosen slices alone",
    "low_rank": "P assembled",
    "rcqr": "r x r factors alone",
}


class Bucket:
    """Members with the same rule, form, dtype, mesh and placements (an elementwise rule: the same dtype and device).

    Args:
        rule: the algorithm.
        group: the param group, read anew at every step.
        members: in an order that all ranks share.
        seed: of the initial normal values.
        momentum_dtype: dtype of the state; None for that of the parameter, float32 for float16.
        compute_dtype: dtype of the orthonormalization.
        compile: whether the update runs under ``torch.compile(fullgraph=True)``.
        recorder: takes the updates that a CUDA graph can; None to record none.
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
        recorder: Recorder | None = None,
    ) -> None:
        self.recorder = recorder
        self.rule, self.group, self.members = rule, group, list(members)
        self.compile, self.compute_dtype = compile, compute_dtype
        first = self.members[0]
        self.device = first.layout.device
        # A sum of gradients leaves the range of float16.
        own_dtype = torch.float32 if first.layout.dtype == torch.float16 else first.layout.dtype
        self.state_dtype = momentum_dtype or own_dtype
        mesh = first.layout.mesh if first.form else None
        self._groups = (
            () if mesh is None else tuple(mesh.get_group(axis).group_name for axis in range(mesh.ndim))
        )
        self.pending: tuple[int, ...] = ()
        """Mesh axes over which the momentum is still to be averaged."""
        self._counts_steps = rule.counts_steps(group)
        self._shaped_by = {key: group[key] for key in rule.shapes_state}
        self._made_with_split = group["split"]
        self._scalars: dict[str, Any] = {}
        self.forms = {member: self._state_forms(member) for member in self.members}
        self._scales: dict[Hashable, Tensor] = {}
        self.stacks = {key: self._initial_stack(key, seed) for key in self.forms[first]}
        lengths = [self._length(member) for member in self.members]
        self._entries = {
            key: dict(zip(self.members, torch.split(stack, lengths), strict=True))
            for key, stack in self.stacks.items()
        }
        """Each member's slice of the stack of a state."""
        self._own = {
            key: {member: next(self._split(part, [member], key)) for member, part in parts.items()}
            for key, parts in self._entries.items()
        }
        """Each member's state as the user sees it, the local shard."""
        for member in self.members:
            if self._counts_steps:
                member.views["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for key in self.stacks:
                member.views[key] = member.shown(self.forms[member][key].shown, self._own[key][member])

    def follow(self, group: Mapping[str, Any]) -> None:
        """Read hyperparameters from ``group`` from now on.

        Raises:
            RuntimeError: they ask for states of other shapes, for a count of steps that there is not, or for another
                split.
        """
        self.check(group)
        self.group = group

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse hyperparameters that the state cannot follow; see :meth:`follow`."""
        if self.rule.counts_steps(group) != self._counts_steps:
            raise RuntimeError(
                f"{self.members[0].name}: its group began {'with' if self._counts_steps else 'without'} a count of its "
                "steps, and what decides that (bias_correction) cannot change; make a new optimizer"
            )
        asked = {key: group[key] for key in self.rule.shapes_state}
        if asked != self._shaped_by:
            first, made = self.members[0], {**group, **self._shaped_by}
            shapes = {(piece.m, piece.n) for one in self.members if one.form for piece in one.form.pieces}
            if any(self.rule.states(shape, group) != self.rule.states(shape, made) for shape in shapes):
                raise RuntimeError(
                    f"{first.name} ({first.layout.describe()}): its state was made with {self._shaped_by}, and the "
                    f"group now has {asked}; make the optimizer anew with these"
                )
        if group["split"] != self._made_with_split:
            first = self.members[0]
            raise RuntimeError(
                f"{first.name} ({first.layout.describe()}): its state was made with split={self._made_with_split!r}, "
                f"and the group now has {group['split']!r}; make the optimizer anew with this"
            )

    def _state_forms(self, member: Member) -> dict[str, StateForm]:
        if member.form is not None:
            return state_forms(member.layout, member.form, self.rule, self.group, self.state_dtype)
        layout = replace(member.layout, dtype=self.state_dtype)
        specs = self.rule.states(member.layout.shape, self.group)
        return {key: StateForm(spec, layout, layout, ()) for key, spec in specs.items()}

    def scales(self) -> tuple[float, ...]:
        """The factor on the learning rate of each piece."""
        form = self.members[0].form
        if form is None:
            return (1.0,)
        how = self._scaling()
        return tuple(scale_factor(how[0], (piece.m, piece.n), how[1]) for piece in form.pieces)

    @cached_property
    def fingerprint(self) -> int:
        """The same on ranks whose parameters lie alike.

        Neither names nor what lies on no mesh: experts may be others on each rank.
        """
        layouts = [member.layout for member in self.members]
        text = [layout.describe() for layout in layouts if layout.mesh is not None]
        return zlib.crc32(repr((len(layouts), text)).encode())

    def _scaling(self) -> tuple[str | None, str]:
        return self.group.get("scale"), self.group.get("weight_storage", "out_in")

    @property
    def choice(self) -> Choice | None:
        """How matrices come to be whole and why; None where there is nothing to choose."""
        first, size = self.members[0], sum(self._length(member) for member in self.members)
        return chosen_path(self.rule, self.group, first.form, size, self.state_dtype, self.compute_dtype)

    def way(self) -> str:
        """How a logical matrix comes to be whole."""
        form = self.members[0].form
        if form is None:
            return "-"
        if not form.travels:
            return "local"
        if form.cut is not None and not self.rule.cuts(form.cut):
            return "assembled with its whole parameter and state"
        choice = self.choice
        return WAYS[choice.way] if choice else WAYS.get(self.group.get("path", ""), self.rule.way)

    def _scale(self) -> Tensor:
        """The factor that the group asks for now."""
        how = None if self.rule.elementwise else self._scaling()
        if how not in self._scales:
            self._scales[how] = self._made_scale()
        return self._scales[how]

    def _made_scale(self) -> Tensor:
        """One factor, or one for each row of a logical matrix that this rank holds where the pieces differ in shape."""
        scales, form = self.scales(), self.members[0].form
        if len(set(scales)) == 1:
            return torch.tensor(scales[0], dtype=torch.float64, device=self.device)
        assert form is not None
        return scale_entries(form, scales, self.device)

    def step(self, members: Sequence[Member], grads: Sequence[Tensor], pending: tuple[int, ...] = ()) -> None:
        """Step ``members`` (all of the bucket, or those that have a gradient) with their local ``grads``.

        Args:
            members: of the bucket.
            grads: one a member.
            pending: mesh axes over which the gradients are not averaged yet.
        """
        self.pending = tuple(sorted({*self.pending, *pending}))
        if not self._counts_steps:
            return self._step(members, grads, None)
        counts: dict[float, list[int]] = {}
        for index, member in enumerate(members):
            step = member.views["step"]
            counts.setdefault(1 if is_fake(step) else float(step) + 1, []).append(index)
        for count, indices in counts.items():  # one turn, unless some member was skipped before
            self._step([members[i] for i in indices], [grads[i] for i in indices], count)
            for index in indices:
                members[index].views["step"].fill_(count)
        return None

    def synchronize(self) -> None:
        """Average a momentum that differs among ranks; a collective of all ranks of the mesh."""
        if self.pending:
            layout = self.members[0].layout
            for key in self.rule.pending_states:
                self.stacks[key].copy_(averaged(self.stacks[key], layout, self.pending))
            self.pending = ()

    def _step(self, members: Sequence[Member], grads: Sequence[Tensor], count: float | None) -> None:
        if self._fused(members, grads, count):
            return
        every = len(members) == len(self.members)
        stacks = self.stacks if every else {key: self._joined(key, members) for key in self.stacks}
        scalars, scale, plan = (
            filled(self._scalars, self.rule, self.group, self.device, count),
            self._scale(),
            self._plan(members),
        )
        parts, weights = self._parts(members, grads), self._weights(members, grads)

        def update(grad: Tensor) -> None:
            changes = update_of(plan)(grad, stacks, scalars, scale, weights)
            if changes is not None:
                self._apply(members, list(self._split(changes, members, None)), scalars["decay"])

        if every and self.recorder is not None and self._capturable():
            same = (plan, self.group["cautious"], scale.data_ptr())
            self.recorder.take(same, self._places(), parts, update, self._on_all)
            return
        update(joined(parts))
        if not every:
            for key, stack in stacks.items():
                for member, entries in zip(members, self._split(stack, members, key), strict=True):
                    self._own[key][member].copy_(entries)

    def _places(self) -> Hashable:
        """Where the weights lie; the storage too, since that of an empty shard has no address."""
        return tuple(
            (local.data_ptr(), local.untyped_storage()._cdata, local.stride())
            for local in (member.local for member in self.members)
        )

    def has_moved(self) -> bool:
        """Whether the weights no longer lie where the recorder, that counts turns or has a graph, saw them."""
        places = None if self.recorder is None else self.recorder.places
        return places is not None and places != self._places()

    def _on_all(self, good: bool) -> bool:
        """Whether ``good`` on all ranks that share the work."""
        mesh = self.members[0].layout.mesh
        if self.rule.elementwise or mesh is None:
            return good
        bad = torch.tensor([not good], dtype=torch.int32, device=mesh.device_type)
        return not agreed_maximum(bad, mesh).item()

    def _fused(self, members: Sequence[Member], grads: Sequence[Tensor], count: float | None) -> bool:
        """Take the whole step by the rule's own kernel, if it has one for these tensors."""
        rule, group = self.rule, self.group
        # Eagerly never: its vectorized part and its remainder may round otherwise, so shards would differ in bits.
        if (
            rule.fused is None
            or not self.compile
            or group["cautious"]
            or self.device.type not in FUSED_DEVICES
        ):
            return False
        values = (*(group[name] for name in rule.scalars if name != "lr"), group["weight_decay"])
        if self.device.type != "cpu" and any(_holds_tensor(value) for value in values):
            return False  # to read them would wait for the device
        full = [index for index, member in enumerate(members) if member.local.numel()]
        weights, gradients = [members[i].local for i in full], [grads[i] for i in full]
        states = {key: [self._own[key][members[i]] for i in full] for key in self.stacks}
        tensors = [*weights, *gradients, *(one for some in states.values() for one in some)]
        if len({tensor.dtype for tensor in tensors}) > 1 or not all(t.is_contiguous() for t in tensors):
            return False
        if full:
            rule.fused(weights, gradients, states, group, count)
            # Kernels do not tell autograd, which refuses a backward pass by weights that have changed.
            torch.autograd.graph.increment_version(weights)
        return True

    def _weights(self, members: Sequence[Member], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Those that the compiled update changes itself: a few whole matrices on a CPU, apart in memory."""
        whole = all(member.form is not None and member.form.kind != "units" for member in members)
        if not (updates.IN_PLACE and len(members) <= FEW_WEIGHTS and whole and self._in_one_pass()):
            return ()
        weights = tuple(member.local.detach() for member in members)
        return weights if plain((*weights, *grads)) else ()

    def _in_one_pass(self) -> bool:
        """Whether weights decay as they change: on other devices that would wait for the decay's value."""
        # Eagerly never, as in `_fused`.
        fits = self.compile and self.device.type == "cpu" and not self.group["cautious"]
        first = self.members[0]
        wide = torch.promote_types(first.layout.dtype, torch.float32) == first.layout.dtype
        return fits and wide and not is_fake(first.parameter)

    def _apply(self, members: Sequence[Member], changes: Sequence[Tensor], decay: Tensor) -> None:
        """``W <- decay * W + change``; cautious decay only where the change shrinks the weight."""
        weights = [member.local for member in members]
        if self._in_one_pass():
            add_in_one_pass(weights, changes, decay.item())
        else:
            add(weights, changes, decay, cautious=self.group["cautious"])

    def _plan(self, members: Sequence[Member]) -> Plan:
        group, rule, form = self.group, self.rule, self.members[0].form
        fields = rule.hyper._fields  # type: ignore[attr-defined]
        fixed = {name: group[name] for name in rule.defaults} | {"compute_dtype": self.compute_dtype}
        if "path" in fixed:
            fixed["path"] = path_of(group, self.choice)
        split = form.cut if form else None
        cut_by_rule = split is not None and rule.cuts(split)
        fixed["split"] = split if cut_by_rule else None
        shapes = [(piece.m, piece.n) for piece in form.pieces] if form else [self.members[0].layout.shape]
        hyper = []
        for shape in shapes:
            values = fixed | rule.prepare(shape, group)
            hyper.append(tuple((name, values[name]) for name in fields if name not in rule.scalars))
        size = sum(m.form.count if m.form else m.local.numel() for m in members)
        grad_layout = form.entry.stacked(size) if form else None
        states = []
        for key, state in self.forms[self.members[0]].items():
            layout = state.entry.stacked(size) if form else None
            if layout is not None and key in rule.pending_states:
                layout = layout.partial(self.pending)
            states.append((key, layout, state.pieces[0] if form and state.pieces else None))
        return Plan(
            rule=rule,
            hyper=tuple(hyper),
            maximize=bool(group["maximize"]),
            grad_layout=grad_layout.partial(self.pending) if grad_layout else None,
            change_layout=grad_layout,
            states=tuple(states),
            size=size,
            groups=self._groups,
            split=None if cut_by_rule else split,
            compile=self.compile,
        )

    def _initial_stack(self, key: str, seed: int) -> Tensor:
        if not self.forms[self.members[0]][key].spec.normal:
            return torch.cat([self._zeros(member, key) for member in self.members])
        return torch.cat([initial_entries(m, self.forms[m][key], seed) for m in self.members])

    def _zeros(self, member: Member, key: str) -> Tensor:
        form, state = member.form, self.forms[member][key]
        if form is None or state.spec.dims is None:
            like = member.local.reshape(-1) if form is None else member.fold(member.local)
            return torch.zeros_like(like, dtype=self.state_dtype, memory_format=torch.contiguous_format)
        zeros = scattered(
            torch.zeros(state.entry.shape, dtype=self.state_dtype, device=self.device), state.entry
        )
        return zeros.expand(form.count, *zeros.shape)

    def _capturable(self) -> bool:
        """Whether the host waits for no values of the device in an update."""
        if self.rule.reads_values != "exchange":
            return self.rule.reads_values == "never"
        if (choice := self.choice) is not None:
            return choice.way == "assemble"
        form = self.members[0].form
        return form is not None and not (form.cut is not None and form.travels)

    def _parts(self, members: Sequence[Member], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Local shards of the parameters' shapes as parts of the local stack."""
        if self.rule.elementwise:
            return [tensor.reshape(-1) for tensor in tensors]
        return [member.fold(tensor) for member, tensor in zip(members, tensors, strict=True)]

    def _joined(self, key: str, members: Sequence[Member]) -> Tensor:
        return torch.cat([self._entries[key][member] for member in members])

    def _length(self, member: Member) -> int:
        return member.form.count if member.form else member.local.numel()

    def _split(self, stack: Tensor, members: Sequence[Member], key: str | None) -> Iterator[Tensor]:
        """Views of a local stack, one a member, in the shape of its state ``key`` or of its parameter."""
        parts = torch.split(stack, [self._length(member) for member in members])
        for member, part in zip(members, parts, strict=True):
            if member.form is None:
                yield part.view(member.local.shape)
            else:
                yield member.unfold(part, None if key is None else self.forms[member][key].spec.dims)


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(part, Tensor) for part in (value if isinstance(value, tuple | list) else (value,)))
