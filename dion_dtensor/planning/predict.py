"""FLOPs, bytes and memory of one bucket's step, by algorithm and way to orthonormalize, in closed form.

Sources: FLOPs of Newton-Schulz and its Gram form, arXiv 2608.11612; of Dion, 8 m n r for its four products
(microsoft/dion); of Householder QR, 4 m r^2 - 4/3 r^3 with the explicit basis (Golub and Van Loan, 5.2); of Cholesky
QR, Fukaya et al. 2020.  Bytes follow from the verbs of ``dion_dtensor.assembly`` that the rules call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import torch

from dion_dtensor.orthonormalize.gram import segments
from dion_dtensor.orthonormalize.polynomial import POLYNOMIALS, Coefficients
from dion_dtensor.planning.buckets import (
    FEW_WEIGHTS,
    PARTIAL,
    Bucket,
    Cost,
    Transfer,
    assembly,
    collective,
    sharing,
)

__all__ = ["ALGORITHMS", "around", "basis_flops", "polynomial_flops", "predict", "ways"]

WIDE = 4  # bytes of float32, in which Dion's P, Q and R travel
EXPONENT = 1  # bytes of a float32's exponent, by which rows agree on a rounding
NORM = 8  # bytes of float64, in which norms travel
COEFFICIENTS = POLYNOMIALS["polar_express"]
ADAMW, LION = 8, 6
"""Passes of the elementwise rules: what they read and write, and gradients checked (1)."""


def predict(bucket: Bucket, algorithm: str, way: str | None = None, fraction: float = 1.0) -> Cost:
    """Of one step of ``bucket``.

    Args:
        bucket: the matrices and the mesh.
        algorithm: one of :data:`ALGORITHMS`.
        way: to orthonormalize, one of :func:`ways`; None for the first.
        fraction: Dion's ``rank_fraction``, the ``fraction`` of Dion2 and Dion3; others take none.

    Raises:
        ValueError: an unknown algorithm, a way that it does not have here, or a fraction outside (0, 1].
    """
    possible = ways(bucket, algorithm)
    way = way or possible[0]
    if way not in possible:
        raise ValueError(f"way={way!r} does not apply to {algorithm} on {bucket}; choose from {possible}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be in (0, 1]")
    return ALGORITHMS[algorithm](bucket, way, fraction)


def ways(bucket: Bucket, algorithm: str) -> tuple[str, ...]:
    """The ways to orthonormalize that apply; the first is the general one.

    Raises:
        ValueError: an unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is unknown; choose from {sorted(ALGORITHMS)}")
    if algorithm in ("adamw", "lion"):
        return ("elementwise",)
    if algorithm in ("dion", "orth_dion"):
        return ("low_rank", "rcqr", "assemble")
    if algorithm in ("dion2", "dion3"):
        rows = 1 if algorithm == "dion2" and bucket.shape[0] > bucket.shape[1] else 0
        return ("exchange", "assemble") if bucket.axes(rows) else ("assemble",)
    long = 0 if bucket.shape[0] > bucket.shape[1] else 1
    if algorithm == "muon" and bucket.axes(long) and not bucket.axes(1 - long):
        return ("assemble", "gram")
    return ("assemble",)


def polynomial_flops(
    m: int, n: int, *, dtype: torch.dtype, symmetric: float = 1.0, coefficients: Coefficients = COEFFICIENTS
) -> float:
    """Of ``gram_newton_schulz`` on one matrix.

    A segment of j iterations on one Gram matrix takes it, 4j - 3 products of the short side, and the application.
    With j = 1 throughout that is the plain form, T (4 l s^2 + 2 s^3).
    """
    short, long = sorted((m, n))
    lengths = segments(coefficients, dtype, dtype, long / short, symmetric=symmetric < 1)
    products = sum(4 * length - 3 for length in lengths)
    return symmetric * (len(lengths) * 2 * short**2 * long + products * 2 * short**3) + (
        len(lengths) * 2 * short**2 * long
    )


def basis_flops(m: int, r: int) -> float:
    """Of Householder QR with the explicit basis ``[m, r]``."""
    return 4 * m * r**2 - 4 / 3 * r**3


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _held(bucket: Bucket) -> float:
    """Elements of the bucket on the fullest rank."""
    return float(bucket.count * bucket.local(0) * bucket.local(1))


