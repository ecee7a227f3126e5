"""Optimizers of a user's own in a sweep: made by a function of theirs, tuned and judged as the others are."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance.convergence.drivers import Driver, OptimizerDriver
from conformance.named import named_function

__all__ = ["ContenderPort", "algorithm_of", "is_contender", "settings_of"]

MARK = "#"


def is_contender(algorithm: str) -> bool:
    """Whether the algorithm of an entry or a run is a user's."""
    return MARK in algorithm


def settings_of(text: str) -> tuple[str, ...]:
    """What the function ``module:function`` takes by keyword.

    Raises:
        ValueError: no such module or function.
    """
    return tuple(inspect.signature(named_function("contender", text)).parameters)


def algorithm_of(text: str, hyper: Mapping[str, Any]) -> str:
    """How runs call ``module:function``: with a digest of the module, so that what is changed is trained anew.

    Args:
        text: ``module:function``.
        hyper: what its optimizer is tried with here, for one step.

    Raises:
        ValueError: no such function, or its optimizer takes no step.
    """
    function = named_function("contender", text)
    file = getattr(sys.modules[function.__module__], "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()[:8]
    algorithm = f"{text}{MARK}{digest}"
    drawn = torch.Generator().manual_seed(0)
    shapes = {"tall": (6, 4), "wide": (4, 6)}
    matrices = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    before = {name: matrix.clone() for name, matrix in matrices.items()}
    gradients = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    try:
        driver = ContenderPort().driver(algorithm, matrices, {"weight_decay": 0.0, **hyper})
        driver.step(gradients, 0.01)
    except Exception as error:  # whatever a user's code raises
        raise ValueError(
            f"contender {text!r} took no step: {type(error).__name__}: {error}; it is called with pairs of name and "
            "matrix, and by keyword with those of mu, betas and weight_decay that it takes, and returns an optimizer"
        ) from error
    still = [name for name, matrix in matrices.items() if torch.equal(matrix, before[name])]
    if still:
        raise ValueError(
            f"contender {text!r}: its step left the {' and the '.join(still)} matrix as it was; it has to write into "
            "the tensors that it is given, at the lr of its param groups"
        )
    return algorithm


@dataclass(frozen=True)
class ContenderPort:
    """What users' functions make, by the algorithms of :func:`algorithm_of`.

    A function is called with pairs of name and matrix ``[m, n]``, and by keyword with those of ``mu``, ``betas`` and
    ``weight_decay`` (0) that it takes; it returns a `torch.optim.Optimizer`.  ``lr`` is written into all of its groups
    before each step.
    """

    name: str = "contender"
    algorithms: tuple[str, ...] = ()

    def driver(self, algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Driver:
        """See `drivers.Port`."""
        text = algorithm.partition(MARK)[0]
        settings = settings_of(text)
        own = {name: torch.nn.Parameter(tensor) for name, tensor in parameters.items()}  # of the same memory
        taken = {name: value for name, value in hyper.items() if name in settings}
        return OptimizerDriver(named_function("contender", text)(list(own.items()), **taken), own)
