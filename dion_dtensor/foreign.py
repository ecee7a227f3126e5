"""What torch.optim.Muon, torch.optim.AdamW and microsoft/dion save, in the words of this package.

Sources: torch/optim/_muon.py and adam.py (2.14), microsoft/dion at 0a059a4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dion_dtensor.matrices import Experts, Flatten, Heads, Rows
from dion_dtensor.orthonormalize.polynomial import POLYNOMIALS
from dion_dtensor.state import without_wrappers

__all__ = ["MICROSOFT", "Parameter", "read"]

# Their state keys, by our rule and key; the first is of the parameter's shape.
TORCH: dict[str, dict[str, str]] = {
    "muon": {"momentum": "momentum_buffer"},
    "adamw": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
}
MICROSOFT: dict[str, dict[str, str]] = {
    "muon": {"momentum": "momentum"},
    "normuon": {"momentum": "momentum", "variance": "variance_neuron"},
    "dion": {"momentum": "momentum", "Q": "Q"},
    "dion2": {"momentum": "momentum"},
    "dion3": {"momentum": "momentum", "variance": "variance_neuron"},
    "adamw": {"exp_avg": "momentum", "exp_avg_sq": "variance"},
    "lion": {"exp_avg": "momentum"},
}
MICROSOFT_NAMES = {"nordion2": "dion3"}

# Our scale by their adjust_lr_fn and adjust_lr.
TORCH_SCALES = {
    None: "keller",
    "original": "keller",
    "match_rms_adamw": "moonlight",
    "spectral_unclamped": "spectral_norm",
}
MICROSOFT_SCALES = {"spectral_norm": "spectral_norm", "rms_norm": "moonlight", None: None}
# Our settings by the keys of microsoft/dion's groups, and those that its code has fixed.
MICROSOFT_SETTINGS = {
    "mu": "mu",
    "ef_decay": "mu",
    "nesterov": "nesterov",
    "fraction": "fraction",
    "muon_beta2": "beta2",
    "epsilon": "epsilon",
}
MICROSOFT_FIXED = {
    "momentum": "sum",
    "bias_correction": False,
    "epsilon_rule": "add",
    "variance_epsilon": 1e-8,
    "right_factor": "normalize",
    "weight_storage": "out_in",
    "maximize": False,
}


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter of an optimizer, ours or a saved one.

    Attributes:
        label: for messages.
        name: without wrappers; None where the optimizer was made of bare parameters.
        algorithm: our name of its rule.
        shape: None of a saved one that never had a gradient.
        place: the number of its param group, counted through all state dicts.
        settings: by our names; of a saved one as far as they are saved, without lr and weight_decay.
        state: of a saved one, by our keys; empty if it never had a gradient.
    """

    label: str
    name: str | None
    algorithm: str
    shape: tuple[int, ...] | None
    place: int
    settings: Mapping[str, Any]
    state: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.label} {'without state' if self.shape is None else list(self.shape)}"


def read(state_dicts: Sequence[Mapping[str, Any]]) -> list[Parameter]:
    """The parameters of saved optimizers, in the order of their groups.

    Raises:
        ValueError: a group that none of the three saved, what AdamW here does not have, or a state that lacks a key.
    """
    groups = [
        (number, saved, group) for number, saved in enumerate(state_dicts) for group in saved["param_groups"]
    ]
    # torch.distributed.checkpoint has names in place of numbers
    named = [group.get("param_names") or group["params"] for _, _, group in groups]
    given = [name for names in named for name in names if isinstance(name, str)]
    plain = dict(zip(given, without_wrappers(given), strict=True))
    found = []
    for place, (number, saved, group) in enumerate(groups):
        where = f"group {place} of the saved ones (in state dict {number})"
        algorithm, keys, settings_of = _rule(where, group)
        for key, name in zip(group["params"], named[place], strict=True):
            state = saved["state"].get(key) or {}
            label = name if isinstance(name, str) else f"parameter {key} of state dict {number}"
            if state and (missing := set(keys.values()) - set(state)):
                raise ValueError(
                    f"{label} ({algorithm}): the saved state lacks {sorted(missing)}; it has {sorted(state)}"
                )
            taken = {ours: state[theirs] for ours, theirs in keys.items()} if state else {}
            shape = tuple(next(iter(taken.values())).shape) if taken else None
            if taken and algorithm == "adamw":
                # torch counts for each parameter; so does microsoft/dion, formerly for each group
                count = state.get("step_dev", state.get("step", group.get("step")))
                taken["step"] = torch.tensor(float(count), device="cpu")
            settings = settings_of(algorithm, group, shape)
            found.append(Parameter(label, plain.get(name), algorithm, shape, place, settings, taken))
    return found


