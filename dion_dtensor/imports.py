"""State of other implementations, taken over where the mathematics is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dion_dtensor.optimizer import OrthonormalOptimizer

__all__ = ["import_state_dict"]

# Their state keys, by our rule and key.
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


def import_state_dict(optimizer: OrthonormalOptimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of torch.optim.Muon or of microsoft/dion's optimizers, as ``optimizer.load_state_dict`` takes it.

    Hyperparameters stay those of ``optimizer``; they must mean the same as the saved ones.

    Args:
        optimizer: of this package, with the parameters in the order in which the other one had them.
        state_dict: what the other one's ``state_dict()`` gave.

    Returns:
        A state dict of ``optimizer``.

    Raises:
        ValueError: another number of parameters, another algorithm, a momentum of another kind, or state that neither
            of the two has; the message names the parameter.
    """
    theirs = [(group, index) for group in state_dict["param_groups"] for index in group["params"]]
    ours = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if len(theirs) != len(ours):
        raise ValueError(f"the saved optimizer has {len(theirs)} parameters, this one has {len(ours)}")
    names = {id(m.parameter): m.name for bucket in optimizer.buckets for m in bucket.members}
    result = optimizer.state_dict()
    for position, ((saved, index), (group, parameter)) in enumerate(zip(theirs, ours, strict=True)):
        where = f"{names[id(parameter)]} {list(parameter.shape)}"
        state = state_dict["state"].get(index)
        if state is None:
            continue  # it never had a gradient
        keys = _keys(where, group, saved, state)
        missing = set(keys.values()) - set(state)
        if missing:
            raise ValueError(f"{where}: the saved state lacks {sorted(missing)}; it has {sorted(state)}")
        own = result["state"][position]
        for ours_, theirs_ in keys.items():
            if tuple(state[theirs_].shape) != tuple(own[ours_].shape):
                raise ValueError(
                    f"{where}: {ours_!r} has shape {list(own[ours_].shape)}, the saved {theirs_!r} has "
                    f"{list(state[theirs_].shape)}"
                )
        taken = {ours_: state[theirs_] for ours_, theirs_ in keys.items()}
        if "step" in own:
            taken["step"] = torch.tensor(float(saved["step"]), device="cpu")
        result["state"][position] = taken
    return result


def _keys(
    where: str, group: Mapping[str, Any], saved: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, str]:
    """Their keys by ours, after a look at whether both mean the same."""
    rule = group["algorithm"]
    if "momentum_buffer" in state:  # torch.optim.Muon
        _same(where, "algorithm", rule, "muon")
        _same(where, "momentum", group["momentum"], "ema")
        _same(where, "bias_correction", group["bias_correction"], False)
        _same(where, "nesterov", group["nesterov"], bool(saved["nesterov"]))
        _same(where, "mu", float(group["mu"]), float(saved["momentum"]))
        return {"momentum": "momentum_buffer"}
    name = saved.get("algorithm")
    if name is None:
        raise ValueError(
            f"{where}: neither torch.optim.Muon nor microsoft/dion saved this group: {sorted(saved)}"
        )
    _same(where, "algorithm", rule, MICROSOFT_NAMES.get(name, name))
    if rule in ("muon", "normuon"):
        _same(where, "momentum", group["momentum"], "sum")
    for theirs in ("mu", "ef_decay"):
        if theirs in saved and "mu" in group:
            _same(where, "mu", float(group["mu"]), float(saved[theirs]))
    if "nesterov" in saved and "nesterov" in group:
        _same(where, "nesterov", group["nesterov"], bool(saved["nesterov"]))
    return MICROSOFT[rule]


def _same(where: str, what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise ValueError(f"{where}: {what} is {ours!r} here and {theirs!r} in the saved state")
