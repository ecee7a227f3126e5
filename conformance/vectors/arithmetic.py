"""The oracle with every sum in a fixed order, so that it gives the same bits on every machine.

IEEE 754 defines `+ - * /` and the square root to the last bit. What differs between machines is the order in which
BLAS, LAPACK and vectorized reductions add. Under `FixedOrder` these are replaced by elementwise operations in one
order; any operation that is neither known to be exact nor replaced is refused, so that none can slip in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

EXACT = frozenset(  # a word an operation
    """
    __and__ __lshift__ __or__ __rshift__ _local_scalar_dense _to_copy _unsafe_view abs add alias all amax
    any arange as_strided bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
    bitwise_xor cat clamp clone copy_ detach diagonal div empty empty_like empty_strided eq expand eye fill_
    flatten flip frexp full full_like ge gt index index_copy index_put_ index_select is_nonzero isfinite le
    lift_fresh logical_and logical_not lt maximum minimum mul ne neg new_zeros nonzero ones_like permute
    reciprocal rsub scalar_tensor select sign slice sort split split_with_sizes sqrt squeeze stack sub t
    transpose unbind unsqueeze view where zero_ zeros zeros_like
    """.split()  # noqa: SIM905
)
"""Operations without rounding, or with one correctly rounded operation an element."""


LARGE = 2.0**50
"""Matrices with larger elements are scaled before they are factored."""


def total(terms: Tensor, dim: int) -> Tensor:
    """The sum over `dim`, by halves: element i plus element i + half, until one is left."""
    terms = terms.movedim(dim, -1)
    while terms.shape[-1] > 1:
        half = (terms.shape[-1] + 1) // 2
        low, high = terms[..., :half], terms[..., half:]
        summed = low[..., : high.shape[-1]] + high
        terms = torch.cat((summed, low[..., high.shape[-1] :]), dim=-1)
    return terms.squeeze(-1) if terms.shape[-1] else terms.sum(-1)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`; half precision accumulates in float32 and rounds once, as hardware does."""
    wide = torch.promote_types(left.dtype, torch.float32)
    products = left.to(wide).unsqueeze(-1) * right.to(wide).unsqueeze(-3)
    return total(products, -2).to(left.dtype)


def _dims(x: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(x.ndim))
    return [one % x.ndim for one in ([dim] if isinstance(dim, int) else dim)]


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if dtype is not None:
        x = x.to(dtype)
    dims = _dims(x, dim)
    for one in sorted(dims, reverse=True):
        x = total(x, one).unsqueeze(one)
    if keepdim:
        return x
    for one in sorted(dims, reverse=True):
        x = x.squeeze(one)
    return x


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    count = 1
    for one in _dims(x, dim):
        count *= x.shape[one]
    return _sum(x, dim, keepdim, dtype=dtype) / count


def _vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    assert ord == 2
    x = x if dtype is None else x.to(dtype)
    return _sum(x * x, dim, keepdim).sqrt()


def _power(x: Tensor, exponent: float = 2) -> Tensor:
    assert exponent == 2
    return x * x


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _size(A: Tensor) -> float:
    """A power of two near the largest element where squares might overflow; dividing by it rounds nothing."""
    peak = float(A.abs().amax()) if A.numel() else 0.0
    return 2.0 ** math.frexp(peak)[1] if LARGE < peak < math.inf else 1.0


def _qr(A: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """Gram-Schmidt, each column projected three times: as orthonormal as Householder, unless it is dependent."""
    size = _size(A)
    if size > 1:
        Q, R = _qr(A / size)
        return Q, R * size
    m, r = A.shape
    Q, R = A.new_zeros(m, r), A.new_zeros(r, r)
    for j in range(r):
        column = A[:, j]
        for _ in range(3):
            shares = matmul(Q[:, :j].mT, column[:, None])[:, 0]
            column = column - matmul(Q[:, :j], shares[:, None])[:, 0] if j else column
            R[:j, j] += shares
        length = _vector_norm(column)
        R[j, j] = length
        if length > 0:
            Q[:, j] = column / length
    return Q, R


def _solve_triangular(
    A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    assert upper
    assert left
    assert not unitriangular
    X = B.clone()
    for i in reversed(range(A.shape[0])):
        known = matmul(A[i : i + 1, i + 1 :], X[i + 1 :]) if i + 1 < A.shape[0] else 0
        X[i : i + 1] = (X[i : i + 1] - known) / A[i, i]
    return X


def _svd(
    A: Tensor, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One-sided Jacobi: columns are rotated in pairs until all are orthogonal."""
    if A.shape[0] < A.shape[1]:
        U, S, Vh = _svd(A.mT)
        return Vh.mT, S, U.mT
    size = _size(A)
    if size > 1:
        U, S, Vh = _svd(A / size)
        return U, S * size, Vh
    n = A.shape[1]
    B, V = A.clone(), torch.eye(n, dtype=A.dtype)
    for _ in range(12):
        for i in range(n - 1):
            for j in range(i + 1, n):
                a, b = _sum(B[:, i] * B[:, i]), _sum(B[:, j] * B[:, j])
                c = _sum(B[:, i] * B[:, j])
                if c == 0:
                    continue
                zeta = (b - a) / (2 * c)
                t = torch.where(zeta >= 0, 1.0, -1.0).to(A.dtype) / (zeta.abs() + (1 + zeta * zeta).sqrt())
                cosine = 1 / (1 + t * t).sqrt()
                sine = cosine * t
                for X in (B, V):
                    left, right = X[:, i].clone(), X[:, j].clone()
                    X[:, i], X[:, j] = cosine * left - sine * right, sine * left + cosine * right
    S, order = torch.sort(_vector_norm(B, dim=0), descending=True, stable=True)
    U = torch.where(S > 0, B[:, order] / torch.where(S > 0, S, 1), 0)
    return U, S, V[:, order].mT


REPLACED: dict[Any, Callable[..., Any]] = {
    aten.mm: matmul,
    aten.bmm: matmul,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.linalg_vector_norm: _vector_norm,
    aten.pow: _power,
    aten.square: _power,
    aten.hypot: _hypot,
    aten.linalg_qr: _qr,
    aten.linalg_solve_triangular: _solve_triangular,
    aten._linalg_svd: _svd,
}


# Ignored: torch does not type how its base class is subclassed.
class FixedOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it, torch on the CPU computes what the oracle needs in one order, and refuses everything else."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        if packet in REPLACED:
            return REPLACED[packet](*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") not in EXACT:
            raise NotImplementedError(f"{func} is not known to give the same bits on every machine")
        return func(*args, **(kwargs or {}))