Settings = Callable[[str, Mapping[str, Any], tuple[int, ...] | None], dict[str, Any]]


def _rule(where: str, group: Mapping[str, Any]) -> tuple[str, Mapping[str, str], Settings]:
    """Our name of the rule of a saved group, their state keys by ours, and what reads the settings."""
    if "ns_coefficients" in group:
        return "muon", TORCH["muon"], _torch
    if "amsgrad" in group and "betas" in group:
        if group["amsgrad"]:
            raise ValueError(
                f"{where} has amsgrad=True, which AdamW here does not have; set it to False there to go on without"
            )
        if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", True):
            raise ValueError(
                f"{where} is torch.optim.Adam's, which adds the weight decay to the gradient; AdamW here does not"
            )
        return "adamw", TORCH["adamw"], _torch
    name = MICROSOFT_NAMES.get(group.get("algorithm", ""), group.get("algorithm"))
    if name not in MICROSOFT or "step" not in group:
        raise ValueError(
            f"{where}: neither torch.optim.Muon, torch.optim.AdamW nor microsoft/dion saved it; it has {sorted(group)}"
        )
    return name, MICROSOFT[name], _microsoft


def _torch(algorithm: str, group: Mapping[str, Any], shape: tuple[int, ...] | None) -> dict[str, Any]:
    if algorithm == "adamw":
        maximize = group.get("maximize", False)
        return {"betas": group["betas"], "epsilon": group["eps"], "maximize": maximize, "cautious": False}
    steps = (tuple(float(c) for c in group["ns_coefficients"]),) * int(group["ns_steps"])
    return {
        "momentum": "ema",  # so its code; its docstring says a sum
        "bias_correction": False,
        "mu": group["momentum"],
        "nesterov": group["nesterov"],
        "polynomial": next((name for name, known in POLYNOMIALS.items() if known == steps), steps),
        "norm_factor": 1.0,
        "epsilon": group["eps"],
        "epsilon_rule": "clamp",
        "scale": TORCH_SCALES.get(group["adjust_lr_fn"], group["adjust_lr_fn"]),
        "weight_storage": "out_in",
        "split": None,
        "maximize": False,
        "cautious": False,
    }


def _microsoft(algorithm: str, group: Mapping[str, Any], shape: tuple[int, ...] | None) -> dict[str, Any]:
    settings = {ours: group[theirs] for theirs, ours in MICROSOFT_SETTINGS.items() if theirs in group}
    settings |= MICROSOFT_FIXED | {"cautious": group.get("cautious_wd", False)}
    if algorithm in ("adamw", "lion"):
        betas = {"betas": (group["beta1"], group["beta2"])} if "beta1" in group else {}
        return settings | betas
    if algorithm == "dion":
        settings["scale"] = "spectral_norm"
    elif "adjust_lr" in group:
        settings["scale"] = MICROSOFT_SCALES.get(group["adjust_lr"], group["adjust_lr"])
    if shape is not None:
        settings["split"] = _microsoft_split(group, len(shape))
    return settings


def _microsoft_split(group: Mapping[str, Any], ndim: int) -> str | None:
    if (group.get("num_heads") or 1) > 1:
        return str(Heads(group["num_heads"]))
    if group.get("split_sizes"):
        return str(Rows(*group["split_sizes"]))
    if ndim > 2:
        return str(Flatten() if group.get("flatten") else Experts())
    return None
