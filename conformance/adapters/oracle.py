"""The oracle as a port: the perfect adapter, against which the suite tests itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import dion_ref
from conformance.adapters import DTYPES, Arrays, Capabilities, Spec
from dion_ref import Precision
from dion_ref import update as update_module

FEATURES = (
    *("state", "cautious", "schedule:lr", "schedule:mu"),
    *(f"split:{name}" for name in ("Rows", "Heads", "InterleavedRows", "Experts", "Flatten")),
)


class OracleAdapter:
    """`dion_ref` behind the protocol, in any compute dtype."""

    def capabilities(self) -> Capabilities:
        """Everything but meshes, which the oracle does not know."""
        every = dict.fromkeys((*dion_ref.ALGORITHMS, "orthonormalize"), ("*",))
        return Capabilities(
            "dion_ref", every, ("L0", "L1", "L2"), DTYPES, FEATURES, distribution="dion-conformance"
        )

    def init(self, spec: Spec, params: Arrays) -> Any:
        """The oracle's state, from the case's."""
        weight = torch.from_numpy(np.array(params[spec.name]))
        split = make_split(spec.split)
        pieces = [weight] if split is None else list(split.split(weight))
        kind = dion_ref.ALGORITHMS[spec.algorithm].State
        states = []
        for index in range(len(pieces)):
            values: dict[str, Any] = {}
            for one in fields(kind):
                value = spec.state.get(f"{one.name}/{index}", spec.state.get(one.name))
                assert value is not None
                tensor = torch.from_numpy(np.array(value))
                if one.name == "step":
                    values["step"] = int(tensor)
                elif f"{one.name}/{index}" not in spec.state and split is not None:
                    values[one.name] = split.split(tensor)[index].contiguous()
                else:
                    values[one.name] = tensor
            states.append(kind(**values))
        return spec, states[0] if split is None else tuple(states)

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        """One step of the oracle."""
        spec, own = state
        weight, gradient = (torch.from_numpy(np.array(values[spec.name])) for values in (params, grads))
        options: dict[str, Any] = {}
        if spec.split is not None:
            options["split"] = make_split(spec.split)
        if spec.compute_dtype != "float64":
            options["precision"] = precision_of(spec.compute_dtype)
        step = self.rule(spec.algorithm)
        weight, own = step(weight, gradient, own, make_hyper(spec.algorithm, hyper), **options)
        return {spec.name: weight.numpy()}, (spec, own)

    def rule(self, algorithm: str) -> Callable[..., tuple[Tensor, Any]]:
        """The step that is taken."""
        step: Callable[..., tuple[Tensor, Any]] = dion_ref.ALGORITHMS[algorithm].step
        return step

    def canonical_state(self, state: Any) -> Arrays:
        """By the vectors' keys."""
        spec, own = state
        split = make_split(spec.split)
        pieces = own if isinstance(own, tuple) else (own,)
        found: dict[str, NDArray[Any]] = {}
        for one in fields(pieces[0]):
            values = [getattr(piece, one.name) for piece in pieces]
            if one.name == "step":
                continue
            if split is None:
                found[one.name] = values[0].numpy()
            elif one.name in ("momentum", "exp_avg", "exp_avg_sq"):
                found[one.name] = split.merge(values, spec.shape).numpy()
            else:
                found |= {f"{one.name}/{index}": value.numpy() for index, value in enumerate(values)}
        return found

    def orthonormalize(
        self, matrix: NDArray[Any], hyper: Mapping[str, Any], compute_dtype: str
    ) -> NDArray[Any]:
        """The oracle's orthonormalizer."""
        given: Tensor = torch.from_numpy(np.array(matrix))
        made = make_hyper("muon", hyper)
        result: Tensor = update_module.orthonormalize(given, made, precision_of(compute_dtype))
        return result.numpy()


def precision_of(compute_dtype: str) -> Precision:
    """The oracle's precision by the name of a compute dtype."""
    storage = torch.float64 if compute_dtype == "float64" else torch.float32
    return Precision(storage, getattr(torch, compute_dtype))


def make_hyper(algorithm: str, data: Mapping[str, Any]) -> Any:
    """The oracle's Hyper from a case's hyperparameters."""
    kind = dion_ref.ALGORITHMS[algorithm].Hyper
    known = {one.name for one in fields(kind)}
    values = {name: value for name, value in data.items() if name in known}
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    return kind(**values)


def make_split(data: Mapping[str, Any] | None) -> Any:
    """The oracle's split from a case's."""
    if data is None:
        return None
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in data.items()
        if name != "kind"
    }
    return getattr(dion_ref, str(data["kind"]))(**values)


adapter = OracleAdapter()
__all__ = ["OracleAdapter", "adapter", "make_hyper", "make_split", "precision_of"]
