"""The ``torch.optim.Optimizer`` face: param groups, schedules, hooks, and a step that is safe on every rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Unpack, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dion_dtensor.arithmetic import own_arithmetic
from dion_dtensor.atomic import undone_on_failure
from dion_dtensor.buckets import Bucket
from dion_dtensor.captured import Memory
from dion_dtensor.checks import (
    check_group,
    check_member,
    check_options,
    check_why_nothing_steps,
    unknown_arguments,
)
from dion_dtensor.common import DECAY, Common
from dion_dtensor.exchanged import all_exchanged, names_of
from dion_dtensor.gradients import checked_gradients
from dion_dtensor.layout import StorageLayout
from dion_dtensor.matrices import Heads
from dion_dtensor.members import Member, form_of
from dion_dtensor.rules import RULES
from dion_dtensor.sorting import make_buckets
from dion_dtensor.split_text import parse_split
from dion_dtensor.state import adopt, check_states, load_states, loaded_groups

__all__ = ["OrthonormalOptimizer"]


class OrthonormalOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups each follow a rule; the base of :class:`Muon` and its kind.

    Use the subclasses.  Parameters are tensors or DTensors of any placements on any meshes; the update is that of one
    device.  A group's ``"algorithm"`` names its rule (the optimizer's own by default), and its further entries are
    the rule's hyperparameters.

    Args:
        params: param groups (see :func:`dion_dtensor.param_groups`), parameters, or ``(name, parameter)`` pairs.
        algorithm: the rule of groups that name none.
        options: hyperparameters of ``algorithm``.
        lr: default of every group.
        seed: of initial values.
        resync_every: steps after which a momentum that differs among ranks is averaged; None for never.
        common: see :class:`~dion_dtensor.common.Common`.

    Raises:
        ValueError: a hyperparameter out of range, an unknown algorithm, or a parameter that a rule cannot take; the
            message names the parameter, its shape and its placements.
    """

    atomic = False  # of optimizers that were pickled before there was a choice

    def __init__(
        self,
        params: Iterable[Any],
        *,
        algorithm: str,
        options: Mapping[str, Any],
        lr: float | Tensor,
        seed: int = 0,
        resync_every: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.algorithm, self.validate = algorithm, common.get("validate", True)
        self.atomic = common.get("atomic", False)
        self.averaged, self.resync_every, self._steps = common.get("averaged", True), resync_every, 0
        self.replicate_mesh = _mesh_of(common.get("replicate_mesh"))
        self._algorithm_options = dict(options)
        self._bucket_options = {
            "seed": seed,
            "momentum_dtype": common.get("momentum_dtype"),
            "compute_dtype": common.get("compute_dtype"),
            "compile": common.get("compile", True),
            "max_bucket_bytes": common.get("max_bucket_bytes"),
        }
        unknown = set(common) - set(Common.__annotations__)
        if unknown:
            raise TypeError(
                unknown_arguments(type(self).__name__, unknown, {"lr", *options, *Common.__annotations__})
            )
        if mistaken := set(options) - set(RULES[algorithm].defaults):
            raise TypeError(unknown_arguments(algorithm, mistaken, set(RULES[algorithm].defaults)))
        self.capture = common.get("capture", False)
        flags = {name: getattr(self, name) for name in ("capture", "validate", "atomic", "averaged")}
        check_options({**self._bucket_options, **flags, "resync_every": resync_every})
        self._graph_memory: dict[torch.device, Memory] | None = {} if self.capture else None
        self.buckets: list[Bucket] = []
        decay = {key: common.get(key, default) for key, default in DECAY.items()}
        defaults = {"lr": lr, **decay}
        super().__init__(params, defaults)
        followed = {group["algorithm"] for group in self.param_groups}
        others = {name for name in followed if not RULES[name].elementwise and name != algorithm}
        if algorithm not in followed and others:
            raise ValueError(
                f"no group follows {algorithm!r}, but some follow {sorted(others)}; give param_groups "
                f"algorithm={algorithm!r}, or use the optimizer of that name"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its state exists from here on, on all ranks alike.

        Raises:
            ValueError: see the class.
        """
        self._take_over()
        group = dict(param_group)
        name = group.setdefault("algorithm", self.algorithm)
        if name not in RULES:
            raise ValueError(f"algorithm={name!r} is unknown; choose from {sorted(RULES)}")
        own = self._algorithm_options if name == self.algorithm else {}
        for key, default in RULES[name].defaults.items():
            group.setdefault(key, own.get(key, default))
        reasons = group.pop("reasons", {})  # not kept in the group: it would be saved for each parameter
        if not _named(group):
            group.pop("param_names", None)  # of the group that this one was copied from
        split = parse_split(group.get("split"))
        # One head is the whole matrix, whose state has no dim of heads on any layout.
        group["split"] = None if split is None or split == Heads(1) else str(split)
        check_group({**self.defaults, **group})
        super().add_param_group(group)
        try:
            self._add_buckets(self.param_groups[-1], len(self.param_groups) - 1, reasons)
        except Exception:
            self.param_groups.pop()
            raise

    @torch.inference_mode(False)  # state that is made within could not be written to outside of it
    def _add_buckets(self, group: dict[str, Any], position: int, reasons: Mapping[str, str]) -> None:
        rule = RULES[group["algorithm"]]
        names = names_of(group, position)
        split = parse_split(group["split"])
        members = []
        for name, parameter in zip(names, group["params"], strict=True):
            try:
                layout = StorageLayout.of(parameter, self.replicate_mesh)
            except ValueError as error:
                raise ValueError(f"{name} {list(parameter.shape)}: {error}") from error
            member = Member(name, parameter, layout, why=reasons.get(name, ""))
            check_member(member, rule, split)
            if not rule.elementwise:
                member.form = form_of(member.layout, split)
            members.append(member)
        new = make_buckets(rule, group, members, self._bucket_options, self._graph_memory)
        self.buckets.extend(new)
        for member in members:
            self.state[member.parameter] = {**self.state[member.parameter], **member.views}

    def members(self) -> list[Member]:
        """What the engine knows of each parameter, in the order of the groups, which is that of a state dict.

        As ever with an optimizer, what was taken out of the groups is stepped no more, and a group may be replaced.

        Raises:
            RuntimeError: a group holds parameters that were not there when the optimizer was made, or some of those
                that are stepped together are now in a group of their own.
        """
        self._take_over()
        own = {id(member.parameter): (member, bucket) for bucket in self.buckets for member in bucket.members}
        members, groups = [], dict[Bucket, dict[str, Any]]()
        for position, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if id(parameter) not in own:
                    raise RuntimeError(
                        f"parameter {index} of group {position} ({group['algorithm']}), now "
                        f"{StorageLayout.of(parameter).describe()}, is not the one that the optimizer was made with; "
                        "make the optimizer after the model is wrapped and sharded (or exchange all of them "
                        "before the first step)"
                    )
                member, bucket = own[id(parameter)]
                members.append(member)
                if groups.setdefault(bucket, group) is not group or group["algorithm"] != bucket.rule.name:
                    raise RuntimeError(
                        f"{member.name} ({member.layout.describe()}) was stepped together with others that are in "
                        f"another group than {position} ({group['algorithm']}) now; make the optimizer anew with these "
                        "groups, and load the state of this one"
                    )
        for bucket, group in groups.items():
            bucket.follow(group)
        rest = iter(members)
        for group in self.param_groups:
            names = [next(rest).name for _ in group["params"]]
            if "param_names" in group and group["param_names"] != names:
                group["param_names"] = names  # users take parameters out, and leave the list of names
        return members

    def _take_over(self) -> None:
        """Follow parameters that were all exchanged before the first step, as Accelerate does to shard a model.

        Their state goes along, by name; that of tensors without data is made anew.
        """
        if self._steps or not self.buckets:
            return
        old = all_exchanged(self.param_groups, self.buckets)
        if old is None:
            return
        adopt([one for one, _ in old.values()], self.state)
        before = self.buckets, self.state
        reasons = {name: one.why for name, (one, _) in old.items()}
        self.buckets, self.state = [], defaultdict(dict)
        try:
            for position, group in enumerate(self.param_groups):
                self._add_buckets(group, position, reasons)
            pairs = [(one, old[one.name][0]) for bucket in self.buckets for one in bucket.members]
            real = [(new, one.views) for new, one in pairs if one.layout.device.type != "meta"]
            load_states([new for new, _ in real], [views for _, views in real])
            for new, one in pairs:
                self.state[new.parameter] = {**before[1][one.parameter], **new.views}
        except Exception:  # whatever it is, it is raised again with all as it was
            self.buckets, self.state = before
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # The updates are compiled each by itself, also where the caller compiles the whole; torch does not type this.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; autocast and TF32 change the closure alone.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            ValueError: a hyperparameter of a group has left its range.
            RuntimeError: on every rank of all meshes, before anything is written, when a gradient is missing on some
                ranks only, is not finite, or does not lie as its parameter does (with ``validate=True``).  Also when a
                group holds parameters that were not there when the optimizer was made, and within a CUDA graph that
                the caller records.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "this step would become part of a CUDA graph, which would repeat the hyperparameters and counts of "
                "now; take it outside of the graph, and make the optimizer with capture=True: it records its own"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members, refusal = list[Member](), None
        with own_arithmetic({bucket.device.type for bucket in self.buckets}):
            try:
                members = self.members()
                for group in self.param_groups:  # schedules write into them
                    check_group(group, foreign=True, wait=False)
                adopt(members, self.state)
            except (RuntimeError, ValueError) as error:
                refusal = error  # raised once the other ranks know, which would wait for this one
            work = checked_gradients(
                self.buckets, members, self.param_groups, self.validate, self.averaged, refusal
            )
            if not work and not self._steps:
                check_why_nothing_steps(members)
            self._steps += 1  # at once: half a step that is not undone has begun to train these parameters
            try:
                with undone_on_failure(self.buckets) if self.atomic else nullcontext():
                    for bucket, stepped, grads, pending in work:
                        bucket.step(stepped, grads, pending)
                    if self.resync_every and self._steps % self.resync_every == 0:
                        self.synchronize()
            except BaseException:
                self._steps -= self.atomic
                raise
        return loss

    @torch.no_grad()
    def synchronize(self) -> None:
        """Average a momentum that differs among ranks (see :class:`Dion`); all ranks must call it together."""
        for bucket in self.buckets:
            bucket.synchronize()

    def release_graphs(self) -> None:
        """Give up all recorded CUDA graphs; further steps record them anew."""
        for bucket in self.buckets:
            if bucket.recorder is not None:
                bucket.recorder.forget()
        for memory in (self._graph_memory or {}).values():
            memory.clear()

    def state_dict(self) -> dict[str, Any]:
        """As ever; where a momentum differs among ranks it is averaged first, so all ranks must call it together."""
        held = {member.parameter for member in self.members()}
        self.synchronize()
        every = self.state
        kept = {key: own for key, own in every.items() if not isinstance(key, Tensor) or key in held}
        self.state = defaultdict(dict, kept)
        try:
            return super().state_dict()
        finally:
            self.state = every

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load hyperparameters and state, all or nothing; the state is copied into place, in its own dtype.

        Raises:
            ValueError: groups of other sizes, parameters of other names (but for wrappers), or the state of another
                algorithm, shape or rank; the message names the parameter.
            RuntimeError: hyperparameters in the loaded groups that the state of a frozen parameter cannot follow.
        """
        loaded: list[Mapping[str, Any] | None] = []

        # As hooks, so that those of the user meet the same state as with any other optimizer.
        def before(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            sizes = [len(group["params"]) for group in given["param_groups"]]
            if sizes != [len(group["params"]) for group in self.param_groups]:
                return given  # the base class says what differs
            members = self.members()
            groups = loaded_groups(self.param_groups, given["param_groups"], members)
            loaded.extend(given["state"].get(index) for group in groups for index in group["params"])
            check_states(members, loaded)
            for own, group in zip(self.param_groups, groups, strict=True):
                for bucket in self.buckets:
                    if bucket.group is own:
                        bucket.check(group)
            own_keys = dict(zip((i for group in groups for i in group["params"]), members, strict=True))
            further = {
                key: {name: value for name, value in state.items() if name not in own_keys[key].views}
                if key in own_keys
                else state
                for key, state in given["state"].items()
            }
            return {**given, "param_groups": groups, "state": further}

        def after(optimizer: torch.optim.Optimizer) -> None:
            members = self.members()
            load_states(members, loaded)
            for member in members:
                self.state[member.parameter] = {**self.state[member.parameter], **member.views}

        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "algorithm",
            "validate",
            "atomic",
            "averaged",
            "resync_every",
            "replicate_mesh",
            "_steps",
            "_algorithm_options",
            "_bucket_options",
            "capture",
        )
        reasons = {member.parameter: member.why for member in self.members()}
        pending = {
            member.parameter: bucket.pending
            for bucket in self.buckets
            for member in bucket.members
            if bucket.pending
        }
        kept = {**{name: getattr(self, name) for name in own}, "_pending": pending, "_reasons": reasons}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_bucket_options" not in state:  # load_state_dict comes by as well
            return
        states, why = dict(self.state), self.__dict__.pop("_reasons")
        self.buckets, self._graph_memory = [], {} if self.capture else None
        for position, group in enumerate(self.param_groups):
            pairs = zip(names_of(group, position), group["params"], strict=True)
            self._add_buckets(group, position, {name: why[parameter] for name, parameter in pairs})
        members = self.members()
        load_states(members, [states.get(member.parameter) for member in members])
        pending = self.__dict__.pop("_pending")
        for bucket in self.buckets:
            axes = {axis for member in bucket.members for axis in pending.get(member.parameter, ())}
            bucket.pending = tuple(sorted(axes))


def _named(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of a group that is to be added come with their names."""
    params = group["params"]
    return isinstance(params, list | tuple) and bool(params) and isinstance(params[0], tuple)


def _mesh_of(replicas: DeviceMesh | ProcessGroup | None) -> DeviceMesh | None:
    if replicas is None or isinstance(replicas, DeviceMesh):
        return replicas
    return DeviceMesh.from_group(
        replicas, "cuda" if torch.cuda.is_available() and replicas.name() == "nccl" else "cpu"
    )