def _muon(bucket: Bucket, way: str, fraction: float, *, variance: bool = False) -> Cost:
    if way == "gram":
        return _by_gram(bucket)
    m, n = bucket.shape
    size = bucket.compute_dtype.itemsize
    sent, own = assembly(m, n, bucket.count, bucket.sizes, bucket.shards, size, size, bucket.order)
    if variance:
        of_rows = tuple(None if shard == 1 else shard for shard in bucket.shards)
        beside, _ = assembly(
            m, 1, bucket.count, bucket.sizes, of_rows, WIDE, WIDE, bucket.order, bucket.shards
        )
        sent += beside
    flops = own * polynomial_flops(m, n, dtype=bucket.compute_dtype, symmetric=bucket.symmetric)
    memory = _local_memory(bucket) + _polynomial_memory(own, m, n, size)
    # The loops of its rows no longer fuse with that of the weights.
    touched = _of_step(bucket, 10 if variance and _changes_weights(bucket) else 6, 2)
    return Cost({_name(bucket.compute_dtype): flops}, tuple(sent), memory, touched)


def _by_gram(bucket: Bucket) -> Cost:
    """Gram matrices ``[s, s]`` are reduce-scattered, iterated on, and all-gathered, in float32, a segment at a time."""
    short, long = sorted(bucket.shape)
    dim = 0 if bucket.shape[0] > bucket.shape[1] else 1
    partial_shards = tuple(PARTIAL if shard == dim else shard for shard in bucket.shards)
    lengths = segments(COEFFICIENTS, torch.float32, torch.float32, long / short, symmetric=False)
    sent = [
        collective("all_reduce", axis, bucket.sizes[axis], bucket.count * NORM) for axis in bucket.axes(dim)
    ]
    flops = 0.0
    for length in lengths:
        args = (bucket.count, bucket.sizes, partial_shards, WIDE, WIDE, bucket.order)
        once, own = assembly(short, short, *args)
        sent += once
        flops += 2 * 2.0 * bucket.count * short**2 * bucket.local(dim) + own * 4 * length * 2.0 * short**3
    memory = _local_memory(bucket) + 4 * WIDE * bucket.count * short**2 + 2 * WIDE * _held(bucket)
    return Cost({"float32": flops}, tuple(sent), memory, _of_step(bucket, 6 + 4 * len(lengths)))


