"""The ``torch.optim.Optimizer`` face: param groups, schedules, hooks, and a step that is safe on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dion_dtensor.buckets import Bucket, Member, make_buckets
from dion_dtensor.gradients import checked_gradients
from dion_dtensor.layout import StorageLayout
from dion_dtensor.rules import RULES
from dion_dtensor.scale import scale_factor
from dion_dtensor.state import load_states

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
        self.buckets: list[Bucket] = []
        defaults = {"lr": lr, "weight_decay": weight_decay, "cautious": cautious, "maximize": maximize}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its state exists from here on, on all ranks alike.

        Raises:
            ValueError: see the class.
        """
        group = dict(param_group)
        name = group.setdefault("algorithm", self.algorithm)
        if name not in RULES:
            raise ValueError(f"algorithm={name!r} is unknown; choose from {sorted(RULES)}")
        rule = RULES[name]
        own = self._algorithm_options if name == self.algorithm else {}
        for key, default in rule.defaults.items():
            group.setdefault(key, own.get(key, default))
        _check_group({**self.defaults, **group})
        rule.check(group)
        scale_factor(group["scale"], (1, 1))
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            names = added.get("param_names") or [
                f"group {len(self.param_groups) - 1} parameter {index}"
                for index in range(len(added["params"]))
            ]
            members = [Member(n, p, StorageLayout.of(p)) for n, p in zip(names, added["params"], strict=True)]
            for member in members:
                _check_member(member, rule.name, rule.elementwise)
        except Exception:
            self.param_groups.pop()
            raise
        new = make_buckets(rule, added, members, self._bucket_options)
        self.buckets.extend(new)
        for bucket in new:
            for member in bucket.members:
                self.state[member.parameter] = member.states

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
            RuntimeError: on every rank of the mesh, before anything is written, when a gradient is missing on some
                ranks only, is not finite, or does not lie as its parameter does (with ``validate=True``).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for bucket, members, grads in checked_gradients(self.buckets, self.validate):
            bucket.step(members, grads)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load hyperparameters and state; the state is copied into place, in its own dtype.

        Raises:
            ValueError: the state of another algorithm, shape or rank; the message names the parameter.
        """
        own = {id(member.parameter): member for bucket in self.buckets for member in bucket.members}
        members = [own[id(p)] for group in self.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        if len(indices) == len(members):  # otherwise the base class below says what differs
            load_states(members, [state_dict["state"].get(index) for index in indices])
        groups = [bucket.group for bucket in self.buckets]
        positions = [next(i for i, g in enumerate(self.param_groups) if g is group) for group in groups]
        super().load_state_dict({**state_dict, "state": {}})
        for bucket, position in zip(self.buckets, positions, strict=True):
            bucket.group = self.param_groups[position]
            for member in bucket.members:
                self.state[member.parameter] = member.states


def _check_group(group: Mapping[str, Any]) -> None:
    if not float(group["lr"]) >= 0:
        raise ValueError(f"lr={group['lr']} must not be negative")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']} must not be negative")
    if "epsilon" in group and not group["epsilon"] >= 0:
        raise ValueError(f"epsilon={group['epsilon']} must not be negative")


def _check_member(member: Member, algorithm: str, elementwise: bool) -> None:
    layout = member.layout
    if not layout.dtype.is_floating_point:
        raise ValueError(
            f"{member.name} ({layout.describe()}): only real floating-point parameters can be stepped"
        )
    if isinstance(member.parameter, DTensor) and any(p.is_partial() for p in layout.placements):
        raise ValueError(
            f"{member.name} ({layout.describe()}): a parameter cannot be Partial; redistribute it"
        )
    if not elementwise and (len(layout.shape) != 2 or 0 in layout.shape):
        raise ValueError(
            f"{member.name} ({layout.describe()}): {algorithm} takes non-empty matrices [m, n]; give this parameter "
            "to a group with algorithm='adamw' or 'lion' (param_groups does so)"
        )


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
            polynomial = tuple((float(a), float(b), float(c)) for a, b, c in polynomial)
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
    """Dion on any mesh: a rank-r orthonormal update that never assembles a whole matrix.

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
