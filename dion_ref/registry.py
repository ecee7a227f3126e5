"""Every algorithm by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from dion_ref import adamw, dion, dion2, dion3, lion, muon, normuon, orth_dion


@dataclass(frozen=True)
class Algorithm:
    """One algorithm as a pair of pure functions.

    Args:
        name: the key in ``ALGORITHMS``.
        Hyper: frozen dataclass of hyperparameters, all with defaults.
        State: frozen dataclass of state.
        init: ``init(param, hyper, *, name="", seed=0, split=None, first_matrix=0, precision=FLOAT64) -> State``
            (a tuple of States, one a piece, if ``split`` is given).
        step: ``step(param, grad, state, hyper, *, split=None, precision=FLOAT64) -> (param, State)``.
    """

    name: str
    Hyper: type[Any]
    State: type[Any]
    init: Callable[..., Any]
    step: Callable[..., tuple[Tensor, Any]]


_MODULES = {
    "muon": muon,
    "normuon": normuon,
    "dion": dion,
    "orth_dion": orth_dion,
    "dion2": dion2,
    "dion3": dion3,
    "adamw": adamw,
    "lion": lion,
}

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        name: Algorithm(name, module.Hyper, module.State, module.init, module.step)
        for name, module in _MODULES.items()
    }
)
"""muon, normuon, dion, orth_dion, dion2, dion3, adamw, lion."""