def _dion(bucket: Bucket, way: str, fraction: float, *, orthonormal_right: bool = False) -> Cost:
    """P ``[l, r]`` on the long side, Q and R ``[s, r]`` on the short one; M never travels."""
    short, long = sorted(bucket.shape)
    dim = 1 if bucket.shape[0] < bucket.shape[1] else 0
    count, sizes = bucket.count, bucket.sizes
    exact = Fraction(str(fraction)) * short
    r = min(short, -(-exact.numerator // exact.denominator))
    if way == "assemble":
        return _dion_assembled(bucket, r, orthonormal_right)
    along, across = bucket.axes(dim), bucket.axes(1 - dim)
    local_long, local_short = bucket.local(dim), bucket.local(1 - dim)
    wide = count * local_long * local_short * r
    product = 2.0 * wide
    flops = {"float32": 2 * product}
    flops[_name(bucket.compute_dtype)] = flops.get(_name(bucket.compute_dtype), 0.0) + 2 * product
    sent: list[Transfer] = []

    def reduce(axes: tuple[int, ...], size: float) -> None:
        sent.extend(collective("all_reduce", axis, sizes[axis], size) for axis in axes)

    share = r
    for axis in along:
        share = -(-share // sizes[axis])
    held = count * local_short * share * WIDE
    for axis in bucket.inner_first(dim):  # Q, kept in shares of its columns
        sent.append(collective("all_gather", axis, sizes[axis], held))
        held *= sizes[axis]
    reduce(across, count * r * NORM)
    reduce(along + across, count * NORM)
    if way == "low_rank":
        shards = tuple(
            0 if axis in along else PARTIAL if axis in across else None for axis in range(len(sizes))
        )
        once, own = assembly(long, r, count, sizes, shards, WIDE, WIDE, bucket.order)
        sent += once
        flops["float32"] += own * basis_flops(long, r)
        working = 3.0 * own * long * r
    else:
        reduce(across, count * local_long * r * WIDE)
        rows = min(long, r + -(-r // 4))
        reduce(along, count * rows * r * WIDE)
        flops["float32"] += count * (2.0 * rows * local_long * r + basis_flops(rows, r) + 2.0 * rows * r**2)
        flops["float32"] += count * (2.0 * local_long * r**2 + r**3)
        for _ in range(2):
            reduce(along, count * r * r * WIDE)
            flops["float32"] += count * (4.0 * local_long * r**2 + 4 * r**3 / 3)
        working = 3.0 * count * local_long * r
    reduce(along, count * local_short * r * WIDE)  # R
    if orthonormal_right:
        reduce(across, count * NORM)
        shards = tuple(0 if axis in across else None for axis in range(len(sizes)))
        once, own = assembly(short, r, count, sizes, shards, WIDE, WIDE, bucket.order)
        sent += once
        flops["float32"] += own * basis_flops(short, r)
        reduce(across, count * r * NORM)
    else:
        reduce(along, count * r * NORM)
        reduce(across, count * r * NORM)
    memory = (
        _local_memory(bucket) + 2 * WIDE * _held(bucket) + WIDE * (working + 4.0 * count * local_short * r)
    )
    of_factors = 7.0 * WIDE * count * (local_long + local_short) * r
    return Cost(flops, tuple(sent), memory, _of_step(bucket, 8, 2) + of_factors)


def _dion_assembled(bucket: Bucket, r: int, orthonormal_right: bool) -> Cost:
    """The momentum goes to the ranks that work on it; it and the direction come back, Q both ways."""
    short, long = sorted(bucket.shape)
    compute = bucket.compute_dtype
    m, n = bucket.shape
    args = (bucket.count, bucket.sizes, bucket.shards)
    sent, own = assembly(m, n, *args, WIDE, WIDE, bucket.order)
    sent += assembly(m, n, *args, 0, compute.itemsize, bucket.order)[0]
    dim = 1 if m < n else 0
    # Q lies on the short side; the axes that shard the long one share its columns.
    of_Q = tuple(None if shard is None else 1 if shard == dim else 0 for shard in bucket.shards)
    sent += assembly(short, r, bucket.count, bucket.sizes, of_Q, WIDE, WIDE, bucket.order)[0]
    flops = {"float32": own * (4.0 * long * short * r + basis_flops(long, r))}
    if orthonormal_right:
        flops["float32"] += own * basis_flops(short, r)
    flops[_name(compute)] = flops.get(_name(compute), 0.0) + own * 4.0 * long * short * r
    memory = _local_memory(bucket) + own * WIDE * (4.0 * m * n + 3.0 * long * r + 3.0 * short * r)
    at_home = own * WIDE * (5.0 * m * n + 7.0 * (long + short) * r)
    touched = _of_step(bucket, 3, 2) + at_home
    return Cost(flops, tuple(one for one in sent if one.bytes), memory, touched)


def _on_rows(bucket: Bucket, way: str, fraction: float, *, only_rows: bool) -> Cost:
    """Dion2 and Dion3: the sums of the rows, then the chosen rows alone travel (expected: evenly spread)."""
    (m, n), sizes = bucket.shape, bucket.sizes
    dim = 0 if only_rows or m <= n else 1
    rows, columns = bucket.shape[dim], bucket.shape[1 - dim]
    exact = Fraction(str(fraction)) * rows
    chosen = max(1, -(-exact.numerator // exact.denominator))
    size = bucket.compute_dtype.itemsize
    down, along = bucket.axes(dim), bucket.axes(1 - dim)
    sums = bucket.count * bucket.local(dim) * NORM
    largest = bucket.count * bucket.local(dim) * (WIDE if bucket.state_dtype == torch.float64 else EXPONENT)
    sent = [collective("all_reduce", axis, sizes[axis], each) for each in (largest, sums) for axis in along]
    for axis in bucket.inner_first(dim):
        sent.append(collective("all_gather", axis, sizes[axis], sums))
        sums *= sizes[axis]
    # As if rows were "0" and columns "1", on whichever dim the rows lie.
    shards = tuple(s if s is None or dim == 0 else 1 - s for s in bucket.shards)
    number, remaining = bucket.count, list(sizes)
    held: float = _held(bucket) * size
    split: tuple[int, ...] = ()
    if way == "assemble":
        for axis in bucket.inner_first(dim):
            sent.append(collective("all_gather", axis, sizes[axis], held))
            held *= sizes[axis]
    else:
        copies = tuple(axis for axis, shard in enumerate(shards) if shard is None)
        axes = down + along + copies
        places, _ = sharing([sizes[axis] for axis in axes], [shards[axis] for axis in axes], bucket.count)
        planned = tuple(axes[place] for place in places)
        split = tuple(axis for axis in planned if axis not in along)
        number = -(-bucket.count // math.prod(sizes[axis] for axis in split))
        shared = math.prod(sizes[axis] for axis in split)
        beside = WIDE if only_rows else 0  # the variance goes along with its row
        moved: float = number * shared * chosen * (bucket.local(1 - dim) * size + beside)
        moved /= math.prod(sizes[axis] for axis in down)
        moved /= math.prod(sizes[axis] for axis in split if axis in copies)
        at_home = moved
        for axis in down:
            sent.append(collective("all_to_all" if axis in split else "all_gather", axis, sizes[axis], moved))
            moved *= 1 if axis in split else sizes[axis]
        for axis in split:
            remaining[axis] = 1
            sent.append(
                collective("all_gather" if axis in copies else "all_to_all", axis, sizes[axis], at_home)
            )
            at_home *= sizes[axis] if axis in copies else 1
    shards = tuple(None if shard == 0 else shard for shard in shards)
    once, own = assembly(chosen, columns, number, remaining, shards, size, size, bucket.order)
    sent += once
    if only_rows:
        copies_of = (None,) * len(shards)
        sent += assembly(chosen, 1, number, remaining, copies_of, WIDE, WIDE, bucket.order, shards)[0]
    flops = own * polynomial_flops(chosen, columns, dtype=bucket.compute_dtype, symmetric=bucket.symmetric)
    memory = _local_memory(bucket) + _polynomial_memory(own, chosen, columns, size)
    # Ranks that hold parts of the same rows agree on their largest values before these are read again to be summed.
    share = chosen / rows  # of its rows, Dion3 also reads and writes what their norms are divided by
    touched = _of_step(bucket, (8 if along else 6) + (4 if only_rows else 2) * share, 3 * share)
    return Cost({_name(bucket.compute_dtype): flops}, tuple(sent), memory, touched)


def _elementwise(bucket: Bucket, way: str, fraction: float, *, passes: int) -> Cost:
    """No product and no communication; AdamW reads and writes seven tensors, Lion five; gradients are checked."""
    return Cost({}, (), 2.0 * _held(bucket) * bucket.state_dtype.itemsize, _touched(bucket, passes))


def around(bucket: Bucket) -> int:
    """Passes of every matrix rule outside of its compiled update.

    Gradients joined (2, none for one matrix) and checked (1).  Then the change is added as the weights decay (3; none
    for few on a CPU, which the update changes itself), on other devices once they have decayed (2).
    """
    added = 5 if bucket.device != "cpu" else 0 if _changes_weights(bucket) else 3
    return (2 if bucket.count > 1 else 0) + 1 + added


def _of_step(bucket: Bucket, update: float, narrow: float = 0.0) -> float:
    """Bytes of a step, from the passes of an update that writes its change (1), not the weights that it changes (2)."""
    return _touched(bucket, around(bucket) + update + _changes_weights(bucket), narrow)


def _changes_weights(bucket: Bucket) -> bool:
    return bucket.device == "cpu" and bucket.count <= FEW_WEIGHTS


def _touched(bucket: Bucket, passes: float, narrow: float = 0.0) -> float:
    """Bytes of passes over the state, and of those over its rounding for the products; as Inductor counts them."""
    return _held(bucket) * (passes * bucket.state_dtype.itemsize + narrow * bucket.compute_dtype.itemsize)


def _local_memory(bucket: Bucket) -> float:
    """The joined gradients, the new momentum and its rounding, the change; ``max_bucket_bytes`` bounds it."""
    return _held(bucket) * (3 * bucket.state_dtype.itemsize + bucket.compute_dtype.itemsize)


def _polynomial_memory(own: int, m: int, n: int, size: int) -> float:
    """X before and after an iteration, what it was assembled from, and three products of the short side."""
    return float(own) * size * (3 * m * n + 3 * min(m, n) ** 2)


ALGORITHMS: dict[str, Callable[[Bucket, str, float], Cost]] = {
    "muon": _muon,
    "normuon": partial(_muon, variance=True),
    "dion": _dion,
    "orth_dion": partial(_dion, orthonormal_right=True),
    "dion2": partial(_on_rows, only_rows=False),
    "dion3": partial(_on_rows, only_rows=True),
    "adamw": partial(_elementwise, passes=ADAMW),
    "lion": partial(_elementwise, passes=LION),
}
"""How each is predicted, by name."""
