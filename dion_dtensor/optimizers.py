"""The optimizers by name; all of them take the groups of :func:`dion_dtensor.param_groups`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from dion_dtensor.common import Common
from dion_dtensor.optimizer import OrthonormalOptimizer
from dion_dtensor.orthonormalize import resolve_polynomial
from dion_dtensor.orthonormalize.polynomial import Coefficients

__all__ = ["Dion", "Dion2", "Dion3", "Muon", "NorDion2", "NorMuon"]

Polynomial = str | Coefficients


def _named(polynomial: Polynomial) -> Polynomial:
    """Literal coefficients as tuples of numbers, which a checkpoint can hold."""
    return polynomial if isinstance(polynomial, str) else resolve_polynomial(polynomial)


class Muon(OrthonormalOptimizer):
    """Muon on any mesh: momentum, orthonormalized as whole matrices.

    Source: Jordan et al. 2024 (KellerJordan/Muon); conventions of microsoft/dion by default.

    Args:
        params: param groups (see :func:`dion_dtensor.param_groups`), matrices ``[m, n]``, or ``(name, matrix)`` pairs.
            A group's ``split`` says how its parameters are cut into logical matrices (see
            :mod:`dion_dtensor.split_text`).
        lr: base learning rate, a float or a 0-d tensor.
        mu: momentum factor, in [0, 1).
        nesterov: look one momentum step ahead.
        momentum: "sum" (``M <- mu M + G``) or "ema" (``M <- mu M + (1 - mu) G``).
        bias_correction: with "ema": divide M and G by what their weights add up to at this step (optax.contrib.muon).
        polynomial: "polar_express", "keller", "you", "polar_express_gns", "cans", or triples ``(a, b, c)``.
        epsilon: keeps a zero momentum at zero; ``epsilon_rule`` "add" or "clamp" says where it stands.
        epsilon_rule: see :func:`dion_dtensor.orthonormalize.newton_schulz`.
        norm_factor: factor on the norm before the polynomial; None for the one that belongs to the polynomial.
        scale: "spectral_norm" (sqrt(m/n)), "keller" (sqrt(max(1, m/n))), "moonlight" (0.2 sqrt(max(m, n))), "nvidia"
            (sqrt(max(m, n))), or None, by the full shape of the logical matrix.
        weight_storage: "in_out" where the columns are the outputs, so that m and n change places in the scale.
        path: "assemble" (also "auto") brings whole matrices together; "gram" sends their small Gram matrices alone
            where only the long side is sharded, in float32 or wider.  The result is the same up to rounding.
        common: weight decay, precision, compilation, replicas: see :class:`~dion_dtensor.common.Common`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        nesterov: bool = False,
        *,
        momentum: str = "sum",
        bias_correction: bool = False,
        polynomial: Polynomial = "polar_express",
        epsilon: float = 1e-8,
        epsilon_rule: str = "add",
        norm_factor: float | None = None,
        scale: str | None = "spectral_norm",
        weight_storage: str = "out_in",
        path: str = "auto",
        **common: Unpack[Common],
    ) -> None:
        options = {
            "mu": mu,
            "nesterov": nesterov,
            "momentum": momentum,
            "bias_correction": bias_correction,
            "path": path,
            "polynomial": _named(polynomial),
            "epsilon": epsilon,
            "epsilon_rule": epsilon_rule,
            "norm_factor": norm_factor,
            "scale": scale,
            "weight_storage": weight_storage,
        }
        super().__init__(params, algorithm="muon", options=options, lr=lr, **common)


