"""`dion_dtensor`: whatever classes it has at import are claimed, so the claim grows with the package."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dion_dtensor
from conformance.adapters import DTYPES, LEVELS, Arrays, Capabilities, Spec
from conformance.adapters.torch_optimizer import Named, TorchOptimizerAdapter, array
from conformance.port.mesh_cases import MESH_FEATURES
from dion_dtensor import matrices
from dion_dtensor.matrices import Split
from dion_dtensor.rules.shared import orthonormalizer

CLASSES = {"muon": "Muon", "normuon": "NorMuon", "dion": "Dion", "dion2": "Dion2", "dion3": "Dion3"}
SCALAR = ("adamw", "lion")
COMPILE = "CONFORMANCE_COMPILE"
"""The environment variable that asks for compiled steps. Vectors are many small shapes: eager by default."""


def _arguments(name: str) -> set[str]:
    return set(inspect.signature(getattr(dion_dtensor, name).__init__).parameters)


def _available() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {
        "orthonormalize": ("keller", "you", "polar_express", "polar_express_gns", "cans")
    }
    for algorithm, name in CLASSES.items():
        if hasattr(dion_dtensor, name):
            found[algorithm] = _dialects(_arguments(name))
    if "right_factor" in _arguments("Dion"):
        found["orth_dion"] = ("dion",)
    return found | dict.fromkeys(SCALAR, ("dion",))


def _dialects(arguments: set[str]) -> tuple[str, ...]:
    """Those that the class has the arguments for."""
    plain = ("dion", "dion-you", "dion-keller", "dion-gns", "dion-cans", "dion-unscaled")
    if "nesterov" not in arguments:
        return plain
    return (*plain, "keller", "torch", "torch-match-rms", "moonlight", "nvidia", "optax")


def build(params: Named, spec: Spec) -> torch.optim.Optimizer:
    """The optimizer of `spec.algorithm` over plain or DTensor parameters."""
    name = "Dion" if spec.algorithm == "orth_dion" else CLASSES.get(spec.algorithm, "Muon")
    kind = getattr(dion_dtensor, name)
    hyper = {key: _value(value) for key, value in spec.hyper.items()}
    options: dict[str, Any] = {
        "compute_dtype": getattr(torch, spec.compute_dtype),
        "compile": bool(os.environ.get(COMPILE)),
    }
    groups: list[dict[str, Any]] = [{"params": list(params)}]
    if spec.algorithm in SCALAR:
        scalar = ("betas", "epsilon") if spec.algorithm == "adamw" else ("betas",)
        groups[0] |= {"algorithm": spec.algorithm, **{key: hyper[key] for key in scalar}}
    else:
        known = _arguments(name)
        options |= {key: value for key, value in hyper.items() if key in known}
        if "polynomial" in known and "norm_factor" not in known:
            options["polynomial"] = hyper["polynomial_name"]
        if name == "Dion":
            options["path"] = "low_rank"  # the way that can go wrong; assembled, it is the step of one device
        if spec.algorithm == "orth_dion":
            options["right_factor"] = "orthonormalize"
        groups[0]["split"] = None if spec.split is None else str(make_split(spec.split))
    for key in ("lr", "weight_decay", "cautious"):
        options[key] = hyper[key]
    optimizer: torch.optim.Optimizer = kind(groups, **options)
    return optimizer


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(tuple(one) if isinstance(one, list) else one for one in value)
    return value


def orthonormalize(matrix: Tensor, hyper: Mapping[str, Any]) -> Tensor:
    """The production polynomial on a stack of one, by the way that a step takes in this dtype."""
    dtype = getattr(torch, hyper["compute_dtype"])
    fields = SimpleNamespace(
        coefficients=tuple((a, b, c) for a, b, c in hyper["polynomial"]),
        epsilon=hyper["epsilon"],
        epsilon_rule=hyper["epsilon_rule"],
        norm_factor=hyper["norm_factor"] or 1.0,
        compute_dtype=dtype,
    )
    return orthonormalizer(fields)(matrix.to(dtype).unsqueeze(0))[0].to(matrix.dtype)


def make_split(data: Mapping[str, Any]) -> Split:
    """The production split from a case's."""
    values = [
        tuple(value) if isinstance(value, list) else value for key, value in data.items() if key != "kind"
    ]
    kind = getattr(matrices, str(data["kind"]))
    made: Split = kind(*values[0]) if data["kind"] == "Rows" else kind(*values)
    return made


class SplitAdapter(TorchOptimizerAdapter):
    """Where a case has a state a piece, `variance` is one tensor of all rows here, and `Q` one of all equal pieces."""

    def init(self, spec: Spec, params: Arrays) -> Any:
        """The optimizer, with the pieces' states put together."""
        return super().init(spec if spec.split is None else replace(spec, state=_joined(spec)), params)

    def canonical_state(self, state: Any) -> Arrays:
        """The pieces' states by the vectors' keys."""
        named, optimizer, spec = state
        found = super().canonical_state(state)
        if spec.split is None:
            return found
        split = make_split(spec.split)
        own = optimizer.state[dict(named)[spec.name]]
        found = {key: value for key, value in found.items() if key.split(".")[0] not in ("variance", "Q")}
        for index, piece in enumerate(split.pieces(spec.shape)):
            if "variance" in own:
                rows = split.split(own["variance"].unsqueeze(0))[index]
                found[f"variance/{index}"] = array(rows if piece.count > 1 else rows[0])
            Q = own.get("Q", own.get(f"Q.{index}"))
            if Q is not None:
                found[f"Q/{index}"] = array(Q)
        return found


def _joined(spec: Spec) -> Arrays:
    """The states of a case as this package has them."""
    assert spec.split is not None
    split = make_split(spec.split)
    pieces = split.pieces(spec.shape)
    given = {key: torch.from_numpy(np.array(value)) for key, value in spec.state.items()}
    found = {key: value for key, value in given.items() if "/" not in key}
    if "variance/0" in given:
        stacks = [given[f"variance/{i}"].reshape(p.count, p.m, 1) for i, p in enumerate(pieces)]
        found["variance"] = split.merge(stacks, (*_rows_shape(spec), 1))[0]
    for index in range(len(pieces)):
        if f"Q/{index}" in given:
            found["Q" if len(pieces) == 1 else f"Q.{index}"] = given[f"Q/{index}"]
    return {key: value.numpy() for key, value in found.items()}


def _rows_shape(spec: Spec) -> tuple[int, ...]:
    return tuple(spec.shape[:2]) if str(make_split(spec.split or {})) == "experts" else (spec.shape[0],)


adapter = SplitAdapter(
    Capabilities(
        name="dion_dtensor",
        algorithms=_available(),
        levels=LEVELS,
        dtypes=DTYPES,
        features=(
            "state",
            "cautious",
            "schedule:lr",
            "schedule:mu",
            *MESH_FEATURES,
            *(f"split:{kind}" for kind in ("Rows", "Heads", "InterleavedRows", "Experts", "Flatten")),
        ),
        distribution="dion-conformance",
    ),
    build,
    state={
        key: key
        for key in ("momentum", "Q", "Q.0", "Q.1", "Q.2", "variance", "exp_avg", "exp_avg_sq", "step")
    },
    hyper={"mu": "mu"},
    orthonormalize=orthonormalize,
)
