"""An adapter out of any `torch.optim.Optimizer`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from conformance.adapters import STATES, AdapterError, Arrays, Capabilities, Spec

HYPERS = (
    *(
        "lr",
        "mu",
        "weight_decay",
        "cautious",
        "epsilon",
        "scale",
        "weight_storage",
        "polynomial",
        "epsilon_rule",
    ),
    *("norm_factor", "momentum", "nesterov", "bias_correction", "betas", "beta2", "variance_epsilon"),
    *("fraction", "rank_fraction", "rank_multiple"),
)

Named = Sequence[tuple[str, nn.Parameter]]
Build = Callable[[Named, Spec], torch.optim.Optimizer]
Orthonormalize = Callable[[Tensor, Mapping[str, Any]], Tensor]
Key = str | tuple[str, Callable[[Tensor], Any]]


def eagerly(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """In place of `torch.compile`: compiles nothing."""
    return (lambda later: later) if function is None else function


class TorchOptimizerAdapter:
    """Drives an optimizer on plain tensors for L1 and L2, and hands `build` on for L3 and L4.

    Args:
        capabilities: what the port claims.
        build: `(named parameters, spec) -> optimizer`, from `spec.hyper`; the parameters may be DTensors.
        state: by the oracle's key, the optimizer's key in `optimizer.state[parameter]`; with a function where the
            optimizer keeps it otherwise than as a tensor like the oracle's, and "step" otherwise than as an int, before
            the first step: `{"step": ("step", torch.Tensor.float)}` for `torch.optim.AdamW`.
        hyper: by the oracle's name, the key (or keys, any of which) in `param_groups` of what may change by step.
        orthonormalize: `(matrix, hyper) -> matrix`, for L0; `hyper` holds polynomial, epsilon, epsilon_rule,
            norm_factor and compute_dtype.

    Raises:
        AdapterError: a key of `state` or `hyper` that the oracle does not have, or a feature that is claimed without
            the key that it needs.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        build: Build,
        *,
        state: Mapping[str, Key] | None = None,
        hyper: Mapping[str, str | tuple[str, ...]] | None = None,
        orthonormalize: Orthonormalize | None = None,
    ) -> None:
        for what, keys, known in (("state", state, STATES), ("hyper", hyper, HYPERS)):
            for key in keys or ():
                if re.split("[./]", key)[0] not in known:
                    raise AdapterError(f"{what}: the oracle has no {key!r}; it has {', '.join(known)}")
        self._capabilities, self.build = capabilities, build
        pairs = {key: (one, None) if isinstance(one, str) else one for key, one in (state or {}).items()}
        self.state_keys = {key: name for key, (name, _) in pairs.items()}
        self._made = {key: made for key, (_, made) in pairs.items() if made is not None}
        given = {"lr": "lr", **(hyper or {})}
        self.hyper_keys = {name: (keys,) if isinstance(keys, str) else keys for name, keys in given.items()}
        _check_features(capabilities, self.state_keys, self.hyper_keys)
        self._orthonormalize = orthonormalize
        self._device = torch.device("cpu")

    def capabilities(self) -> Capabilities:
        """What the port claims."""
        return self._capabilities

    def use_device(self, device: str) -> None:
        """Where L0 to L2 are computed from now on: "cpu" or "cuda".

        Raises:
            AdapterError: there is no GPU here.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise AdapterError("--device cuda: torch sees no GPU here")
        self._device = torch.device(device)

    def _tensor(self, value: Any) -> Tensor:
        return torch.from_numpy(np.array(value)).to(self._device)

    def init(self, spec: Spec, params: Arrays) -> Any:
        """The parameters and their optimizer, its state loaded if the case starts from one."""
        named = [(name, nn.Parameter(self._tensor(value))) for name, value in params.items()]
        optimizer = self.build(named, spec)
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"build must return the optimizer, not {type(optimizer).__name__}")
        for name, parameter in named:
            if name == spec.name and "state" in self._capabilities.features:
                self._load(optimizer, parameter, spec.state)
        return named, optimizer, spec

    def _load(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Arrays) -> None:
        own = optimizer.state[parameter]
        for key, name in self.state_keys.items():
            if key not in state:
                continue
            given = self._tensor(state[key])
            old = own.get(name)
            if key in self._made:
                own[name] = self._made[key](given)
            elif isinstance(old, Tensor):
                old.copy_(given.reshape(old.shape))
            elif isinstance(old, int) or (key == "step" and old is None):
                own[name] = int(given)
            else:
                own[name] = given

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        """One step of the optimizer.

        Raises:
            KeyError: a hyperparameter is not what it was, and no param group has its key.
        """
        named, optimizer, spec = state
        for name, keys in self.hyper_keys.items():
            groups = [group for group in optimizer.param_groups if set(keys) & set(group)]
            for group in groups if name in hyper else ():
                group.update({key: hyper[name] for key in keys if key in group})
            if not groups and hyper.get(name) != spec.hyper.get(name):
                has = sorted(set(optimizer.param_groups[0]) - {"params"})
                raise KeyError(f"hyper={{{name!r}: {keys[0]!r}}}, but the param groups have {has}")
        for name, parameter in named:
            parameter.grad = self._tensor(grads[name])
        optimizer.step()
        return {name: array(parameter) for name, parameter in named}, state

    def canonical_state(self, state: Any) -> Arrays:
        """The state of the case's parameter by the oracle's keys.

        Raises:
            KeyError: the optimizer keeps nothing under a key of `state` that this algorithm has.
        """
        named, optimizer, spec = state
        own = optimizer.state[dict(named)[spec.name]]
        for key, name in self.state_keys.items():
            if key in spec.state and name not in own:
                raise KeyError(
                    f"state={{{key!r}: {name!r}}}, but the optimizer keeps {sorted(map(str, own))}"
                )
        return {
            key: array(torch.as_tensor(own[name])) for key, name in self.state_keys.items() if name in own
        }

    def orthonormalize(
        self, matrix: NDArray[Any], hyper: Mapping[str, Any], compute_dtype: str
    ) -> NDArray[Any]:
        """The port's orthonormalizer on one matrix."""
        if self._orthonormalize is None:
            raise NotImplementedError("no orthonormalizer was given")
        given = self._tensor(matrix)
        return array(self._orthonormalize(given, {**hyper, "compute_dtype": compute_dtype}))


def _check_features(claims: Capabilities, state: Mapping[str, str], hyper: Mapping[str, Any]) -> None:
    """Refuses claims that could not be kept, before a case fails by them.

    Raises:
        AdapterError: names the feature, and the argument that it needs.
    """
    if "state" in claims.features and not state:
        raise AdapterError(
            f"{claims.name} claims the feature 'state', but state={{}} has no key of its optimizer; "
            "give state={'momentum': 'your key'} or drop the feature"
        )
    for feature in claims.features:
        kind, _, name = feature.partition(":")
        if kind == "schedule" and name not in hyper:
            raise AdapterError(
                f"{claims.name} claims the feature {feature!r}, but hyper={{{', '.join(map(repr, hyper))}}} has no key "
                f"for it; give hyper={{{name!r}: 'your key'}} or drop the feature"
            )


def array(tensor: Tensor) -> NDArray[Any]:
    """A numpy copy; bfloat16 as float32."""
    plain = tensor.detach().cpu()
    return np.array((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy())
