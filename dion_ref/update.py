"""What the rules share after and around the mathematics of their papers: orthonormalize, scale, decay, subtract."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from dion_ref.hyper import EXACT, CommonHyper, MatrixHyper, PolynomialHyper
from dion_ref.linalg import newton_schulz, normalize_input, polar_factor
from dion_ref.polynomials import POLYNOMIALS
from dion_ref.precision import Precision


def orthonormalize(M: Tensor, hyper: PolynomialHyper, precision: Precision) -> Tensor:
    """The orthonormalized M by the convention in ``hyper``.

    Args:
        M: ``[m, n]``, dtype ``precision.storage``.
        hyper: polynomial, epsilon, epsilon_rule, norm_factor.
        precision: the polynomial iterates in ``precision.compute``; "exact" stays in ``precision.storage``.

    Returns:
        ``[m, n]``, dtype ``precision.storage``.
    """
    if hyper.polynomial == EXACT:
        return polar_factor(M)
    if isinstance(hyper.polynomial, str):
        table = POLYNOMIALS[hyper.polynomial]
        coefficients, norm_factor = table.coefficients, table.norm_factor
    else:
        coefficients, norm_factor = hyper.polynomial, 1.0
    if hyper.norm_factor is not None:
        norm_factor = hyper.norm_factor
    X = normalize_input(M, epsilon=hyper.epsilon, epsilon_rule=hyper.epsilon_rule, norm_factor=norm_factor)
    return newton_schulz(X.to(precision.compute), coefficients).to(precision.storage)


def scale_factor(scale: str | None, rows: int, columns: int, weight_storage: str = "out_in") -> float:
    """The factor on lr for a logical matrix of this full shape.

    ========================  ====================================  =============================================
    scale                     factor                                source
    ========================  ====================================  =============================================
    "spectral_norm"           sqrt(fan_out / fan_in)                microsoft/dion; NVIDIA's "unit_rms_norm"
    "keller"                  sqrt(max(1, fan_out / fan_in))        KellerJordan/Muon; torch's "original"; optax
    "moonlight", "rms_norm"   0.2 sqrt(max(fan_out, fan_in))        arXiv 2502.16982; torch's "match_rms_adamw"
    "nvidia"                  sqrt(max(fan_out, fan_in))            NVIDIA Emerging-Optimizers' "spectral"
    None                      1
    ========================  ====================================  =============================================

    Args:
        scale: a name above.
        rows, columns: shape of the whole logical matrix, never of a shard or of selected slices.
        weight_storage: "out_in" if the rows are fan_out, "in_out" if the columns are.
    """
    fan_out, fan_in = (rows, columns) if weight_storage == "out_in" else (columns, rows)
    match scale:
        case None:
            return 1.0
        case "spectral_norm":
            return math.sqrt(fan_out / fan_in)
        case "keller":
            return math.sqrt(max(1.0, fan_out / fan_in))
        case "moonlight" | "rms_norm":
            return 0.2 * math.sqrt(max(fan_out, fan_in))
        case "nvidia":
            return math.sqrt(max(fan_out, fan_in))
    raise ValueError(f"unknown scale {scale!r}")


def exact_ceil(share: float, size: int, multiple: int = 1) -> int:
    """``multiple * ceil(share * size / multiple)`` in exact rationals: .07 of 100 is 7, not 8.

    Args:
        share: read as the decimal that it prints as.
        size: a number of rows, columns or ranks.
        multiple: the result is a multiple of it.
    """
    return multiple * math.ceil(Fraction(str(share)) * size / multiple)


def decay(W: Tensor, update: Tensor, hyper: CommonHyper) -> Tensor:
    """``W (1 - lr * weight_decay)``; if cautious, only where ``update * W >= 0``.

    Args:
        W: the weight, any shape.
        update: the direction that will be subtracted, same shape, zero where nothing is.
        hyper: lr (the base one), weight_decay, cautious.
    """
    decayed = W * (1 - hyper.lr * hyper.weight_decay)
    # signs, since the product of two small numbers may underflow to zero
    return torch.where(update.sign() * W.sign() >= 0, decayed, W) if hyper.cautious else decayed


def apply_update(W: Tensor, update: Tensor, hyper: MatrixHyper) -> Tensor:
    """Decay, then ``W - lr * scale * update``.

    Args:
        W: the whole logical matrix ``[m, n]``.
        update: ``[m, n]``, zero on slices that were not selected.
        hyper: lr, weight_decay, cautious, scale, weight_storage.
    """
    scaled_lr = hyper.lr * scale_factor(hyper.scale, W.shape[0], W.shape[1], hyper.weight_storage)
    return decay(W, update, hyper) - scaled_lr * update
