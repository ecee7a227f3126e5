"""Rules changed in one place, for the ablations: Dion without its error feedback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.convergence.drivers import Driver, FunctionalDriver
from dion_ref import Precision, dion
from dion_ref.linalg import normalize_columns
from dion_ref.update import apply_update

VARIANTS = ("dion_no_error_feedback",)
_FLOAT32 = Precision(torch.float32, torch.float32)


def no_error_feedback_step(
    W: Tensor, G: Tensor, state: dion.State, hyper: dion.Hyper
) -> tuple[Tensor, dion.State]:
    """Dion whose momentum decays as a whole, ``M <- mu M``, instead of by what the update took from it.

    Args:
        W, G: float32 ``[m, n]``.
        state: Dion's.
        hyper: Dion's; mu is the momentum factor.
    """
    transposed = W.shape[0] < W.shape[1]
    M = state.momentum + G
    B = M.mT if transposed else M
    # plain QR: the gradients of a training run have full rank, and signs do not matter
    P = torch.linalg.qr(B @ state.Q).Q
    Q = normalize_columns(B.mT @ P, hyper.epsilon)
    U = P @ Q.mT
    return apply_update(W, U.mT if transposed else U, hyper), dion.State(hyper.mu * M, Q)


@dataclass(frozen=True)
class VariantPort:
    """The rules of `VARIANTS`, in float32."""

    name: str = "variant of dion_ref"
    algorithms: tuple[str, ...] = VARIANTS

    def driver(self, algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Driver:
        """See `drivers.Port`."""
        if algorithm not in VARIANTS:
            raise ValueError(f"variant {algorithm!r} is unknown; choose from {', '.join(VARIANTS)}")
        return FunctionalDriver(
            lambda p, h, name: dion.init(p, h, name=name, precision=_FLOAT32),
            no_error_feedback_step,
            parameters,
            lambda lr: dion.Hyper(lr=lr, **hyper),
        )
