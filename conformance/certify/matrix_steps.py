"""One step of Muon, NorMuon, Dion2 and Dion3 on one matrix, with the rounding that each output may carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpmath import mp

from conformance.certify.conditions import hypot, newton_schulz_bound, polar_bound
from conformance.certify.output import Output
from conformance.certify.precise import (
    Matrix,
    Real,
    apply,
    combine,
    frobenius,
    real,
    row_norms,
    scaled,
    shape,
    singular_values,
    transpose,
    underflow,
    vector_norm,
    zeros,
)
from conformance.certify.primitives import UncleanCaseError, ceiling, newton_schulz, polar, top_slices
from conformance.certify.tables import NORM_FACTOR, coefficients

Settings = Mapping[str, Any]
"""Every hyperparameter of the step by the oracle's field names."""

SIGN_GAP = 1e-9
"""A cautious case must not have an entry of ``update * W`` nearer to zero than this, relative to its largest."""


@dataclass(frozen=True)
class Rounded:
    """A value and the bound on its error in Frobenius norm, in units of eps."""

    value: Matrix
    bound: Real


def orthonormalize(X: Rounded, settings: Settings) -> Rounded:
    """The polynomial or the polar factor of X, by the settings."""
    size = frobenius(X.value)
    name = settings["polynomial"]
    if name == "exact":
        factor, kept = polar(X.value)
        return Rounded(factor, polar_bound(kept, X.bound, size))
    steps = coefficients(name) if isinstance(name, str) else [(real(a), real(b), real(c)) for a, b, c in name]
    stated = settings["norm_factor"]
    factor = real(
        (NORM_FACTOR.get(name, 1.0) if isinstance(name, str) else 1.0) if stated is None else stated
    )
    epsilon = real(settings["epsilon"])
    divisor = factor * size + epsilon if settings["epsilon_rule"] == "add" else factor * max(size, epsilon)
    unit = scaled(1 / divisor, X.value)
    # the entries' own error, that of the norm, and two roundings of the division
    error = float(2 * X.bound / divisor + 2 * frobenius(unit) + underflow(*shape(unit)))
    return Rounded(newton_schulz(unit, steps), newton_schulz_bound(singular_values(unit), steps, error))


def scale_of(settings: Settings, rows: int, columns: int) -> Real:
    """The factor on lr, from the full shape."""
    fan_out, fan_in = (rows, columns) if settings["weight_storage"] == "out_in" else (columns, rows)
    longest, ratio = real(max(fan_out, fan_in)), real(fan_out) / fan_in
    squares = {
        "spectral_norm": ratio,
        "keller": max(ratio, real(1)),
        "moonlight": longest / 25,
        "rms_norm": longest / 25,
        "nvidia": longest,
        None: real(1),
    }
    return mp.sqrt(squares[settings["scale"]])


def applied(W: Matrix, U: Rounded, settings: Settings) -> Output:
    """Decay and update of the weight: ``W d - lr s U`` where d is 1 on the entries that caution spares.

    Error: eps of the decayed weight and of the update, and lr s times the error of the update.

    Raises:
        UncleanCaseError: the sign of ``update * W`` hangs on rounding.
    """
    lr, decay = real(settings["lr"]), real(settings["lr"]) * real(settings["weight_decay"])
    step = lr * scale_of(settings, *shape(W))
    products = apply(lambda u, w: u * w, U.value, W)
    largest = max(abs(p) for row in products for p in row)
    if settings["cautious"] and any(0 < abs(p) < SIGN_GAP * largest for row in products for p in row):
        raise UncleanCaseError("the sign of an entry of update * W hangs on rounding")
    spared = apply(lambda p: bool(settings["cautious"]) and p < 0, products)
    value = apply(lambda w, u, spare: (w if spare else w - decay * w) - step * u, W, U.value, spared)
    return Output("param", value, hypot(frobenius(W), step * frobenius(U.value)) + step * U.bound)


def accumulated(M: Matrix, G: Matrix, settings: Settings, t: int) -> tuple[Rounded, Rounded]:
    """The new momentum and the orthonormalizer's input, both written out in M and G: ``p M + q G``.

    The rounding of each coefficient, the bias corrections' cancellation ``mu^t / (1 - mu^t)`` among them, goes into the
    bound with the size of its term.
    """
    mu = real(settings["mu"])
    fresh = 1 - mu if settings["momentum"] == "ema" else real(1)
    size_m, size_g = frobenius(M), frobenius(G)
    momentum = Rounded(combine(mu, M, fresh, G), mu * size_m + fresh * size_g)
    correction, following = real(1), real(1)
    lost, lost_following = real(0), real(0)
    if settings["bias_correction"]:
        correction, following = 1 - mu**t, 1 - mu ** (t + 1)
        lost, lost_following = mu**t / correction, mu ** (t + 1) / following
    if settings["nesterov"]:
        p, q = mu * mu / following, mu * fresh / following + fresh / correction
        bound = p * size_m * (1 + lost_following) + q * size_g * (1 + lost)
    else:
        p, q = mu / correction, fresh / correction
        bound = (p * size_m + q * size_g) * (1 + lost)
    return momentum, Rounded(combine(p, M, q, G), bound)


