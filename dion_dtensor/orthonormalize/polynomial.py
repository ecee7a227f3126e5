"""Newton-Schulz iterations: ``X <- a X + b (X X^T) X + c (X X^T)^2 X`` drives all singular values towards one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "POLYNOMIALS",
    "Coefficients",
    "divisor",
    "newton_schulz",
    "norm_factor_of",
    "normalized",
    "resolve_polynomial",
]

Coefficients = tuple[tuple[float, float, float], ...]

POLYNOMIALS: dict[str, Coefficients] = {
    # KellerJordan/Muon: one triple, five times.
    "keller": ((3.4445, -4.7750, 2.0315),) * 5,
    # Jiacheng You's five triples, in KellerJordan/modded-nanogpt and NVIDIA Emerging-Optimizers.
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Polar Express, arXiv 2505.16932, as in microsoft/dion: a safety of 1.02 is part of the first four triples.
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    # Polar Express as in Dao-AILab/gram-newton-schulz 0.1.6: the paper's triples, all five damped by 1.05.
    "polar_express_gns": tuple(
        (a / 1.05, b / 1.05**3, c / 1.05**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        )
    ),
    # CANS (Chebyshev-optimized Newton-Schulz) five-step set.
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
}


def resolve_polynomial(polynomial: str | Coefficients) -> Coefficients:
    """The coefficient triples of a named polynomial, or of a literal sequence of triples.

    Raises:
        ValueError: an unknown name, or a literal that is not a non-empty sequence of triples of finite numbers.
    """
    if isinstance(polynomial, str):
        if polynomial not in POLYNOMIALS:
            raise ValueError(f"polynomial={polynomial!r} is unknown; choose from {sorted(POLYNOMIALS)}")
        return POLYNOMIALS[polynomial]
    try:
        triples = tuple(tuple(float(c) for c in triple) for triple in polynomial)
    except TypeError:
        triples = ()
    finite = all(math.isfinite(c) for triple in triples for c in triple)
    if not triples or not finite or any(len(triple) != 3 for triple in triples):
        raise ValueError(
            f"polynomial must be a name or a sequence of triples (a, b, c) of finite numbers, not {polynomial!r}"
        )
    return tuple((a, b, c) for a, b, c in triples)


def norm_factor_of(polynomial: str | Coefficients) -> float:
    """The factor on the Frobenius norm that goes with a polynomial: 1.02 for microsoft/dion's Polar Express."""
    return 1.02 if polynomial == "polar_express" else 1.0


def divisor(norm: Tensor, epsilon: float | Tensor, epsilon_rule: str, norm_factor: float) -> Tensor:
    """What a matrix of Frobenius norm ``norm`` is divided by before the polynomial; see :func:`newton_schulz`."""
    if epsilon_rule == "clamp":
        return norm_factor * norm.clamp(min=epsilon)
    return norm_factor * norm + epsilon


def normalized(stack: Tensor, epsilon: float | Tensor, epsilon_rule: str, norm_factor: float) -> Tensor:
    """``stack`` over its Frobenius norms, in the dtype of ``stack``; see :func:`newton_schulz`."""
    wide = torch.promote_types(stack.dtype, torch.float32)
    X = stack.to(wide)
    # Summed in float64: the squares of float32 numbers neither overflow nor vanish there.  Row by row, so that a GPU
    # has as many sums to work on at once.
    rows = torch.linalg.vector_norm(X, dim=-1, keepdim=True, dtype=torch.float64)
    norm = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return (X / divisor(norm, epsilon, epsilon_rule, norm_factor).to(wide)).to(stack.dtype)


def newton_schulz(
    stack: Tensor,
    coefficients: Coefficients,
    epsilon: float | Tensor = 1e-8,
    epsilon_rule: str = "add",
    norm_factor: float = 1.0,
) -> Tensor:
    """Orthonormalize each matrix of a stack approximately, by a polynomial in ``X X^T``.

    Args:
        stack: ``[N, m, n]``; iterated in its own dtype, normalised in float32 or wider by a norm summed in float64.
        coefficients: triples ``(a, b, c)``, one an iteration.
        epsilon: keeps a zero matrix at zero.
        epsilon_rule: "add" divides by ``norm_factor * norm + epsilon``, "clamp" by
            ``norm_factor * max(norm, epsilon)``.
        norm_factor: see :func:`norm_factor_of`.

    Returns:
        ``[N, m, n]`` in the dtype of ``stack``.
    """
    if stack.dtype == torch.float64 and len(stack) > 1 and not torch.compiler.is_compiling():
        # One by one: a batched product may round otherwise for another number of matrices on this rank.
        options = (coefficients, epsilon, epsilon_rule, norm_factor)
        return torch.cat([newton_schulz(matrix.unsqueeze(0), *options) for matrix in stack])
    X = normalized(stack, epsilon, epsilon_rule, norm_factor)
    tall = stack.shape[-2] > stack.shape[-1]
    if tall:  # the short side first: the Gram matrix is the small one
        X = X.mT.contiguous()
    for a, b, c in coefficients:
        gram = X @ X.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.baddbmm(X, polynomial, X, beta=a)
    # Contiguous, so that sums over the result run in the same order however many matrices there are.
    return X.mT.contiguous() if tall else X
