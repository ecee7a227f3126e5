"""One number of merit: error in units of float64 eps times the condition number that theory allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.certify.precise import (
    EPS,
    Matrix,
    Real,
    apply,
    column_norms,
    combine,
    frobenius,
    from_tensor,
    shape,
    underflow,
)

LIMIT = 32.0
"""More units than this is a failure."""


@dataclass(frozen=True)
class Output:
    """What one output of the oracle should be, and how far rounding may carry it.

    Args:
        name: "param", "momentum", ...
        value: the 50-digit value, ``[m, n]``.
        bound: first-order bound on the Frobenius norm of the change in the output, divided by eps, when every
            operation and every input on the way to it carries a relative rounding of eps.  ``bound / ||value||`` is
            the condition number.  One row of numbers: the same for the norm of each column by itself (Q, whose columns
            differ in condition).  A matrix: for each entry by itself (AdamW, Lion and the normal values, where
            entries don't mix).  Both are stricter than the norm of the whole.
    """

    name: str
    value: Matrix
    bound: Real | Matrix

    def units(self, actual: Tensor) -> float:
        """Error in units of ``eps * bound``, the largest over columns or entries if bound is by those.


        A floor of one denormal spacing an entry is added to the allowance: a result below the normal range of float64
        cannot be nearer than that.  Wrong shape or a value that is not finite: infinity.
        """
        rows, columns = shape(self.value)
        if actual.numel() != rows * columns or not bool(torch.isfinite(actual).all()):
            return math.inf
        difference = combine(1, from_tensor(actual.reshape(rows, columns)), -1, self.value)
        if not isinstance(self.bound, list):
            return float(frobenius(difference) / (EPS * (self.bound + underflow(rows, columns))))
        if len(self.bound) == 1:
            pairs = zip(column_norms(difference), self.bound[0], strict=True)
            return max(float(error / (EPS * (allowed + underflow(rows)))) for error, allowed in pairs)
        ratios = apply(
            lambda error, allowed: abs(error) / (EPS * (allowed + underflow(1))), difference, self.bound
        )
        return max(float(ratio) for row in ratios for ratio in row)
