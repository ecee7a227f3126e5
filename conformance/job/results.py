"""What the job found, row by row, and its JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from conformance.job.grading import Series, tightest

TRAINED = "trained"
SIMULATED = "simulated"


@dataclass(frozen=True)
class Row:
    """The verdict on one (optimizer, dtype, mesh).

    Attributes:
        kind: TRAINED (steps on real ranks) or SIMULATED (one step, one process plays all ranks).
        series: every quantity of every parameter.
        losses: global training loss of every step, in nats (empty when simulated).
        seconds: wall time of the row.
        first_step_seconds: wall time of the first optimizer step, compilation included.
        step_seconds: median wall time of the other optimizer steps.
        layouts: number of parameters by layout.
        cpu_seconds: processor time of all ranks, compilers that they started included.
        undecided: elements where Lion's sign was not determined by its inputs.
    """

    optimizer: str
    dtype: str
    mesh: str
    kind: str
    series: tuple[Series, ...]
    losses: tuple[float, ...]
    seconds: float
    first_step_seconds: float
    step_seconds: float
    layouts: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    undecided: int = 0

    @property
    def updates(self) -> list[Series]:
        """The series of the weights' updates."""
        return [one for one in self.series if one.quantity == "update"]

    @property
    def states(self) -> list[Series]:
        """The series of the states."""
        return [one for one in self.series if one.quantity != "update"]

    @property
    def learned(self) -> bool:
        """True when the loss is finite and its last quarter lies below its first (always when simulated)."""
        if not self.losses:
            return self.kind == SIMULATED
        if not all(map(math.isfinite, self.losses)):
            return False
        quarter = max(1, len(self.losses) // 4)
        return len(self.losses) == 1 or sum(self.losses[-quarter:]) < sum(self.losses[:quarter])

    @property
    def passed(self) -> bool:
        """True when every error is within its bound and the loss fell."""
        return bool(self.updates) and all(one.passed for one in self.series) and self.learned

    @property
    def largest(self) -> Series:
        """The update with the largest error."""
        return max(self.updates, key=lambda one: one.largest)

    @property
    def own(self) -> Series:
        """The update with the largest error among the parameters on the optimizer's own rule."""
        return max(
            (one for one in self.updates if one.algorithm == self.optimizer), key=lambda one: one.largest
        )

    @property
    def tightest(self) -> Series:
        """The series, update or state, that uses most of its bound."""
        return tightest(self.series)

    def why(self) -> str:
        """What failed, in one line; empty when nothing did."""
        parts = []
        failed = [one for one in self.series if not one.passed]
        if failed:
            worst = tightest(failed)
            step = max(range(len(worst.errors)), key=lambda index: worst.errors[index], default=0)
            parts.append(
                f"{worst.quantity} of {worst.parameter} ({worst.algorithm}) is off by {worst.largest:.2e} "
                f"at step {step + 1}, bound {worst.bound:.2e}; {len(failed)} of {len(self.series)} series fail"
            )
        if not self.learned:
            parts.append("the loss did not fall: " + " ".join(f"{loss:.3f}" for loss in self.losses))
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; errors with four significant digits, NaN and inf as strings."""
        return {
            "optimizer": self.optimizer,
            "dtype": self.dtype,
            "mesh": self.mesh,
            "kind": self.kind,
            "passed": self.passed,
            "why": self.why(),
            "largest_update_error": rounded(self.own.largest),
            "bound": rounded(self.own.bound),
            "largest_update_error_of_all": rounded(self.largest.largest),
            "largest_state_error": rounded(max((one.largest for one in self.states), default=0.0)),
            "largest_share_of_bound": rounded(self.tightest.used),
            "closest": f"{self.tightest.quantity} of {self.tightest.parameter}",
            "seconds": rounded(self.seconds),
            "cpu_seconds": rounded(self.cpu_seconds),
            "first_step_seconds": rounded(self.first_step_seconds),
            "step_seconds": rounded(self.step_seconds),
            "losses": [rounded(loss, 7) for loss in self.losses],
            "layouts": self.layouts,
            "undecided_signs": self.undecided,
            "series": [
                {
                    "parameter": one.parameter,
                    "algorithm": one.algorithm,
                    "quantity": one.quantity,
                    "bound": rounded(one.bound),
                    "errors": [rounded(error) for error in one.errors],
                    "rerun": [rounded(error) for error in one.rerun],
                }
                for one in self.series
            ],
        }


def rounded(value: float, digits: int = 4) -> float | str:
    """`value` with so many significant digits; a string when JSON has no number for it."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)


def all_passed(rows: Sequence[Row], expected: int) -> bool:
    """True when every row that was to come is there and passed."""
    return len(rows) == expected and all(row.passed for row in rows)
