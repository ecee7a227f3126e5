"""The oracle: orthonormal optimizers as pure functions on float64 tensors, on one device.

It is written to be compared with the papers and with other implementations, not to be fast.  It imports torch
and the standard library only.  ``docs/specification.md`` states every rule and every decision.
"""

from __future__ import annotations

from dion_ref.convention import PRESETS, Convention
from dion_ref.matrices import (
    Columns,
    Experts,
    Flatten,
    Heads,
    InterleavedColumns,
    InterleavedRows,
    Rows,
    Split,
)
from dion_ref.polynomials import POLYNOMIALS, Polynomial
from dion_ref.precision import FLOAT64, Precision
from dion_ref.registry import ALGORITHMS, Algorithm

__all__ = [
    "ALGORITHMS",
    "FLOAT64",
    "POLYNOMIALS",
    "PRESETS",
    "Algorithm",
    "Columns",
    "Convention",
    "Experts",
    "Flatten",
    "Heads",
    "InterleavedColumns",
    "InterleavedRows",
    "Polynomial",
    "Precision",
    "Rows",
    "Split",
]