class NorMuon(OrthonormalOptimizer):
    """NorMuon on any mesh: Muon, then each row divided by the root of its running variance.

    Source: Li et al., arXiv 2510.05491; order of operations of microsoft/dion.  Norms are those of whole matrices.

    Args:
        params, lr, mu, nesterov, momentum, bias_correction, polynomial, epsilon, epsilon_rule, norm_factor, scale,
            weight_storage, common: as for :class:`Muon`.
        beta2: decay of the rows' variance, in [0, 1).
        variance_epsilon: added to its root.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        nesterov: bool = False,
        *,
        beta2: float = 0.95,
        variance_epsilon: float = 1e-8,
        momentum: str = "sum",
        bias_correction: bool = False,
        polynomial: Polynomial = "polar_express",
        epsilon: float = 1e-8,
        epsilon_rule: str = "add",
        norm_factor: float | None = None,
        scale: str | None = "spectral_norm",
        weight_storage: str = "out_in",
        **common: Unpack[Common],
    ) -> None:
        options = {
            "mu": mu,
            "nesterov": nesterov,
            "momentum": momentum,
            "bias_correction": bias_correction,
            "beta2": beta2,
            "variance_epsilon": variance_epsilon,
            "polynomial": _named(polynomial),
            "epsilon": epsilon,
            "epsilon_rule": epsilon_rule,
            "norm_factor": norm_factor,
            "scale": scale,
            "weight_storage": weight_storage,
        }
        super().__init__(params, algorithm="normuon", options=options, lr=lr, **common)


class Dion(OrthonormalOptimizer):
    """Dion on any mesh: an orthonormal update of rank r, by the products of ``[m, r]`` and ``[n, r]``.

    Source: Ahn et al., arXiv 2504.05295; conventions of microsoft/dion.

    Gradients that are not averaged over replicas yet (``Partial("avg")`` on an axis of the mesh, or
    ``averaged=False`` with ``replicate_mesh``) stay so: each rank keeps its own momentum, and only P and R are
    averaged, ``(m + n) r`` numbers instead of ``m n``.  The update is that of the averaged gradient.  The ranks'
    momenta drift apart as the root of the number of steps; ``resync_every`` averages them now and
    then, as ``state_dict`` does.

    Args:
        params, lr, common: as for :class:`Muon`.
        mu: 1 minus the part of the approximation that the error feedback takes from the momentum.
        rank_fraction: r = rank_multiple * ceil(rank_fraction * min(m, n) / rank_multiple), at most min(m, n).
        rank_multiple: see ``rank_fraction``.
        orthonormalize: "qr" assembles P, m x r, and takes its Householder QR; "rcqr" (randomized Cholesky QR) leaves
            its rows where they are, and sends r x r and 1.25 r x r; matrices that are blocks of a weight (``split``)
            take "qr".
        right_factor: "normalize" the columns of Q, or "orthonormalize" them (Orth-Dion, arXiv 2605.16341).
        path: "low_rank" sends P and R, (m + n) r numbers to every rank; "assemble" brings the momentum together and
            back, each matrix to one rank, which is less on long axes; "auto" takes what is predicted to cost less.
            Gradients that are not averaged yet take "low_rank".
        epsilon: added to the column norms of Q.
        scale, weight_storage: as for :class:`Muon`.
        seed: of the initial Q, which depends on (seed, name, logical matrix, row, column) only.
        resync_every: steps between two averages of the momentum; None for never.

    ``compute_dtype`` is that of the products P R^T and P Q^T; M Q, M^T P, the QR and the norms stay in the state's
    dtype or float32, whichever is wider.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        *,
        rank_fraction: float = 1.0,
        rank_multiple: int = 1,
        orthonormalize: str = "qr",
        right_factor: str = "normalize",
        path: str = "auto",
        epsilon: float = 1e-8,
        scale: str | None = "spectral_norm",
        weight_storage: str = "out_in",
        seed: int = 0,
        resync_every: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "mu": mu,
            "rank_fraction": rank_fraction,
            "rank_multiple": rank_multiple,
            "orthonormalize": orthonormalize,
            "right_factor": right_factor,
            "path": path,
            "epsilon": epsilon,
            "scale": scale,
            "weight_storage": weight_storage,
        }
        super().__init__(
            params, algorithm="dion", options=options, lr=lr, seed=seed, resync_every=resync_every, **common
        )


class Dion2(OrthonormalOptimizer):
    """Dion2 on any mesh: Muon on the slices of largest L1 norm; the others wait, their momentum growing.

    Source: arXiv 2512.16928.  The choice is always that of the whole matrix, and where the slices' dim is sharded, only
    chosen slices travel.

    Args:
        params, lr, polynomial, epsilon, epsilon_rule, norm_factor, scale, weight_storage, common: as for
            :class:`Muon`.
        mu: factor on the momentum of the chosen slices, in [0, 1).
        fraction: of the slices of the shorter side (rows if m <= n), at least one slice.
        path: "exchange" sends chosen slices alone, "assemble" all of them by ordinary collectives; "auto" takes what
            is predicted to cost less, which for small matrices is to assemble.  The result is the same.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        *,
        fraction: float = 0.25,
        polynomial: Polynomial = "polar_express",
        epsilon: float = 1e-8,
        epsilon_rule: str = "add",
        norm_factor: float | None = None,
        scale: str | None = "spectral_norm",
        weight_storage: str = "out_in",
        path: str = "auto",
        **common: Unpack[Common],
    ) -> None:
        options = {
            "mu": mu,
            "fraction": fraction,
            "polynomial": _named(polynomial),
            "epsilon": epsilon,
            "epsilon_rule": epsilon_rule,
            "norm_factor": norm_factor,
            "scale": scale,
            "weight_storage": weight_storage,
            "path": path,
        }
        super().__init__(params, algorithm="dion2", options=options, lr=lr, **common)


class Dion3(OrthonormalOptimizer):
    """Dion3, also called NorDion2, on any mesh: Dion2 on rows, each divided by the root of its running variance.

    Source: arXiv 2608.11612.  Choice and norms are those of the whole matrix.

    Args:
        params, lr, mu, fraction, polynomial, epsilon, epsilon_rule, norm_factor, scale, weight_storage, path,
            common: as for :class:`Dion2`; the slices are rows whatever the shape.
        beta2: decay of the chosen rows' variance, in [0, 1).
        variance_epsilon: added to its root.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        *,
        fraction: float = 0.25,
        beta2: float = 0.95,
        variance_epsilon: float = 1e-8,
        polynomial: Polynomial = "polar_express",
        epsilon: float = 1e-8,
        epsilon_rule: str = "add",
        norm_factor: float | None = None,
        scale: str | None = "spectral_norm",
        weight_storage: str = "out_in",
        path: str = "auto",
        **common: Unpack[Common],
    ) -> None:
        options = {
            "mu": mu,
            "fraction": fraction,
            "beta2": beta2,
            "variance_epsilon": variance_epsilon,
            "polynomial": _named(polynomial),
            "epsilon": epsilon,
            "epsilon_rule": epsilon_rule,
            "norm_factor": norm_factor,
            "scale": scale,
            "weight_storage": weight_storage,
            "path": path,
        }
        super().__init__(params, algorithm="dion3", options=options, lr=lr, **common)


NorDion2 = Dion3
