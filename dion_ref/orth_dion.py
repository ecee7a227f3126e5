"""Orth-Dion: Dion with the right factor orthonormalized in place of column-normalized.

"Orth-Dion" (arXiv 2605.16341): ``Q = orth(R)``, so that ``P Q^T`` is a true partial isometry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dion_ref import validation
from dion_ref.dion import LowRankHyper, draw_right_factor, low_rank_shapes, outer, power_iteration
from dion_ref.linalg import DEAD_FACTOR, norm, normalize_columns, ordered_basis
from dion_ref.matrices import Split, each_matrix, init_pieces, step_pieces
from dion_ref.precision import FLOAT64, Precision
from dion_ref.update import apply_update


@dataclass(frozen=True, kw_only=True)
class Hyper(LowRankHyper):
    """The hyperparameters of Orth-Dion: Dion's; epsilon is used for dead columns only."""


@dataclass(frozen=True, eq=False)
class State:
    """Orth-Dion's memory.

    Args:
        momentum: ``[m, n]`` or ``[N, m, n]``, zero at first.
        Q: ``[s, r]`` or ``[N, s, r]`` with s = min(m, n): the right factor; normal values at first.
    """

    momentum: Tensor
    Q: Tensor


def right_factor(R: Tensor, Q: Tensor, kept: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``orth(R)`` over the kept columns; elsewhere the old Q column, normalized.

    A kept column whose new part in R has norm ``<= 8 eps ||R||_F`` is dead from here on.

    Args:
        R: ``[s, r]``.
        Q: ``[s, r]``, the old one.
        kept: bool ``[r]``, True where P has a column.
        epsilon: added to the old columns' norms.

    Returns:
        The new Q ``[s, r]`` and a bool tensor ``[r]``, True where its column comes from R.
    """
    negligible = (DEAD_FACTOR * torch.finfo(R.dtype).eps * norm(R)).expand(R.shape[1])
    basis, independent = ordered_basis(torch.where(kept, R, 0), negligible)
    return torch.where(independent, basis, normalize_columns(Q, epsilon)), independent


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
    """Zero momentum and a normal Q; arguments, result and errors as ``dion.init``."""
    if split is not None:
        return init_pieces(
            lambda piece, first: init(
                piece, hyper, name=name, seed=seed, first_matrix=first, precision=precision
            ),
            param,
            split,
            first_matrix,
        )
    validation.hyper_of(hyper, Hyper)
    validation.matrix("param", param, precision)
    return State(
        momentum=torch.zeros_like(param, memory_format=torch.contiguous_format),
        Q=draw_right_factor(
            param, hyper, name=name, seed=seed, first_matrix=first_matrix, precision=precision
        ),
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
    """One step of Orth-Dion; arguments, result and errors as ``muon.step``."""
    if split is not None:
        return step_pieces(step, param, grad, state, hyper, split, precision)
    validation.step_input(param, grad, state, hyper, (Hyper, State), precision, matrices=True)
    assert isinstance(state, State)
    low_rank_shapes(state, param, hyper, precision)
    transposed = param.shape[-2] < param.shape[-1]

    def one(W: Tensor, G: Tensor, M: Tensor, Q: Tensor) -> tuple[Tensor, ...]:
        M = M + G
        B = M.mT if transposed else M
        P, R, kept = power_iteration(B, Q)
        B = B - (1 - hyper.mu) * outer(P, R, precision)
        Q, independent = right_factor(R, Q, kept, hyper.epsilon)
        U = outer(torch.where(independent, P, 0), Q, precision)
        if transposed:
            B, U = B.mT, U.mT
        return apply_update(W, U, hyper), B.contiguous(), Q

    W, M, Q = each_matrix(one, param, grad, state.momentum, state.Q)
    new = State(M, Q)
    validation.step_output(W, new, precision)
    return W, new
