"""NorMuon: Muon, with each row of the orthonormalized update normalized by its own running variance.

Li et al., "NorMuon" (arXiv 2510.05491); the order of operations is that of microsoft/dion, dion/normuon.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dion_ref import validation
from dion_ref.hyper import set_number
from dion_ref.linalg import norm
from dion_ref.matrices import Split, each_matrix, init_pieces, step_pieces
from dion_ref.muon import MuonHyper, accumulate
from dion_ref.precision import FLOAT64, Precision
from dion_ref.update import apply_update, orthonormalize


@dataclass(frozen=True, kw_only=True)
class Hyper(MuonHyper):
    """The hyperparameters of NorMuon: Muon's and those of the rows' variance.

    Args:
        beta2: decay of the variance, in [0, 1).
        variance_epsilon: positive; added to its root, and the floor of the rescaling's denominator.
    """

    beta2: float = 0.95
    variance_epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        set_number(self, "beta2", low=0, high=1)
        set_number(self, "variance_epsilon", low=0, open_low=True)


@dataclass(frozen=True, eq=False)
class State:
    """NorMuon's memory.

    Args:
        momentum: ``[m, n]`` or ``[N, m, n]``, zero at first.
        variance: ``[m, 1]`` or ``[N, m, 1]``, zero at first; never bias-corrected.
        step: number of steps taken.
    """

    momentum: Tensor
    variance: Tensor
    step: int


def normalize_rows(U: Tensor, v: Tensor, beta2: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """Normalize rows by their running variance, then restore the Frobenius norm.

    ``v_i <- beta2 v_i + (1 - beta2) mean_j U_ij^2``; ``U' = U / (sqrt(v) + epsilon)``;
    ``U' * ||U||_F / max(||U'||_F, epsilon)``.

    Args:
        U: ``[m, n]``, orthonormalized; all of it, since the norms are those of the whole matrix.
        v: ``[m, 1]``.
        beta2: decay of v.
        epsilon: outside the root, and the floor of the denominator.

    Returns:
        The normalized U and the new v.
    """
    v = beta2 * v + (1 - beta2) * U.square().mean(dim=1, keepdim=True)
    normalized = U / (v.sqrt() + epsilon)
    return normalized * (norm(U) / norm(normalized).clamp(min=epsilon)), v


@torch.no_grad()
def init(
    param: Tensor,
    hyper: Hyper,
    *,
    name: str = "",
    seed: int = 0,
    split: Split | None = None,
    first_matrix: int = 0,
    precision: Precision = FLOAT64,
) -> State | tuple[State, ...]:
    """Zero momentum and variance; arguments, result and errors as ``muon.init``."""
    if split is not None:
        return init_pieces(
            lambda piece, _: init(piece, hyper, precision=precision), param, split, first_matrix
        )
    validation.hyper_of(hyper, Hyper)
    validation.matrix("param", param, precision)
    return State(
        momentum=torch.zeros_like(param, memory_format=torch.contiguous_format),
        variance=param.new_zeros((*param.shape[:-1], 1)),
        step=0,
    )


@torch.no_grad()
def step(
    param: Tensor,
    grad: Tensor,
    state: State | tuple[State, ...],
    hyper: Hyper,
    *,
    split: Split | None = None,
    precision: Precision = FLOAT64,
) -> tuple[Tensor, State | tuple[State, ...]]:
    """One step of NorMuon; arguments, result and errors as ``muon.step``."""
    if split is not None:
        return step_pieces(step, param, grad, state, hyper, split, precision)
    validation.step_input(param, grad, state, hyper, (Hyper, State), precision, matrices=True)
    assert isinstance(state, State)
    validation.state_tensors(
        state, precision, momentum=tuple(param.shape), variance=(*tuple(param.shape[:-1]), 1)
    )
    t = int(state.step) + 1

    def one(W: Tensor, G: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        M, direction = accumulate(M, G, hyper, t)
        U = orthonormalize(direction, hyper, precision)
        U, v = normalize_rows(U, v, hyper.beta2, hyper.variance_epsilon)
        return apply_update(W, U, hyper), M, v

    W, M, v = each_matrix(one, param, grad, state.momentum, state.variance)
    new = State(M, v, t)
    validation.step_output(W, new, precision)
    return W, new
