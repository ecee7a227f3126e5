"""Dion3 (NorDion2): Dion2 on rows, with NorMuon's normalization of the selected rows.

"Dion3" (arXiv 2608.11612); microsoft/dion, dion/nordion2.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dion_ref import validation
from dion_ref.dion2 import SelectionHyper
from dion_ref.hyper import set_number
from dion_ref.linalg import top_slices
from dion_ref.matrices import Split, each_matrix, init_pieces, step_pieces
from dion_ref.normuon import normalize_rows
from dion_ref.precision import FLOAT64, Precision
from dion_ref.update import apply_update, orthonormalize


@dataclass(frozen=True, kw_only=True)
class Hyper(SelectionHyper):
    """The hyperparameters of Dion3: Dion2's and those of the rows' variance.

    Args:
        beta2: decay of the selected rows' variance, in [0, 1).
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
    """Dion3's memory.

    Args:
        momentum: ``[m, n]`` or ``[N, m, n]``, zero at first.
        variance: ``[m, 1]`` or ``[N, m, 1]``, zero at first; a row's changes only when it is selected.
    """

    momentum: Tensor
    variance: Tensor


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
    """One step of Dion3; arguments, result and errors as ``muon.step``."""
    if split is not None:
        return step_pieces(step, param, grad, state, hyper, split, precision)
    validation.step_input(param, grad, state, hyper, (Hyper, State), precision, matrices=True)
    assert isinstance(state, State)
    validation.state_tensors(
        state, precision, momentum=tuple(param.shape), variance=(*tuple(param.shape[:-1]), 1)
    )

    def one(W: Tensor, G: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        M = M + G
        K = top_slices(M, hyper.count(M.shape[0]), dim=0)
        selected = M[K]
        rows = orthonormalize(selected, hyper, precision)
        rows, v_selected = normalize_rows(rows, v[K], hyper.beta2, hyper.variance_epsilon)
        U = torch.zeros_like(M).index_copy(0, K, rows)
        M = M.index_copy(0, K, hyper.mu * selected)
        return apply_update(W, U, hyper), M, v.index_copy(0, K, v_selected)

    W, M, v = each_matrix(one, param, grad, state.momentum, state.variance)
    new = State(M, v)
    validation.step_output(W, new, precision)
    return W, new
