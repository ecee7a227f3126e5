"""The ``torch.optim.Optimizer`` face: param groups, schedules, hooks, and a step that is safe on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from dion_dtensor.buckets import Bucket, Member, make_buckets
from dion_dtensor.checks import check_group, check_member, check_options
from dion_dtensor.gradients import checked_gradients
from dion_dtensor.layout import StorageLayout
from dion_dtensor.orthonormalize import resolve_polynomial
from dion_dtensor.rules import RULES
from dion_dtensor.state import adopt, check_states, load_states

__all__ = ["Dion", "Muon", "OrthonormalOptimizer"]


class OrthonormalOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups each follow a rule; the base of :class:`Muon` and :class:`Dion`.

    Use the subclasses.  Parameters are tensors or DTensors of any placements on any meshes; the update is that of one
    device.  A group's ``"algorithm"`` names its rule (the optimizer's own by default), and its further entries are
    the rule's hyperparameters.

    Args:
        params: param groups (see :func:`dion_dtensor.param_groups`), parameters, or ``(name, parameter)`` pairs.
        algorithm: the rule of groups that name none.
        options: hyperparameters of ``algorithm``.
        lr, weight_decay, cautious, maximize: defaults of every group.
        seed, compute_dtype, momentum_dtype, compile, validate: see :class:`Muon`.

    Raises:
        ValueError: a hyperparameter out of range, an unknown algorithm, or a parameter that a rule cannot take; the
            message names the parameter, its shape and its placements.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        algorithm: str,
        options: Mapping[str, Any],
        lr: float | Tensor,
        weight_decay: float,
        cautious: bool,
        maximize: bool,
        seed: int,
        compute_dtype: torch.dtype | None,
        momentum_dtype: torch.dtype | None,
        compile: bool,
        validate: bool,
    ) -> None:
        self.algorithm, self.validate = algorithm, validate
        self._algorithm_options = dict(options)
        self._bucket_options = {
            "seed": seed,
            "momentum_dtype": momentum_dtype,
            "compute_dtype": compute_dtype,
            "compile": compile,
        }
        check_options(compute_dtype, momentum_dtype)
        self.buckets: list[Bucket] = []
        defaults = {"lr": lr, "weight_decay": weight_decay, "cautious": cautious, "maximize": maximize}
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
        group = dict(param_group)
        name = group.setdefault("algorithm", self.algorithm)
        if name not in RULES:
            raise ValueError(f"algorithm={name!r} is unknown; choose from {sorted(RULES)}")
        own = self._algorithm_options if name == self.algorithm else {}
        for key, default in RULES[name].defaults.items():
            group.setdefault(key, own.get(key, default))
        check_group({**self.defaults, **group})
        super().add_param_group(group)
        try:
            self._add_buckets(self.param_groups[-1], len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def _add_buckets(self, group: dict[str, Any], position: int) -> None:
        rule = RULES[group["algorithm"]]
        numbered = [f"group {position} parameter {index}" for index in range(len(group["params"]))]
        names = group.get("param_names") or numbered
        members = [Member(n, p, StorageLayout.of(p)) for n, p in zip(names, group["params"], strict=True)]
        for member in members:
            check_member(member, rule)
        new = make_buckets(rule, group, members, self._bucket_options)
        self.buckets.extend(new)
        for member in members:
            self.state[member.parameter] = dict(member.views)

    def _members(self) -> list[Member]:
        """In the order of the groups, which is that of a state dict."""
        own = {id(member.parameter): member for bucket in self.buckets for member in bucket.members}
        return [own[id(parameter)] for group in self.param_groups for parameter in group["params"]]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: on every rank of all meshes, before anything is written, when a gradient is missing on some
                ranks only, is not finite, or does not lie as its parameter does (with ``validate=True``).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        adopt(self._members(), self.state)
        for bucket, members, grads in checked_gradients(self.buckets, self.validate):
            bucket.step(members, grads)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load hyperparameters and state, all or nothing; the state is copied into place, in its own dtype.

        Raises:
            ValueError: groups of other sizes, or the state of another algorithm, shape or rank; the message names the
                parameter.
        """
        loaded: list[Mapping[str, Any] | None] = []

        # As hooks, so that those of the user meet the same state as with any other optimizer.
        def before(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            sizes = [len(group["params"]) for group in given["param_groups"]]
            if sizes != [len(group["params"]) for group in self.param_groups]:
                return given  # the base class says what differs
            groups = []
            for own, group in zip(self.param_groups, given["param_groups"], strict=True):
                if group.get("algorithm") != own["algorithm"]:
                    first = next(m for m in self._members() if m.parameter is own["params"][0])
                    raise ValueError(
                        f"{first.name} ({first.layout.describe()}) and its group follow {own['algorithm']!r}; the "
                        f"loaded group follows {group.get('algorithm')!r}"
                    )
                kept = {key: value for key, value in own.items() if key != "params"}
                groups.append({**kept, **group})
                check_group(groups[-1])
            indices = [index for group in groups for index in group["params"]]
            loaded.extend(given["state"].get(index) for index in indices)
            check_states(self._members(), loaded)
            return {**given, "param_groups": groups, "state": {}}

        def after(optimizer: torch.optim.Optimizer) -> None:
            members = self._members()
            load_states(members, loaded)
            self.state.update({member.parameter: dict(member.views) for member in members})
            for bucket, position in zip(self.buckets, positions, strict=True):
                bucket.group = self.param_groups[position]

        positions = [
            next(i for i, group in enumerate(self.param_groups) if group is bucket.group)
            for bucket in self.buckets
        ]
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
        own = ("algorithm", "validate", "_algorithm_options", "_bucket_options")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_bucket_options" not in state:  # load_state_dict comes by as well
            return
        states = dict(self.state)
        self.buckets = []
        for position, group in enumerate(self.param_groups):
            self._add_buckets(group, position)
        members = self._members()
        load_states(members, [states[member.parameter] for member in members])


class Muon(OrthonormalOptimizer):
    """Muon on any mesh: momentum, orthonormalized as whole matrices.

    Source: Jordan et al. 2024 (KellerJordan/Muon); conventions of microsoft/dion by default.

    Args:
        params: param groups (see :func:`dion_dtensor.param_groups`), matrices ``[m, n]``, or ``(name, matrix)`` pairs.
        lr: base learning rate, a float or a 0-d tensor.
        mu: momentum factor, in [0, 1).
        nesterov: look one momentum step ahead.
        momentum: "sum" (``M <- mu M + G``) or "ema" (``M <- mu M + (1 - mu) G``).
        polynomial: "polar_express", "keller", "you", "polar_express_gns", "cans", or triples ``(a, b, c)``.
        epsilon: keeps a zero momentum at zero; ``epsilon_rule`` "add" or "clamp" says where it stands.
        epsilon_rule: see :func:`dion_dtensor.orthonormalize.newton_schulz`.
        norm_factor: factor on the norm before the polynomial; None for the one that belongs to the polynomial.
        scale: "spectral_norm" (sqrt(m/n)), "keller" (sqrt(max(1, m/n))), "moonlight" (0.2 sqrt(max(m, n))), "nvidia"
            (sqrt(max(m, n))), or None, by the full shape.
        weight_decay: decoupled, by the base ``lr``, before the update.
        cautious: decay only where the update shrinks the weight.
        maximize: ascend.
        compute_dtype: dtype of the polynomial; None for bfloat16 on CUDA and float32 elsewhere.  float64 parameters are
            computed in float64.
        momentum_dtype: dtype of the state; None for the parameter's.
        compile: run each bucket's update under ``torch.compile(fullgraph=True)``.
        validate: before each step, let all ranks agree that every gradient is present, finite and laid out like its
            parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        nesterov: bool = False,
        *,
        momentum: str = "sum",
        polynomial: str | tuple[tuple[float, float, float], ...] = "polar_express",
        epsilon: float = 1e-8,
        epsilon_rule: str = "add",
        norm_factor: float | None = None,
        scale: str | None = "spectral_norm",
        weight_decay: float = 0.01,
        cautious: bool = False,
        maximize: bool = False,
        compute_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        compile: bool = True,
        validate: bool = True,
    ) -> None:
        if not isinstance(polynomial, str):
            polynomial = resolve_polynomial(polynomial)
        options = {
            "mu": mu,
            "nesterov": nesterov,
            "momentum": momentum,
            "polynomial": polynomial,
            "epsilon": epsilon,
            "epsilon_rule": epsilon_rule,
            "norm_factor": norm_factor,
            "scale": scale,
        }
        super().__init__(
            params,
            algorithm="muon",
            options=options,
            lr=lr,
            weight_decay=weight_decay,
            cautious=cautious,
            maximize=maximize,
            seed=0,
            compute_dtype=compute_dtype,
            momentum_dtype=momentum_dtype,
            compile=compile,
            validate=validate,
        )


class Dion(OrthonormalOptimizer):
    """Dion on any mesh: a rank-r orthonormal update; of a matrix ``[m, n]`` only ``[max(m, n), r]`` is assembled.

    Source: Ahn et al., arXiv 2504.05295; conventions of microsoft/dion.

    Args:
        params, lr, weight_decay, cautious, maximize, momentum_dtype, compile, validate: as for :class:`Muon`.
        mu: 1 minus the part of the approximation that the error feedback takes from the momentum.
        rank_fraction: r = rank_multiple * ceil(rank_fraction * min(m, n) / rank_multiple), at most min(m, n).
        rank_multiple: see ``rank_fraction``.
        epsilon: added to the column norms of Q.
        scale: as for :class:`Muon`.
        seed: of the initial Q, which depends on (seed, name, row, column) only.
        compute_dtype: dtype of the products P R^T and P Q^T; None for bfloat16 on CUDA and float32 elsewhere.  M Q,
            M^T P, the QR and the norms stay in the state's dtype or float32, whichever is wider.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        *,
        rank_fraction: float = 1.0,
        rank_multiple: int = 1,
        epsilon: float = 1e-8,
        scale: str | None = "spectral_norm",
        weight_decay: float = 0.01,
        cautious: bool = False,
        maximize: bool = False,
        seed: int = 0,
        compute_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        compile: bool = True,
        validate: bool = True,
    ) -> None:
        options = {
            "mu": mu,
            "rank_fraction": rank_fraction,
            "rank_multiple": rank_multiple,
            "epsilon": epsilon,
            "scale": scale,
        }
        super().__init__(
            params,
            algorithm="dion",
            options=options,
            lr=lr,
            weight_decay=weight_decay,
            cautious=cautious,
            maximize=maximize,
            seed=seed,
            compute_dtype=compute_dtype,
            momentum_dtype=momentum_dtype,
            compile=compile,
            validate=validate,
        )
