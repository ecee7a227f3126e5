"""AdamW, plain and cautious.

Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101); cautious decay: arXiv 2510.12402;
defaults: microsoft/dion, dion/scalar_opts.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dion_ref import validation
from dion_ref.hyper import CommonHyper, set_number, two_betas
from dion_ref.matrices import Split, init_pieces, step_pieces
from dion_ref.precision import FLOAT64, Precision
from dion_ref.update import decay


@dataclass(frozen=True, kw_only=True)
class Hyper(CommonHyper):
    """The hyperparameters of AdamW.

    Args:
        betas: decay of the first and second moment, each in [0, 1); a list becomes a tuple.
        epsilon: positive; outside the root, after bias correction.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", two_betas(self.betas))
        set_number(self, "epsilon", low=0, open_low=True)


@dataclass(frozen=True, eq=False)
class State:
    """AdamW's memory.

    Args:
        exp_avg: running mean of the gradient, the parameter's shape, zero at first.
        exp_avg_sq: running mean of its square, the parameter's shape, zero at first.
        step: number of steps taken.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int


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
    """Zero moments; ``param`` of any shape, the rest as ``muon.init``."""
    if split is not None:
        return init_pieces(
            lambda piece, _: init(piece, hyper, precision=precision), param, split, first_matrix
        )
    validation.hyper_of(hyper, Hyper)
    validation.tensor("param", param, precision)
    zero = torch.zeros_like(param, memory_format=torch.contiguous_format)
    return State(exp_avg=zero, exp_avg_sq=zero.clone(), step=0)


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
    """One step of AdamW; ``param`` of any shape, the rest as ``muon.step``."""
    if split is not None:
        return step_pieces(step, param, grad, state, hyper, split, precision)
    validation.step_input(param, grad, state, hyper, (Hyper, State), precision, matrices=False)
    assert isinstance(state, State)
    shape = tuple(param.shape)
    validation.state_tensors(state, precision, exp_avg=shape, exp_avg_sq=shape)
    beta1, beta2 = hyper.betas
    t = int(state.step) + 1
    m = beta1 * state.exp_avg + (1 - beta1) * grad
    v = beta2 * state.exp_avg_sq + (1 - beta2) * grad.square()
    U = m / (v.sqrt() / math.sqrt(1 - beta2**t) + hyper.epsilon)
    W = decay(param, U, hyper) - hyper.lr / (1 - beta1**t) * U
    new = State(m, v, t)
    validation.step_output(W, new, precision)
    return W, new
