"""Ways to orthonormalize a stack of whole matrices; plain tensors in, plain tensors out."""

from dion_dtensor.orthonormalize.gram import (
    gram_newton_schulz,
    gram_polynomial,
    product_dtype,
    segments,
)
from dion_dtensor.orthonormalize.householder import orthonormal_basis
from dion_dtensor.orthonormalize.polynomial import POLYNOMIALS, newton_schulz, resolve_polynomial

__all__ = [
    "POLYNOMIALS",
    "gram_newton_schulz",
    "gram_polynomial",
    "newton_schulz",
    "orthonormal_basis",
    "product_dtype",
    "resolve_polynomial",
    "segments",
]
