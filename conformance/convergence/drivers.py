"""One face for whatever takes optimizer steps: the oracle, `dion_dtensor`, or any port."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

import dion_dtensor
from dion_ref import ALGORITHMS, Precision

MATRIX_ALGORITHMS = ("muon", "normuon", "dion", "orth_dion", "dion2", "dion3")
SCALAR_ALGORITHMS = ("adamw", "lion")


class Driver(Protocol):
    """Steps the parameters that it was made with."""

    def step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One optimizer step in place.

        Args:
            gradients: by parameter name, each of its parameter's shape and dtype.
            lr: base learning rate of this step.
        """
        ...


class Port(Protocol):
    """An implementation of some of the algorithms.

    Attributes:
        name: how reports call it.
        algorithms: names in `dion_ref.ALGORITHMS` that it claims.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def algorithms(self) -> tuple[str, ...]:
        """See the class."""
        ...

    def driver(self, algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Driver:
        """Starts an optimizer.

        Args:
            algorithm: one of `algorithms`.
            parameters: float tensors by name; the driver writes into them.
            hyper: hyperparameters by the names of `dion_ref`, without `lr`.
        """
        ...


Init = Callable[..., Any]
Step = Callable[..., tuple[Tensor, Any]]


class FunctionalDriver:
    """Drives a pair of pure functions, one parameter at a time: the whole of what a functional port needs.

    Args:
        init: `init(param, hyper, name=name) -> state`.
        step: `step(param, grad, state, hyper) -> (param, state)`.
        parameters: by name; written in place.
        hyper: by learning rate, what `init` (with rate zero) and `step` are given.
    """

    def __init__(
        self, init: Init, step: Step, parameters: Mapping[str, Tensor], hyper: Callable[[float], Any]
    ) -> None:
        self._step, self._hyper, self._parameters = step, hyper, parameters
        self._states = {name: init(p.detach(), hyper(0.0), name=name) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """See `Driver`."""
        hyper = self._hyper(lr)
        for name, parameter in self._parameters.items():
            new, self._states[name] = self._step(
                parameter.detach(), gradients[name], self._states[name], hyper
            )
            parameter.copy_(new)


@dataclasses.dataclass(frozen=True)
class OraclePort:
    """The oracle itself.

    Attributes:
        precision: None for the parameters' own dtype throughout.
        seed: of Dion's first Q.
    """

    precision: Precision | None = None
    seed: int = 0
    name: str = "dion_ref"
    algorithms: tuple[str, ...] = (*MATRIX_ALGORITHMS, *SCALAR_ALGORITHMS)

    def driver(self, algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Driver:
        """See `Port`."""
        one = ALGORITHMS[algorithm]
        dtype = next(iter(parameters.values())).dtype
        precision = self.precision or Precision(dtype, dtype)
        return FunctionalDriver(
            lambda p, h, name: one.init(p, h, name=name, seed=self.seed, precision=precision),
            lambda p, g, s, h: one.step(p, g, s, h, precision=precision),
            parameters,
            lambda lr: one.Hyper(lr=lr, **hyper),
        )


class OptimizerDriver:
    """Drives a `torch.optim.Optimizer` whose groups all share one rate."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self._optimizer, self._parameters = optimizer, parameters

    def step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """See `Driver`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name]
        self._optimizer.step()
        for parameter in self._parameters.values():
            parameter.grad = None


# algorithm: (class of dion_dtensor, further arguments); the elementwise rules ride as groups of Muon
_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "muon": ("Muon", {}),
    "normuon": ("NorMuon", {}),
    "dion": ("Dion", {}),
    "orth_dion": ("Dion", {"right_factor": "orthonormalize"}),
    "dion2": ("Dion2", {}),
    "dion3": ("Dion3", {}),
    "adamw": ("Muon", {}),
    "lion": ("Muon", {}),
}


@dataclasses.dataclass(frozen=True)
class ProductionPort:
    """`dion_dtensor`, each algorithm looked up by name when the port is made.

    Attributes:
        compile: compile the steps; eager is faster to start and for tiny models.
        seed: of Dion's first Q.
    """

    compile: bool = False
    seed: int = 0
    name: str = "dion_dtensor"
    algorithms: tuple[str, ...] = dataclasses.field(default_factory=lambda: production_algorithms())

    def driver(self, algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Driver:
        """See `Port`."""
        return OptimizerDriver(_optimizer(algorithm, parameters, hyper, self.compile, self.seed), parameters)


def _optimizer(
    algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any], compiled: bool, seed: int
) -> torch.optim.Optimizer:
    name, arguments = _CLASSES[algorithm]
    kind = getattr(dion_dtensor, name)
    named = list(parameters.items())
    if algorithm in SCALAR_ALGORITHMS:
        group = {"params": named, "algorithm": algorithm, **hyper}
        elementwise: torch.optim.Optimizer = kind([group], compile=compiled)
        return elementwise
    if algorithm in ("dion", "orth_dion"):
        arguments = {**arguments, "seed": seed}
    matrix: torch.optim.Optimizer = kind(named, **arguments, **hyper, compile=compiled)
    return matrix


def production_algorithms() -> tuple[str, ...]:
    """The algorithms that the installed `dion_dtensor` can make an optimizer for."""
    found = []
    for algorithm in _CLASSES:
        try:
            _optimizer(algorithm, {"w": torch.nn.Parameter(torch.zeros(2, 2))}, {}, False, 0)
        except (AttributeError, TypeError):
            continue
        found.append(algorithm)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class BestPort:
    """`dion_dtensor` where it has the algorithm, the oracle elsewhere: what the sweeps train with."""

    production: ProductionPort = dataclasses.field(default_factory=ProductionPort)
    oracle: OraclePort = dataclasses.field(default_factory=OraclePort)
    name: str = "dion_dtensor, else dion_ref"
    algorithms: tuple[str, ...] = (*MATRIX_ALGORITHMS, *SCALAR_ALGORITHMS)

    def used(self, algorithm: str) -> Port:
        """The one that runs `algorithm`."""
        return self.production if algorithm in self.production.algorithms else self.oracle

    def driver(self, algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Driver:
        """See `Port`."""
        return self.used(algorithm).driver(algorithm, parameters, hyper)
