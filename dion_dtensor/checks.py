"""Refusals, each with the name of what is wrong and the way out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from dion_dtensor.common import DECAY
from dion_dtensor.matrices import Split
from dion_dtensor.members import Member
from dion_dtensor.rules import RULES, Rule
from dion_dtensor.scale import scale_factor

__all__ = ["check_group", "check_member", "check_options", "check_why_nothing_steps", "unknown_arguments"]

# What every group may hold besides the hyperparameters of its rule; the last line is the schedulers'.
COMMON = {
    "params",
    "param_names",
    "algorithm",
    "reasons",
    "split",
    "name",
    "lr",
    "weight_decay",
    "cautious",
    "maximize",
}
SCHEDULED = {"initial_lr", "max_lr", "min_lr", "swa_lr"}
BASE_CLASS = {"differentiable", "foreach", "fused", "capturable"}

SCALAR = "give it to a group with algorithm='adamw' or 'lion' (param_groups does so)"

COMPUTE_DTYPES = (None, torch.bfloat16, torch.float32, torch.float64)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse dtypes that lose more than rounding, counts below one, and flags that are neither true nor false.

    Raises:
        ValueError: names the option.
    """
    for name in ("compute_dtype", "momentum_dtype"):
        dtype = options[name]
        if dtype not in COMPUTE_DTYPES:  # float16 overflows on what gradients hold
            raise ValueError(f"{name}={dtype} must be torch.bfloat16, torch.float32, torch.float64 or None")
    for name in ("max_bucket_bytes", "resync_every"):
        count = options[name]
        if count is not None and (not _is_number(count, Integral) or count < 1):
            raise ValueError(f"{name}={count!r} must be a positive whole number, or None")
    if not _is_number(options["seed"], Integral):
        raise ValueError(f"seed={options['seed']!r} must be a whole number")
    for name in ("compile", "capture", "validate", "atomic", "averaged"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name}={options[name]!r} must be True or False")
    if options["capture"] and not options["compile"]:
        raise ValueError("capture=True needs compile=True: graphs are recorded of compiled updates alone")


def check_group(group: Mapping[str, Any], foreign: bool = False, wait: bool = True) -> None:
    """Refuse a param group with hyperparameters out of range, or that its rule does not have.

    Args:
        group: with its algorithm.
        foreign: whether keys that the rule does not have are let pass.
        wait: whether a learning rate or decay on a GPU is looked at, for which the host waits.

    Raises:
        ValueError: names the hyperparameter.
    """
    rule = RULES[group["algorithm"]]
    unknown = set(group) - COMMON - SCHEDULED - BASE_CLASS - set(rule.defaults)
    if unknown and not foreign:
        raise ValueError(
            f"{sorted(unknown)} are no hyperparameters of {rule.name!r}; it has "
            f"{sorted(set(rule.defaults) | {'lr', 'weight_decay', 'cautious', 'maximize'})}"
        )
    for name, default in {**rule.defaults, "lr": 0.0, **DECAY}.items():
        value = group[name]
        if isinstance(default, bool) and value not in (True, False):  # 1 and 0 count as they ever did
            raise ValueError(f"{name}={value!r} must be True or False")
        if isinstance(default, float) and not _is_number(value, Real | Tensor):
            raise ValueError(f"{name}={value!r} must be a number")
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor of one element, not of shape {list(value.shape)}"
            )
        unseen = isinstance(value, Tensor) and value.device.type != "cpu" and not wait
        if not unseen and not 0 <= float(value) < math.inf:
            raise ValueError(f"{name}={value} must be finite and not negative")
    if "epsilon" in group and not 0 < group["epsilon"] < math.inf:
        raise ValueError(f"epsilon={group['epsilon']} must be finite and positive")
    if "scale" in group:
        scale_factor(group["scale"], (1, 1), group.get("weight_storage", "out_in"))
    rule.check(group)


def _is_number(value: Any, kinds: Any) -> bool:
    """Python counts True and False as numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)


KEYWORDS = {
    "momentum": "the factor of the momentum is mu",
    "beta": "the factor of the momentum is mu",
    "beta1": "the factor of the momentum is mu",
    "betas": "betas belong to the group that AdamW steps, the last one of param_groups: groups[-1]['betas'] = ...",
    "eps": "what is added to the norm is epsilon",
    "ns_steps": "the number of iterations is that of the polynomial's triples",
    "ns_coefficients": "the coefficients are those of polynomial, a name or triples (a, b, c)",
    "adjust_lr_fn": "the factor for a shape is scale: 'keller' for 'original', 'moonlight' for 'match_rms_adamw'",
    "learning_rate": "the learning rate is lr",
    "rank": "the rank is rank_fraction of the shorter side",
    "adjust_lr": "the factor for a shape is scale",
    "distributed_mesh": "a DTensor carries its mesh; what replicates plain tensors is replicate_mesh",
}
"""What those are called here that other implementations take."""


def unknown_arguments(taker: str, unknown: set[str], known: set[str]) -> str:
    """For an error: what is not taken, what it may mean, and what is taken."""
    hints = "".join(f"; {KEYWORDS[name]}" for name in sorted(unknown) if name in KEYWORDS)
    return f"{taker} takes no {', '.join(sorted(unknown))}{hints}. It takes {', '.join(sorted(known))}"


def check_member(member: Member, rule: Rule, split: Split | None) -> None:
    """Refuse a parameter that its rule cannot step.

    Raises:
        ValueError: names the parameter, its shape and its placements.
    """
    layout = member.layout
    where = f"{member.name} ({layout.describe()})"
    if not layout.dtype.is_floating_point:
        raise ValueError(f"{where}: only real floating-point parameters can be stepped")
    device, mesh = layout.device.type, layout.mesh
    if mesh is not None and device not in (mesh.device_type, "meta"):
        raise ValueError(
            f"{where}: it lies on the {device}, its mesh is of {mesh.device_type} devices, as FSDP2's CPUOffloadPolicy "
            "or another device's replicate_mesh has it, and DTensor would take what is computed from one to the other; "
            "shard without an offload_policy, on a mesh of the parameters' devices"
        )
    if any(placement.is_partial() for placement in layout.placements):
        raise ValueError(f"{where}: a parameter cannot be Partial; redistribute it")
    if rule.elementwise:
        return
    if 0 in layout.shape:
        raise ValueError(f"{where}: {rule.name} takes no empty parameter; {SCALAR}")
    if split is not None:
        try:
            split.pieces(layout.shape)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    elif len(layout.shape) > 2:
        raise ValueError(
            f"{where}: {rule.name} takes matrices [m, n]; say with the group's split='experts' or 'flatten' (a "
            f"convolution) how this parameter is cut into matrices, or {SCALAR}"
        )
    elif len(layout.shape) < 2:
        raise ValueError(f"{where}: {rule.name} takes matrices [m, n]; {SCALAR}")


def check_why_nothing_steps(members: Sequence[Member]) -> None:
    """Of a first step without any gradient.

    Raises:
        RuntimeError: a parameter has no data, so that it has been replaced.
    """
    why = "were the model's parameters replaced after the optimizer was made (to_empty, assign=True)?"
    for member in members:
        if member.parameter.is_meta:
            raise RuntimeError(
                f"{member.name} ({member.layout.describe()}) has neither data nor gradient; {why} Make the optimizer "
                "after that"
            )
    if members:
        warnings.warn(f"no parameter of the optimizer has a gradient at its first step; {why}", stacklevel=4)
