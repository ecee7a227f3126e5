"""Dion: one power iteration towards the momentum's leading singular directions, with error feedback.

Source: Ahn et al., arXiv 2504.05295; conventions of microsoft/dion (dion/dion_reference.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dion_dtensor.assembly import (
    elementwise,
    is_pending,
    norm,
    product,
    reduced,
    transposed,
    whole_dim,
)
from dion_dtensor.low_rank_blocks import on_blocks
from dion_dtensor.matrices import ROW_BLOCKS, Heads, Split, by_rows
from dion_dtensor.orthonormalize import orthonormal_basis, product_dtype
from dion_dtensor.rules.rule import Rule, Scalar, StateSpec, widest
from dion_dtensor.rules.sharded_basis import sharded_basis
from dion_dtensor.rules.shared import check_fraction, check_mu
from dion_dtensor.whole_matrices import on_whole_matrices

__all__ = ["DION"]


class Hyper(NamedTuple):
    """What Dion's update reads.

    ``transposed``: P lies on the longer side, so B is M^T when m < n; ``path``: what travels; ``split``: of whole
    parameters, where shard boundaries cut the logical matrices.
    """

    mu: Scalar
    epsilon: Scalar
    transposed: bool
    path: str
    orthonormalize: str
    right_factor: str
    compute_dtype: torch.dtype
    split: Split | None


class State(NamedTuple):
    """``momentum``: ``[N, m, n]``; ``Q``: ``[N, min(m, n), r]``, one for each matrix where ``split`` cuts several."""

    momentum: Tensor
    Q: Any


def update(grad: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step of a stack ``[N, m, n]``; only ``m x r`` is ever assembled, or the whole of B once."""
    wide = widest(state.momentum, grad)
    momentum = elementwise(lambda M, G: M.to(wide) + G.to(wide), state.momentum, grad)
    if hyper.split is not None:
        return _step_of_blocks(momentum, state, hyper, hyper.split)
    if hyper.path == "assemble" and not is_pending(momentum):

        def whole(momentum: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            direction, new = _step(momentum, state._replace(Q=Q), hyper)
            return direction.to(hyper.compute_dtype), new.momentum, new.Q

        direction, *values = on_whole_matrices(whole, momentum, state.Q, likes=(0, 0, 1))
        return direction, State(*values)
    return _step(momentum, state, hyper)


def _step_of_blocks(momentum: Tensor, state: State, hyper: Hyper, split: Split) -> tuple[Tensor, State]:
    """The step of parameters whose blocks of rows, or of columns, are the matrices."""
    alone = isinstance(state.Q, Tensor)
    Qs = [state.Q] if alone else list(state.Q)
    across, _ = by_rows(split)
    B = transposed(momentum) if across else momentum

    direction, B, Qs = on_blocks(B, Qs, hyper, split, _outer)
    if across:
        direction, B = transposed(direction), transposed(B)
    stored = state.momentum.dtype
    kept = [
        elementwise(lambda Q, old=old: Q.to(old.dtype), Q)
        for Q, old in zip(Qs, [state.Q] if alone else state.Q, strict=True)
    ]
    new = elementwise(lambda B: B.to(stored), B)
    return direction, State(new, kept[0] if alone else tuple(kept))


def _cuts(split: Split) -> bool:
    """Whether blocks are taken where they lie; of many equal ones each would be a product of its own."""
    return (
        isinstance(split, ROW_BLOCKS)
        and not isinstance(split, Heads)
        and not getattr(split, "stacked", False)
    )


def _step(momentum: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """The step of ``momentum``, the gradient included; dtypes of the result are those of ``state``."""
    wide = momentum.dtype
    B = transposed(momentum) if hyper.transposed else momentum
    Q = elementwise(lambda Q: Q.to(wide), whole_dim(state.Q, -1))

    lengths = norm(Q, (-2,))
    roundings = elementwise(torch.mul, lengths, norm(B, (-2, -1)))
    A = product(B, Q)
    if hyper.orthonormalize == "rcqr":
        P = sharded_basis(reduced(A), roundings)
    else:
        P = on_whole_matrices(orthonormal_basis, A, roundings)
    R = reduced(product(transposed(B), P))
    feedback = _outer(P, R, hyper.compute_dtype)
    B = elementwise(lambda B, PR: B - (1 - hyper.mu) * PR, B, feedback)

    # A dead column keeps its old column of Q, and takes no part in the update.
    old = elementwise(lambda Q, length: Q / (length + hyper.epsilon), Q, lengths)
    if hyper.right_factor == "orthonormalize":
        sizes = elementwise(lambda length, size: torch.ones_like(length) * size, lengths, norm(R, (-2, -1)))
        R = on_whole_matrices(orthonormal_basis, R, sizes)
        alive = norm(R, (-2,))
        P = elementwise(lambda P, alive: torch.where(alive > 0.5, P, 0), P, alive)
    else:
        alive = norm(P, (-2,))
        R = elementwise(lambda R, length: R / (length + hyper.epsilon), R, norm(R, (-2,)))
    Q = elementwise(lambda old, R, alive: torch.where(alive > 0.5, R, old), old, R, alive)
    direction = _outer(P, Q, hyper.compute_dtype)

    if hyper.transposed:
        B, direction = transposed(B), transposed(direction)
    new = State(
        momentum=elementwise(lambda B: B.to(state.momentum.dtype), B),
        Q=elementwise(lambda Q: Q.to(state.Q.dtype), Q),
    )
    return direction, new


def _outer(P: Tensor, Q: Tensor, dtype: torch.dtype) -> Tensor:
    """``P Q^T``, rounded to ``dtype`` before and after it is multiplied, returned in that of ``P``."""

    def ready(values: Tensor) -> Tensor:
        rounded = values.to(dtype)
        return rounded.to(product_dtype(rounded))

    result = product(elementwise(ready, P), elementwise(ready, transposed(Q)))
    return elementwise(lambda values: values.to(dtype).to(P.dtype), result)


def rank(shape: tuple[int, ...], group: Mapping[str, Any]) -> int:
    """``multiple * ceil(rank_fraction * min(m, n) / multiple)``, at most min(m, n), in exact arithmetic."""
    multiple = int(group["rank_multiple"])
    # The decimal that the user wrote: ceil(0.07 * 100) is 8 in floats.
    exact = Fraction(str(group["rank_fraction"])) * min(shape) / multiple
    return min(multiple * -(-exact.numerator // exact.denominator), *shape)


def states(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, StateSpec]:
    """Momentum of the parameter's shape, Q on its shorter side."""
    m, n = shape
    side = "row" if m < n else "column"
    Q = StateSpec(dims=(side, "rank"), sizes=(min(m, n), rank(shape, group)), normal=True)
    return {"momentum": StateSpec(), "Q": Q}


def check(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their range."""
    check_mu(group)
    check_fraction("rank_fraction", group)
    if group["path"] not in ("auto", "assemble", "low_rank"):
        raise ValueError(f"path={group['path']!r} must be 'auto', 'assemble' or 'low_rank'")
    if group["orthonormalize"] not in ("qr", "rcqr"):
        raise ValueError(f"orthonormalize={group['orthonormalize']!r} must be 'qr' or 'rcqr'")
    if group["right_factor"] not in ("normalize", "orthonormalize"):
        raise ValueError(f"right_factor={group['right_factor']!r} must be 'normalize' or 'orthonormalize'")
    multiple = group["rank_multiple"]
    if not isinstance(multiple, Integral) or multiple < 1:
        raise ValueError(f"rank_multiple={multiple!r} must be a whole number, at least 1")


def prepare(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, Any]:
    """Which side P lies on: a function of the full shape, never of the sharding."""
    return {"transposed": shape[0] < shape[1]}


DION = Rule(
    name="dion",
    update=update,
    hyper=Hyper,
    state=State,
    defaults={
        "mu": 0.95,
        "rank_fraction": 1.0,
        "rank_multiple": 1,
        "orthonormalize": "qr",
        "right_factor": "normalize",
        "path": "auto",
        "epsilon": 1e-8,
        "scale": "spectral_norm",
        "weight_storage": "out_in",
    },
    scalars=("mu", "epsilon"),
    states=states,
    way="P assembled",
    reads_values="always",  # which columns are dead
    pending_states=("momentum",),
    shapes_state=("rank_fraction", "rank_multiple"),
    cuts=_cuts,
    check=check,
    prepare=prepare,
)
