"""Dion2: orthonormalize only the momentum's largest slices, and decay only those.

"Dion2" (arXiv 2512.16928; also arXiv 2608.11612, algorithm 4); microsoft/dion, dion/dion2.py.  The selection
here is exact and global: the top slices of the whole logical matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dion_ref import validation
from dion_ref.hyper import PolynomialHyper, fraction
from dion_ref.linalg import top_slices
from dion_ref.matrices import Split, each_matrix, init_pieces, step_pieces
from dion_ref.precision import FLOAT64, Precision
from dion_ref.update import apply_update, exact_ceil, orthonormalize


@dataclass(frozen=True, kw_only=True)
class SelectionHyper(PolynomialHyper):
    """The hyperparameters of Dion2, shared by Dion3; ``mu`` is the decay of the selected slices.

    Args:
        fraction: selected slices over all, in (0, 1].
    """

    fraction: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "fraction", fraction("fraction", self.fraction))

    def count(self, size: int) -> int:
        """How many of ``size`` slices are selected: ``max(1, ceil(fraction * size))``, in exact rationals."""
        return max(1, exact_ceil(self.fraction, size))


@dataclass(frozen=True, kw_only=True)
class Hyper(SelectionHyper):
    """The hyperparameters of Dion2."""


@dataclass(frozen=True, eq=False)
class State:
    """Dion2's memory.

    Args:
        momentum: ``[m, n]`` or ``[N, m, n]``, zero at first.
    """

    momentum: Tensor


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
    """Zero momentum; arguments, result and errors as ``muon.init``."""
    if split is not None:
        return init_pieces(
            lambda piece, _: init(piece, hyper, precision=precision), param, split, first_matrix
        )
    validation.hyper_of(hyper, Hyper)
    validation.matrix("param", param, precision)
    return State(torch.zeros_like(param, memory_format=torch.contiguous_format))


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
    """One step of Dion2; arguments, result and errors as ``muon.step``."""
    if split is not None:
        return step_pieces(step, param, grad, state, hyper, split, precision)
    validation.step_input(param, grad, state, hyper, (Hyper, State), precision, matrices=True)
    assert isinstance(state, State)
    validation.state_tensors(state, precision, momentum=tuple(param.shape))
    # slices lie along the short side of the whole matrix: rows if m <= n, else columns
    dim = 0 if param.shape[-2] <= param.shape[-1] else 1

    def one(W: Tensor, G: Tensor, M: Tensor) -> tuple[Tensor, ...]:
        M = M + G
        K = top_slices(M, hyper.count(M.shape[dim]), dim)
        selected = M.index_select(dim, K)
        U = torch.zeros_like(M).index_copy(dim, K, orthonormalize(selected, hyper, precision))
        M = M.index_copy(dim, K, hyper.mu * selected)
        return apply_update(W, U, hyper), M

    W, M = each_matrix(one, param, grad, state.momentum)
    new = State(M)
    validation.step_output(W, new, precision)
    return W, new
