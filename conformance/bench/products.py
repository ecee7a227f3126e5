"""The matrix products and factorizations of a step and nothing else: what a step takes at least."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from conformance.bench.timing import timed
from dion_ref import POLYNOMIALS

__all__ = ["bare_products", "flops", "peak"]


def bare_products(
    algorithm: str, count: int, shape: tuple[int, int], part: float, dtype: torch.dtype, device: str
) -> Callable[[], object]:
    """The products of the textbook form, each by one call of the library, on stacks that lie ready.

    Args:
        algorithm: "muon", "muon_torch", "normuon", "dion", "dion2" or "dion3".
        count: of matrices.
        shape: of each.
        part: rank fraction, or fraction of the rows.
        dtype: of the products.
        device: where.
    """
    short, long = sorted(shape)
    if algorithm == "dion":
        return _dion(count, short, long, ceil(part * short), dtype, device)
    rows, columns = (ceil(part * shape[0]), shape[1]) if algorithm == "dion3" else (ceil(part * short), long)
    rows, columns = sorted((rows, columns))
    X = _ready(count, rows, columns, dtype, device)
    iterations = len(POLYNOMIALS["polar_express"].coefficients)

    def step() -> Tensor:
        Y = X
        for _ in range(iterations):
            gram = Y @ Y.mT
            Y = torch.baddbmm(Y, torch.baddbmm(gram, gram, gram, beta=-1.0, alpha=0.5), Y, beta=1.5)
        return Y

    return step


def _dion(
    count: int, short: int, long: int, rank: int, dtype: torch.dtype, device: str
) -> Callable[[], object]:
    """``M Q``, its QR and ``M^T P`` in float32, the two products ``P R^T`` in ``dtype``."""
    M = _ready(count, long, short, torch.float32, device)
    Q = _ready(count, short, rank, torch.float32, device)

    def step() -> Tensor:
        P = torch.linalg.qr(M @ Q).Q
        R = M.mT @ P
        low, high = P.to(dtype), R.mT.to(dtype)
        return torch.cat((low @ high, low @ high))

    return step


def _ready(count: int, m: int, n: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(count, m, n, generator=generator)
    normalized: Tensor = stack / torch.linalg.matrix_norm(stack, keepdim=True)
    return normalized.to(dtype).to(device)


def peak(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of one product of two random matrices on the GPU, which is about the most that it gives.

    Args:
        dtype: of both.
        size: rows and columns of both.
    """
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    seconds = [timed(lambda: torch.mm(left, right), "cuda") for _ in range(13)]
    return 2.0 * size**3 / statistics.median(seconds[3:])


def flops(algorithm: str, count: int, shape: tuple[int, int], part: float) -> float:
    """Of the products above: ``T (4 m n^2 + 2 n^3)`` (arXiv 2608.11612); Dion ``8 m n r`` and ``4 m r^2`` for QR."""
    short, long = sorted(shape)
    if algorithm == "dion":
        rank = ceil(part * short)
        return count * (8.0 * long * short * rank + 4.0 * long * rank**2)
    rows, columns = (ceil(part * shape[0]), shape[1]) if algorithm == "dion3" else (ceil(part * short), long)
    rows, columns = sorted((rows, columns))
    iterations = len(POLYNOMIALS["polar_express"].coefficients)
    return count * iterations * (4.0 * columns * rows**2 + 2.0 * rows**3)
