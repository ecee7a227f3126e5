"""Newton-Schulz in Gram form: iterate on the small ``X X^T``, and apply the result to ``X`` once.

Every iterate is ``Q X`` with ``Q`` a polynomial in ``R = X X^T``, so that with ``Z = a I + b R + c R^2`` an iteration
is ``Q <- Z Q`` and ``R <- Z R Z``, all of it on the short side.  Rounding in ``R`` acts on the singular values squared,
so where the dtype cannot carry that, ``X <- Q X`` is formed on the way and ``R`` computed anew (a restart).

Source: the Gram form and its restart are those of Dao-AILab/gram-newton-schulz; FLOPs in arXiv 2608.11612.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dion_dtensor.orthonormalize.polynomial import Coefficients, normalized

__all__ = [
    "gram_newton_schulz",
    "gram_polynomial",
    "iterate",
    "product_dtype",
    "segments",
    "symmetric_product",
]

# Without bf16 units a CPU multiplies bf16 matrices 20 to 250 times slower than float32 ones (measured, AVX2).
CPU_HAS_BF16 = torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
# Blocks of fewer rows lose to overhead what the symmetry saves (measured, AVX2 and AVX512 with bf16 units).
SMALLEST_BLOCK, SMALLEST_BF16_BLOCK = 128, 256
BLOCKS = 4
META_STANDS_FOR = "cuda"
"""The kind of device that tensors without data are counted for."""
# A smaller product does not fill a GPU when it is taken apart (measured, H200).
SMALLEST_SPLIT_ON_GPU = 3072
# On a CPU, what fits its caches; and larger tensors are mapped anew by the allocator, and faulted in, every time.
WORKING_SET = 4 << 20
# Relative to a small singular value.  The plain form loses 1e-5 to 4e-5 in float32 and 1e-2 to 4e-1 in bfloat16.
LOSS = {torch.float64: 1e-12, torch.float32: 2.0**-17, torch.bfloat16: 2.0**-13}


def gram_newton_schulz(
    stack: Tensor,
    coefficients: Coefficients,
    epsilon: float | Tensor = 1e-8,
    epsilon_rule: str = "add",
    norm_factor: float = 1.0,
) -> Tensor:
    """The value of :func:`~dion_dtensor.orthonormalize.newton_schulz`, with fewer multiplications.

    Args:
        stack: ``[N, m, n]``; iterated in :func:`product_dtype`, normalised as ``newton_schulz`` does.
        coefficients: triples ``(a, b, c)``, one an iteration.
        epsilon: keeps a zero matrix at zero.
        epsilon_rule: "add" divides by ``norm_factor * norm + epsilon``, "clamp" by
            ``norm_factor * max(norm, epsilon)``.
        norm_factor: see :func:`~dion_dtensor.orthonormalize.polynomial.norm_factor_of`.

    Returns:
        ``[N, m, n]`` in the dtype of ``stack``.
    """
    m, n = stack.shape[-2:]
    dtype = product_dtype(stack)
    X = normalized(stack, epsilon, epsilon_rule, norm_factor).to(dtype)
    if m > n:  # the short side first: the Gram matrix is the small one
        X = X.mT
    blocks = _blocks(X)
    aspect = max(m, n) / max(1, min(m, n))
    lengths = segments(coefficients, stack.dtype, dtype, aspect, symmetric=blocks > 1)
    flat = [value for triple in coefficients for value in triple]
    result: Tensor = gram_iterations(X.contiguous(), flat, list(lengths), blocks).to(stack.dtype)
    return result.mT if m > n else result


def product_dtype(stack: Tensor) -> torch.dtype:
    """The dtype to multiply ``stack`` in: its own, but float32 for bfloat16 on a CPU without bf16 units.

    There it is faster, and closer.
    """
    slow = stack.dtype == torch.bfloat16 and _kind(stack) == "cpu" and not CPU_HAS_BF16
    return torch.float32 if slow else stack.dtype


def segments(
    coefficients: Coefficients, dtype: torch.dtype, iterated: torch.dtype, aspect: float, *, symmetric: bool
) -> tuple[int, ...]:
    """How many iterations run on each Gram matrix before ``X`` and ``R`` are formed anew; a one is a plain iteration.

    A rounding ``u`` in ``R`` reaches a small singular value as ``u g^2``, ``g = a_1 a_2 ...`` being the gain of the
    iterations on that ``R`` so far; a segment ends before that exceeds what the result's dtype may lose.  In bfloat16
    itself a negative eigenvalue that has grown to the order of one makes the polynomial diverge, so only the last
    iterations, with ``u g^2 <= 1/8``, use ``R``: measured on five spectra, at most 1.5 times the error of the plain
    form (3.5 with segments of 2 and 3).

    Args:
        coefficients: triples ``(a, b, c)``.
        dtype: of the result.
        iterated: that the iterations run in.
        aspect: long side over short side.  Near-square matrices are not worth a Gram form.
        symmetric: whether symmetric products are computed by halves.

    Returns:
        Lengths that sum to the number of iterations.
    """
    count = len(coefficients)
    if aspect < (1.2 if symmetric else 1.5):
        return (1,) * count
    gains = [abs(triple[0]) for triple in coefficients]
    unit = torch.finfo(iterated).eps / 2
    if iterated == torch.bfloat16:
        last = 1
        while last < count and math.prod(gains[count - last - 1 : -1]) ** 2 * unit <= 1 / 8:
            last += 1
        return (1,) * (count - last) + (last,)
    lengths, gain = [0], 1.0
    for own in gains:
        if lengths[-1] and gain**2 * unit > LOSS[dtype]:
            lengths.append(0)
            gain = 1.0
        lengths[-1] += 1
        gain *= own
    return tuple(lengths)


def iterate(stack: Tensor, coefficients: Sequence[float], lengths: Sequence[int], blocks: int) -> Tensor:
    """The iterations on normalised matrices; on a CPU few at a time, and one by one where blocks are multiplied.

    A batched product copies blocks of its operands there; one of matrices reads them where they lie.

    Args:
        stack: ``[N, n, k]``, contiguous, ``n <= k``.
        coefficients: ``a, b, c`` of each iteration, one after the other.
        lengths: see :func:`segments`.
        blocks: see :func:`symmetric_product`.

    Returns:
        ``[N, n, k]``, contiguous.
    """
    some = max(1, WORKING_SET // max(1, stack[:1].nbytes))
    if stack.device.type != "cpu" or (blocks == 1 and some >= len(stack)):
        return _iterate(stack, coefficients, lengths, blocks)
    result = torch.empty_like(stack)
    parts = zip(*(s.unbind() if blocks > 1 else torch.split(s, some) for s in (stack, result)), strict=True)
    for part, out in parts:
        out.copy_(_iterate(part, coefficients, lengths, blocks))
    return result


def _iterate(stack: Tensor, coefficients: Sequence[float], lengths: Sequence[int], blocks: int) -> Tensor:
    X = stack
    ends = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    for first, last in pairwise(ends):
        R = symmetric_product(X, X.mT, blocks)
        Q: Tensor | None = None
        for step in range(first, last):
            a, b, c = coefficients[3 * step : 3 * step + 3]
            Z = symmetric_product(R, R, blocks, add=R, beta=b, alpha=c)  # without a I
            if step + 1 == last and Q is None:
                del R  # these are as large as X where it is square
                X = _added(X, Z, X, beta=a)
                del Z
                break
            if step + 1 < last:
                R = symmetric_product(Z, R, blocks, add=R, beta=a)
                R = symmetric_product(Z, R, blocks, add=R, beta=a)
            if Q is None:
                Q = Z
                Q.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                Q = symmetric_product(Z, Q, blocks, add=Q, beta=a)
        else:
            assert Q is not None
            del R, Z
            X = Q @ X
            del Q
    return X.clone() if X is stack else X


def gram_polynomial(R: Tensor, coefficients: Coefficients) -> Tensor:
    """What some iterations multiply ``X`` with: a polynomial in ``R = X X^T``, ``[N, n, n]``.

    Args:
        R: ``[N, n, n]``, of matrices that were normalised before.
        coefficients: triples ``(a, b, c)`` of these iterations.
    """
    identity = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    Q = identity.expand_as(R)
    for a, b, c in coefficients:
        Z = a * identity + torch.baddbmm(R, R, R, beta=b, alpha=c)
        Q, R = Z @ Q, Z @ R @ Z
    return Q


# Opaque to the compiler, which would make a kernel of each copy.
gram_iterations = torch.library.custom_op("dion_dtensor::gram_iterations", iterate, mutates_args=())


@gram_iterations.register_fake
def _(stack: Tensor, coefficients: Sequence[float], lengths: Sequence[int], blocks: int) -> Tensor:
    return stack.new_empty(stack.shape)


@register_flop_formula(torch.ops.dion_dtensor.gram_iterations)
def _flops(
    shape: Sequence[int], coefficients: Sequence[float], lengths: Sequence[int], blocks: int, **_: Any
) -> int:
    """For `FlopCounterMode`, which does not look into it."""
    count, n, k = shape
    halved = sum(2 * n * n * k + (4 * length - 3) * 2 * n**3 for length in lengths)
    whole = len(lengths) * 2 * n * n * k
    return count * (halved * (blocks + 1) // (2 * blocks) + whole)


def symmetric_product(
    left: Tensor,
    right: Tensor,
    blocks: int,
    *,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """``beta * add + alpha * left @ right``, known to be symmetric: the blocks above the diagonal, then mirrored.

    Args:
        left: ``[N, n, k]`` or ``[n, k]``.
        right: ``[N, k, n]`` or ``[k, n]``.
        blocks: block rows; ``b`` of them take ``(b + 1) / 2b`` of the multiplications, one takes all.
        add: ``[N, n, n]`` or ``[n, n]``, symmetric; None for zero.
        beta: factor on ``add``.
        alpha: factor on the product.
    """
    n = left.shape[-2]
    result = left.new_empty((*left.shape[:-1], n))
    edges = [n * index // blocks for index in range(blocks + 1)]
    beta = 0.0 if add is None else beta
    for low, high in pairwise(edges):
        rows = result[..., low:high, low:]
        base = rows if add is None else add[..., low:high, low:]
        _added(base, left[..., low:high, :], right[..., low:], beta=beta, alpha=alpha, out=rows)
        result[..., high:, low:high] = rows[..., high - low :].mT
    return result


def _added(base: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
    """``beta * base + alpha * left @ right`` of one matrix or of a stack."""
    multiply = torch.addmm if left.ndim == 2 else torch.baddbmm
    result: Tensor = multiply(base, left, right, **options)
    return result


def _blocks(stack: Tensor) -> int:
    """Block rows of a symmetric product of ``[N, n, k]``: several where that was measured to be faster."""
    if _kind(stack) != "cpu":
        return BLOCKS if min(stack.shape[-2:]) >= SMALLEST_SPLIT_ON_GPU else 1
    smallest = SMALLEST_BF16_BLOCK if stack.dtype == torch.bfloat16 else SMALLEST_BLOCK
    return max(1, min(BLOCKS, min(stack.shape[-2:]) // smallest))


def _kind(stack: Tensor) -> str:
    return META_STANDS_FOR if stack.device.type == "meta" else stack.device.type
