"""Which dtype holds the data and which one carries the heavy products."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The two dtypes of a run of the oracle.

    Args:
        storage: dtype of parameter, gradient and every state tensor.  All arithmetic that is not named
            under ``compute`` happens in it, and inputs must have exactly this dtype.
        compute: dtype of the Newton-Schulz iteration (Muon, NorMuon, Dion2, Dion3: the input is normalised
            in ``storage``, cast, iterated, cast back) and of the two outer products P R^T and P Q^T of Dion
            and Orth-Dion (R is as large as the momentum, and ``step`` refuses what overflows: float16 ends at
            65504).  SVD, QR, ``M Q``, ``M^T P``, norms, AdamW and Lion ignore it.

    Raises:
        TypeError: ``storage`` is neither float32 nor float64, or ``compute`` no floating dtype.
    """

    storage: torch.dtype
    compute: torch.dtype

    def __post_init__(self) -> None:
        if self.storage not in (torch.float32, torch.float64):
            raise TypeError(f"storage must be torch.float32 or torch.float64, got {self.storage!r}")
        if not isinstance(self.compute, torch.dtype) or not self.compute.is_floating_point:
            raise TypeError(f"compute must be a floating torch.dtype, got {self.compute!r}")


FLOAT64 = Precision(torch.float64, torch.float64)
"""The oracle proper: float64 throughout."""
