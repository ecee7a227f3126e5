"""Lion: the sign of an interpolation between momentum and gradient.

Chen et al., "Symbolic discovery of optimization algorithms" (arXiv 2302.06675); defaults: microsoft/dion,
dion/scalar_opts.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dion_ref import validation
from dion_ref.hyper import CommonHyper, two_betas
from dion_ref.matrices import Split, init_pieces, step_pieces
from dion_ref.precision import FLOAT64, Precision
from dion_ref.update import decay


@dataclass(frozen=True, kw_only=True)
class Hyper(CommonHyper):
    """The hyperparameters of Lion.

    Args:
        betas: weight of the momentum in the update, and decay of the momentum, each in [0, 1); a list becomes a tuple.
    """

    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", two_betas(self.betas))


@dataclass(frozen=True, eq=False)
class State:
    """Lion's memory.

    Args:
        exp_avg: running mean of the gradient, the parameter's shape, zero at first.
    """

    exp_avg: Tensor


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
    """Zero momentum; ``param`` of any shape, the rest as ``muon.init``."""
    if split is not None:
        return init_pieces(
            lambda piece, _: init(piece, hyper, precision=precision), param, split, first_matrix
        )
    validation.hyper_of(hyper, Hyper)
    validation.tensor("param", param, precision)
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
    """One step of Lion; ``param`` of any shape, the rest as ``muon.step``."""
    if split is not None:
        return step_pieces(step, param, grad, state, hyper, split, precision)
    validation.step_input(param, grad, state, hyper, (Hyper, State), precision, matrices=False)
    assert isinstance(state, State)
    validation.state_tensors(state, precision, exp_avg=tuple(param.shape))
    beta1, beta2 = hyper.betas
    U = torch.sign(beta1 * state.exp_avg + (1 - beta1) * grad)
    m = beta2 * state.exp_avg + (1 - beta2) * grad
    W, new = decay(param, U, hyper) - hyper.lr * U, State(m)
    validation.step_output(W, new, precision)
    return W, new
