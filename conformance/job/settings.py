"""What the job runs: optimizers, dtypes, meshes, and the bounds it holds them to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from conformance.job.model import GPTShape
from dion_ref import Precision


@dataclass(frozen=True)
class DtypeSetting:
    """A dtype row: parameters, gradients and state in `storage`; model and heavy products in `compute`."""

    name: str
    storage: torch.dtype
    compute: torch.dtype

    @property
    def precision(self) -> Precision:
        """The same choice as the oracle takes it."""
        return Precision(self.storage, self.compute)

    @property
    def exact(self) -> bool:
        """True where the bound is a fixed number and the oracle is not rerun."""
        return self.storage == torch.float64


DTYPES: Mapping[str, DtypeSetting] = {
    one.name: one
    for one in (
        DtypeSetting("float64", torch.float64, torch.float64),
        DtypeSetting("float32", torch.float32, torch.float32),
        DtypeSetting("bf16", torch.float32, torch.bfloat16),
    )
}
"""By the name the command line takes. "bf16" is float32 parameters and state with bfloat16 compute."""


@dataclass(frozen=True)
class OptimizerSetting:
    """An optimizer of the job. Everything not named here is left at the defaults of both sides.

    Attributes:
        algorithm: rule of the weights inside the blocks.
        scalar: rule of all others.
        lr, scalar_lr: their base learning rates.
        hyper: further hyperparameters of `algorithm`.
        float64_bound: largest relative error allowed in float64.
    """

    name: str
    algorithm: str
    scalar: str
    lr: float
    scalar_lr: float
    hyper: Mapping[str, Any] = field(default_factory=dict)
    float64_bound: float = 1e-12


OPTIMIZERS: Mapping[str, OptimizerSetting] = {
    one.name: one
    for one in (
        OptimizerSetting("adamw", "adamw", "adamw", lr=3e-3, scalar_lr=3e-3),
        OptimizerSetting("lion", "lion", "lion", lr=1e-3, scalar_lr=1e-3),
        OptimizerSetting("muon", "muon", "adamw", lr=2e-2, scalar_lr=3e-3),
        OptimizerSetting("normuon", "normuon", "adamw", lr=2e-2, scalar_lr=3e-3),
        OptimizerSetting("dion2", "dion2", "adamw", lr=2e-2, scalar_lr=3e-3, hyper={"fraction": 0.25}),
        OptimizerSetting("dion3", "dion3", "adamw", lr=2e-2, scalar_lr=3e-3, hyper={"fraction": 0.25}),
        OptimizerSetting(
            "dion",
            "dion",
            "adamw",
            lr=2e-2,
            scalar_lr=3e-3,
            hyper={"rank_fraction": 0.25},
            float64_bound=1e-10,
        ),
    )
}
"""By the name the command line takes; cheapest first, so that the first verdict comes early."""

USUAL = ("adamw", "lion", "muon", "dion")
"""Those of a run that names none: each further one costs a minute or two of compilation."""

LOW_PRECISION_FACTOR = 2.0
"""In float32 and bf16: how many times the error of the oracle's own rerun is allowed."""


@dataclass(frozen=True)
class Settings:
    """One run of the job.

    Attributes:
        optimizers, dtypes: names in OPTIMIZERS and DTYPES.
        steps: optimizer steps of every run.
        sequences: of the global batch.
        ranks: local processes.
        device: "cpu" or "cuda".
        compile: compile the optimizer steps.
        meshes: names of simulated meshes (conformance.meshes.SIMULATED).
        seed: of weights, batches and Dion's first Q.
        nan_at: (step, parameter): put a NaN in that gradient, to see the job stop.
        mutation: hyperparameters given to the optimizer under test alone, to see the job fail.
    """

    optimizers: tuple[str, ...] = USUAL
    dtypes: tuple[str, ...] = tuple(DTYPES)
    steps: int = 20
    sequences: int = 4
    ranks: int = 4
    device: str = "cpu"
    compile: bool = True
    meshes: tuple[str, ...] = ()
    seed: int = 0
    shape: GPTShape = field(default_factory=GPTShape)
    nan_at: tuple[int, str] | None = None
    mutation: Mapping[str, Any] = field(default_factory=dict)
