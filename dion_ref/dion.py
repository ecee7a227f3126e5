"""Dion: one power iteration from a warm start, orthonormal on the left, column-normalized on the right.

Ahn et al., "Dion: distributed orthonormalized updates" (arXiv 2504.05295); the order of operations is that of
microsoft/dion, dion/dion_reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dion_ref import philox, validation
from dion_ref.hyper import MatrixHyper, fraction, integer
from dion_ref.linalg import DEAD_FACTOR, norm, normalize_columns, ordered_basis
from dion_ref.matrices import Split, each_matrix, init_pieces, step_pieces
from dion_ref.precision import FLOAT64, Precision
from dion_ref.update import apply_update, exact_ceil


@dataclass(frozen=True, kw_only=True)
class LowRankHyper(MatrixHyper):
    """The hyperparameters of Dion, shared by Orth-Dion.

    Args:
        rank_fraction: r over the short side, in (0, 1].
        rank_multiple: r is rounded up to a multiple of it, then clipped to the short side.
    """

    rank_fraction: float = 1.0
    rank_multiple: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rank_fraction", fraction("rank_fraction", self.rank_fraction))
        object.__setattr__(self, "rank_multiple", integer("rank_multiple", self.rank_multiple, low=1))

    def rank(self, rows: int, columns: int) -> int:
        """r of a whole logical matrix ``[rows, columns]``."""
        short = min(rows, columns)
        return min(short, exact_ceil(self.rank_fraction, short, self.rank_multiple))


@dataclass(frozen=True, kw_only=True)
class Hyper(LowRankHyper):
    """The hyperparameters of Dion."""


@dataclass(frozen=True, eq=False)
class State:
    """Dion's memory.

    Args:
        momentum: ``[m, n]`` or ``[N, m, n]``, zero at first.
        Q: ``[s, r]`` or ``[N, s, r]`` with s = min(m, n): the right factor; normal values at first.
    """

    momentum: Tensor
    Q: Tensor


def draw_right_factor(
    param: Tensor, hyper: LowRankHyper, *, name: str, seed: int, first_matrix: int, precision: Precision
) -> Tensor:
    """Standard normal values by (seed, name, matrix, row, column), the same on every mesh."""
    first_matrix = integer("first_matrix", first_matrix, low=0)
    rows, columns = param.shape[-2:]
    short, r = min(rows, columns), hyper.rank(rows, columns)
    draws = [
        philox.normal(short, r, seed=seed, name=name, matrix=first_matrix + index)
        for index in range(param.shape[0] if param.ndim == 3 else 1)
    ]
    Q = torch.stack(draws) if param.ndim == 3 else draws[0]
    return Q.to(device=param.device, dtype=precision.storage)


def power_iteration(B: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``P = orth(B Q)`` and ``R = B^T P``.

    Column j is dead if what is new in ``B Q_j`` has norm ``<= 8 eps ||B||_F ||Q_j||_2``, eps of the dtype: then
    ``P_j = 0``.  For B = 0 every column is dead.

    Args:
        B: ``[l, s]``, l >= s.
        Q: ``[s, r]``.

    Returns:
        P ``[l, r]``, R ``[s, r]`` and a bool tensor ``[r]``, True where the column was kept.
    """
    negligible = DEAD_FACTOR * torch.finfo(B.dtype).eps * norm(B) * norm(Q, dim=0)
    P, kept = ordered_basis(B @ Q, negligible)
    return P, B.mT @ P, kept


def outer(P: Tensor, Q: Tensor, precision: Precision) -> Tensor:
    """``P Q^T``, multiplied in ``precision.compute``, back in ``precision.storage``."""
    return (P.to(precision.compute) @ Q.to(precision.compute).mT).to(precision.storage)


def low_rank_shapes(state: object, param: Tensor, hyper: LowRankHyper, precision: Precision) -> None:
    """Check the shapes of a state's momentum and Q.

    Raises:
        TypeError, ValueError: see ``validation``; a rank above min(m, n) is named as such.
    """
    *stack, rows, columns = param.shape
    short = min(rows, columns)
    Q = getattr(state, "Q", None)
    if isinstance(Q, Tensor) and Q.ndim == param.ndim and Q.shape[-1] > short:
        raise ValueError(
            f"state.Q has rank {Q.shape[-1]}, above min(m, n) = {short} of param {list(param.shape)}"
        )
    shape = (*stack, short, hyper.rank(rows, columns))
    validation.state_tensors(state, precision, momentum=tuple(param.shape), Q=shape)


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
    """Zero momentum and a normal Q.

    Args:
        param: ``[m, n]`` or ``[N, m, n]``, or any shape that ``split`` cuts into such.
        hyper: the hyperparameters.
        name: the parameter's fully qualified name; with ``seed`` it keys Q.
        seed: any integer.
        split: how ``param`` is cut into logical matrices.
        first_matrix: running index of the first logical matrix within the parameter, >= 0.
        precision: the dtypes; Q is drawn in float64 and rounded.

    Returns:
        A State, or one a piece if ``split`` is given.

    Raises:
        TypeError, ValueError: see ``validation``.
    """
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
    """One step of Dion; arguments, result and errors as ``muon.step``."""
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
        Q = normalize_columns(torch.where(kept, R, Q), hyper.epsilon)
        U = outer(P, Q, precision)
        if transposed:
            B, U = B.mT, U.mT
        return apply_update(W, U, hyper), B.contiguous(), Q

    W, M, Q = each_matrix(one, param, grad, state.momentum, state.Q)
    new = State(M, Q)
    validation.step_output(W, new, precision)
    return W, new