def rescaled_rows(ortho: Rounded, V: Matrix, settings: Settings) -> tuple[Rounded, Output]:
    """NorMuon's rows: ``O / (sqrt(v) + eps)``, brought back to the Frobenius norm of O, and the new v.

    A row's v moves by ``2 ||O_i|| dO_i / n``; the row itself by ``dO_i / (sqrt(v) + eps)`` and by its length times the
    change of that divisor; the rescaled whole by the relative error of both norms besides.
    """
    beta2, epsilon = real(settings["beta2"]), real(settings["variance_epsilon"])
    columns = len(ortho.value[0])
    norms = row_norms(ortho.value)
    new_v = [beta2 * v[0] + (1 - beta2) * n * n / columns for v, n in zip(V, norms, strict=True)]
    # dO is one number for the whole matrix, so the row with the largest factor may carry all of it
    bound_v = hypot(*new_v) + (1 - beta2) * 2 * max(norms) * ortho.bound / columns
    roots = [mp.sqrt(v) for v in new_v]
    rows = [[x / (root + epsilon) for x in row] for row, root in zip(ortho.value, roots, strict=True)]
    factors = []
    for n, v, root in zip(norms, new_v, roots, strict=True):
        direct = 1 / (root + epsilon)
        share = n * (1 - beta2) * n / columns / (root * (root + epsilon) ** 2) if v else real(0)
        factors.append(direct + share)
    size, size_rows = frobenius(ortho.value), frobenius(rows)
    bound_rows = max(factors) * ortho.bound + size_rows
    factor = size / max(size_rows, epsilon)
    bound = factor * bound_rows * 2 + (ortho.bound + size) * (size_rows * factor / size if size else real(0))
    return Rounded(scaled(factor, rows), bound), Output("variance", [[v] for v in new_v], bound_v)


def muon(W: Matrix, G: Matrix, M: Matrix, t: int, settings: Settings) -> list[Output]:
    """Momentum, orthonormalized; t counts from 1."""
    momentum, direction = accumulated(M, G, settings, t)
    U = orthonormalize(direction, settings)
    return [applied(W, U, settings), Output("momentum", momentum.value, momentum.bound)]


def normuon(W: Matrix, G: Matrix, M: Matrix, V: Matrix, t: int, settings: Settings) -> list[Output]:
    """Muon, then rows of equal second moment."""
    momentum, direction = accumulated(M, G, settings, t)
    U, variance = rescaled_rows(orthonormalize(direction, settings), V, settings)
    return [applied(W, U, settings), Output("momentum", momentum.value, momentum.bound), variance]


def _selected(W: Matrix, G: Matrix, M: Matrix, rows: bool, settings: Settings) -> tuple[list[int], Matrix]:
    """Indices of the chosen slices and M + G, transposed if the slices are columns.

    Raises:
        UncleanCaseError: M + G is rounded, and the rounding could change the choice.
    """
    total = combine(1, M, 1, G)
    slices = total if rows else transpose(total)
    count = max(1, ceiling(settings["fraction"], len(slices)))
    rounded = [[float(x) for x in entries] for entries in slices]
    return top_slices(rounded, count), slices


def _scattered(chosen: Sequence[int], values: Matrix, like: Matrix) -> Matrix:
    full = zeros(*shape(like))
    for i, row in zip(chosen, values, strict=True):
        full[i] = row
    return full


def dion2(W: Matrix, G: Matrix, M: Matrix, settings: Settings) -> list[Output]:
    """The slices with the largest L1 norm, orthonormalized, and damped in the momentum."""
    rows = len(W) <= len(W[0])
    chosen, slices = _selected(W, G, M, rows, settings)
    part = [slices[i] for i in chosen]
    U = orthonormalize(Rounded(part, frobenius(part)), settings)
    mu = real(settings["mu"])
    kept = [[mu * x for x in row] if i in chosen else row for i, row in enumerate(slices)]
    full = _scattered(chosen, U.value, slices)
    if not rows:
        kept, full = transpose(kept), transpose(full)
    return [applied(W, Rounded(full, U.bound), settings), Output("momentum", kept, frobenius(slices))]


def dion3(W: Matrix, G: Matrix, M: Matrix, V: Matrix, settings: Settings) -> list[Output]:
    """Dion2 on rows, with NorMuon's normalization of the chosen ones."""
    chosen, slices = _selected(W, G, M, True, settings)
    part = [slices[i] for i in chosen]
    ortho = orthonormalize(Rounded(part, frobenius(part)), settings)
    U, variance = rescaled_rows(ortho, [V[i] for i in chosen], settings)
    mu = real(settings["mu"])
    kept = [[mu * x for x in row] if i in chosen else row for i, row in enumerate(slices)]
    all_variance = [list(v) for v in V]
    for i, v in zip(chosen, variance.value, strict=True):
        all_variance[i] = v
    unchanged = vector_norm(V[i][0] for i in range(len(V)) if i not in chosen)
    return [
        applied(W, Rounded(_scattered(chosen, U.value, slices), U.bound), settings),
        Output("momentum", kept, frobenius(slices)),
        Output("variance", all_variance, hypot(variance.bound, unchanged)),
    ]
