"""Coefficient tables of the quintic Newton-Schulz step ``X <- aX + b(XX^T)X + c(XX^T)^2 X``.

"Polar Express" names three different tables in public code; they are not interchangeable, so each has its
own name here and a test vector quotes the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Triple = tuple[float, float, float]
"""(a, b, c) of one step."""


@dataclass(frozen=True)
class Polynomial:
    """A named table.

    Args:
        name: the key in ``POLYNOMIALS``.
        coefficients: one ``(a, b, c)`` a step, in order of use.
        norm_factor: the input is divided by ``norm_factor * ||M||_F`` (plus or clamped by epsilon).
        source: paper and repository that the numbers come from.
    """

    name: str
    coefficients: tuple[Triple, ...]
    norm_factor: float
    source: str


def _damped(coefficients: tuple[Triple, ...], factor: float) -> tuple[Triple, ...]:
    """p(x) -> p(x / factor) for every step, which keeps singular values slightly above 1 from blowing up."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in coefficients)


_TABLES = (
    Polynomial(
        name="keller",
        coefficients=((3.4445, -4.7750, 2.0315),) * 5,
        norm_factor=1.0,
        source="KellerJordan/Muon, muon.py; also torch.optim.Muon, Moonlight (arXiv 2502.16982) and optax",
    ),
    Polynomial(
        name="you",
        coefficients=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        norm_factor=1.0,
        source="Jiacheng You's table, as in Dao-AILab/gram-newton-schulz 0.1.6 and NVIDIA Emerging-Optimizers",
    ),
    Polynomial(
        name="polar_express",
        coefficients=(
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        norm_factor=1.02,
        source="Polar Express (arXiv 2505.16932), safety factor 1.02 in the first four steps; microsoft/dion, "
        "dion/polar_express.py",
    ),
    Polynomial(
        name="polar_express_gns",
        coefficients=_damped(
            (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            ),
            1.05,
        ),
        norm_factor=1.0,
        source="Polar Express (arXiv 2505.16932, algorithm 1), all five steps damped by 1.05 (the paper: all but the "
        "last, by 1.01); Dao-AILab/gram-newton-schulz 0.1.6",
    ),
    Polynomial(
        name="cans",
        coefficients=(
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        norm_factor=1.0,
        source="CANS (arXiv 2506.10935); NVIDIA Emerging-Optimizers",
    ),
)

POLYNOMIALS: Mapping[str, Polynomial] = MappingProxyType({table.name: table for table in _TABLES})
"""Every named table."""
