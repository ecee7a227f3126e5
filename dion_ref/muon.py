"""Muon: momentum, orthonormalized.

Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), KellerJordan/Muon;
the dialects are in ``convention``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dion_ref import validation
from dion_ref.hyper import MOMENTA, PolynomialHyper, flag, one_of
from dion_ref.matrices import Split, each_matrix, init_pieces, step_pieces
from dion_ref.precision import FLOAT64, Precision
from dion_ref.update import apply_update, orthonormalize


@dataclass(frozen=True, kw_only=True)
class MuonHyper(PolynomialHyper):
    """The hyperparameters of Muon, shared by NorMuon.

    Args:
        momentum: "sum" (``mu M + G``) or "ema" (``mu M + (1 - mu) G``).
        nesterov: orthonormalize ``mu M + G`` (or ``mu M + (1 - mu) G``) in place of the new M.
        bias_correction: with "ema" only: divide M and G by what their weights add up to (optax).
    """

    momentum: str = "sum"
    nesterov: bool = False
    bias_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("momentum", self.momentum, MOMENTA)
        flag("nesterov", self.nesterov)
        flag("bias_correction", self.bias_correction)
        if self.bias_correction and self.momentum != "ema":
            raise ValueError('bias_correction needs momentum="ema": a sum has no weights that add up to 1')


@dataclass(frozen=True, kw_only=True)
class Hyper(MuonHyper):
    """The hyperparameters of Muon."""


@dataclass(frozen=True, eq=False)
class State:
    """Muon's memory.

    Args:
        momentum: ``[m, n]`` or ``[N, m, n]``, zero at first.
        step: number of steps taken.
    """

    momentum: Tensor
    step: int


def accumulate(M: Tensor, G: Tensor, hyper: MuonHyper, t: int) -> tuple[Tensor, Tensor]:
    """The new momentum, and what is orthonormalized at step t.

    Args:
        M, G: momentum before the step and gradient, one shape.
        hyper: mu, momentum, nesterov, bias_correction.
        t: counts from 1.

    Returns:
        The new momentum and the orthonormalizer's input.
    """
    mu = hyper.mu
    fresh = 1.0 if hyper.momentum == "sum" else 1 - mu
    M = mu * M + fresh * G
    if hyper.bias_correction:
        if hyper.nesterov:
            return M, mu * (M / (1 - mu ** (t + 1))) + fresh * (G / (1 - mu**t))
        return M, M / (1 - mu**t)
    return M, mu * M + fresh * G if hyper.nesterov else M


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
    """Zero momentum.

    Args:
        param: ``[m, n]`` or ``[N, m, n]``, or any shape that ``split`` cuts into such.
        hyper: the hyperparameters.
        name, seed, first_matrix: unused; every algorithm takes them.
        split: how ``param`` is cut into logical matrices.
        precision: the dtypes.

    Returns:
        A State, or one a piece if ``split`` is given.

    Raises:
        TypeError, ValueError: see ``validation``.
    """
    if split is not None:
        return init_pieces(
            lambda piece, _: init(piece, hyper, precision=precision), param, split, first_matrix
        )
    validation.hyper_of(hyper, Hyper)
    validation.matrix("param", param, precision)
    return State(torch.zeros_like(param, memory_format=torch.contiguous_format), 0)


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
    """One step of Muon; nothing given is modified.

    Args:
        param: ``[m, n]`` or ``[N, m, n]``, or any shape that ``split`` cuts into such.
        grad: same shape.
        state: from ``init`` or the last ``step``.
        hyper: the hyperparameters of this step.
        split: how ``param`` is cut into logical matrices.
        precision: the dtypes.

    Returns:
        The new parameter and state.

    Raises:
        TypeError, ValueError: see ``validation``.
        OverflowError: NaN or infinity in the new parameter or state.
    """
    if split is not None:
        return step_pieces(step, param, grad, state, hyper, split, precision)
    validation.step_input(param, grad, state, hyper, (Hyper, State), precision, matrices=True)
    assert isinstance(state, State)
    validation.state_tensors(state, precision, momentum=tuple(param.shape))
    t = int(state.step) + 1

    def one(W: Tensor, G: Tensor, M: Tensor) -> tuple[Tensor, ...]:
        M, direction = accumulate(M, G, hyper, t)
        U = orthonormalize(direction, hyper, precision)
        return apply_update(W, U, hyper), M

    W, M = each_matrix(one, param, grad, state.momentum)
    new = State(M, t)
    validation.step_output(W, new, precision)
    return W, new
