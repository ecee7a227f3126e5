"""Ways to orthonormalize a stack of whole matrices; plain tensors in, plain tensors out."""

from dion_dtensor.orthonormalize.householder import orthonormal_basis
from dion_dtensor.orthonormalize.polynomial import POLYNOMIALS, newton_schulz, resolve_polynomial

__all__ = ["POLYNOMIALS", "newton_schulz", "orthonormal_basis", "resolve_polynomial"]
