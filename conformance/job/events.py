"""What a rank tells while the job runs, besides finished rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """A row has begun."""

    optimizer: str
    dtype: str
    mesh: str
    steps: int


@dataclass(frozen=True)
class Stepped:
    """A step has been taken and judged."""

    step: int
    loss: float
