"""The polynomial of matrices whose long side is sharded: their small Gram matrices travel, they themselves stay."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from dion_dtensor.assembly import elementwise, norm, product, shards, transposed
from dion_dtensor.orthonormalize import gram_polynomial, segments
from dion_dtensor.orthonormalize.polynomial import divisor
from dion_dtensor.rules.rule import widest
from dion_dtensor.whole_matrices import on_whole_matrices

__all__ = ["by_gram", "gram_applies"]


def gram_applies(stack: Tensor) -> bool:
    """Whether the long side of ``[N, m, n]`` is sharded and the short side is whole."""
    long = 1 if stack.shape[1] > stack.shape[2] else 2
    return shards(stack, long) and not shards(stack, 3 - long)


def by_gram(stack: Tensor, hyper: Any) -> Tensor:
    """The value of :func:`~dion_dtensor.orthonormalize.newton_schulz` on a stack to which :func:`gram_applies`.

    For each run of iterations the Gram matrices ``[N, s, s]`` are summed over the shards (reduce-scatter), the ranks
    share the iterations on them, and the polynomials come back (all-gather): ``2 s^2`` numbers a matrix and run, where
    whole matrices take ``2 s l`` over the number of shards.  Computed in float32 or wider.

    Args:
        stack: ``[N, m, n]``, before it is rounded to the compute dtype.
        hyper: ``coefficients``, ``epsilon``, ``epsilon_rule``, ``norm_factor``.
    """
    dtype = widest(stack)
    tall = stack.shape[1] > stack.shape[2]
    X = transposed(stack) if tall else stack

    def normalized(values: Tensor, size: Tensor) -> Tensor:
        by = divisor(size.to(dtype), hyper.epsilon, hyper.epsilon_rule, hyper.norm_factor)
        return (values.to(dtype) / by).to(dtype)

    X = elementwise(normalized, X, norm(X, (-2, -1)))
    aspect = X.shape[2] / X.shape[1]
    lengths = segments(hyper.coefficients, dtype, dtype, aspect, symmetric=False)
    ends = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    for first, last in pairwise(ends):
        function = partial(gram_polynomial, coefficients=hyper.coefficients[first:last])
        X = product(on_whole_matrices(function, product(X, transposed(X))), X)
    result: Tensor = transposed(X) if tall else X
    return result
