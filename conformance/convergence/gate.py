"""The convergence gate, level L5: does a port learn as the oracle does?

Three parts: facts about single updates, the noisy regression within bands of the oracle, and a GPT on real text on
which Muon and full-rank Dion must need clearly fewer steps than AdamW.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from conformance.convergence.bands import SETTINGS, band, problems
from conformance.convergence.drivers import MATRIX_ALGORITHMS, Port
from conformance.convergence.regression import score
from conformance.convergence.steps_gate import RULES, steps_over_adamw
from conformance.convergence.unit_facts import SHAPES, unit_facts

PARTS = ("facts", "regression", "gpt")
REGRESSION_SEEDS = 4
LARGEST_RATIO = 0.87
"""Of AdamW's steps, mean of three seeds."""


@dataclass(frozen=True)
class Check:
    """One number and where it must lie.

    Attributes:
        part: one of PARTS.
        algorithm: the rule.
        what: in words.
        value: as measured.
        low, high: where it must lie.
    """

    part: str
    algorithm: str
    what: str
    value: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.low <= self.value <= self.high

    def why(self) -> str:
        """The check in one line."""
        return (
            f"{self.algorithm}, {self.what}: {self.value:.4g}, must lie in [{self.low:.4g}, {self.high:.4g}]"
        )


@dataclass(frozen=True)
class GateResult:
    """The verdict on a port.

    Attributes:
        port: its name.
        checks: everything that was checked.
        not_claimed: rules that the port does not have; they are not passed.
        seconds: of the whole gate.
    """

    port: str
    checks: tuple[Check, ...]
    not_claimed: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """True if something was checked and nothing failed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]


@dataclass(frozen=True)
class Gate:
    """What the gate runs.

    Attributes:
        parts: some of PARTS.
        seed: first of its seeds; other values give fresh problems.
        dtype: of parameters and gradients in the first two parts.
        compute_dtype: what the port orthonormalizes in; None for `dtype`.  It sets the tolerance of the facts.
        hyper: further hyperparameters by rule, where the port's convention is not the default one; the bands are
            then measured from the oracle under the same convention.
        gpt_seeds: of the GPT.
    """

    parts: Sequence[str] = PARTS
    seed: int = 0
    dtype: torch.dtype = torch.float64
    compute_dtype: torch.dtype | None = None
    hyper: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gpt_seeds: int = 3

    def run(
        self,
        port: Port,
        *,
        on_check: Callable[[Check], None] = lambda check: None,
        stop_at_failure: bool = False,
    ) -> GateResult:
        """Holds a port to the gate.

        Args:
            port: see `drivers.Port`; only the rules that it claims are checked.
            on_check: told each check when it is done.
            stop_at_failure: end with the first failed check.

        Raises:
            ValueError: an unknown part.
        """
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"part {part!r} is unknown; choose from {', '.join(PARTS)}")
        began = time.monotonic()
        checks: list[Check] = []
        for check in self._checks(port):
            checks.append(check)
            on_check(check)
            if stop_at_failure and not check.passed:
                break
        missing = tuple(name for name in SETTINGS if name not in port.algorithms)
        return GateResult(port.name, tuple(checks), missing, time.monotonic() - began)

    def _checks(self, port: Port) -> Any:
        claimed = [name for name in SETTINGS if name in port.algorithms]
        if "facts" in self.parts:
            for algorithm in claimed:
                yield from self._facts(port, algorithm)
        if "regression" in self.parts:
            for algorithm in claimed:
                yield from self._regression(port, algorithm)
        if "gpt" in self.parts:
            yield from self._gpt(port, claimed)

    def _facts(self, port: Port, algorithm: str) -> Any:
        if algorithm not in MATRIX_ALGORITHMS:
            return
        for shape in SHAPES:
            facts = unit_facts(
                port,
                algorithm,
                shape,
                hyper=self.hyper.get(algorithm, {}),
                seed=self.seed,
                dtype=self.dtype,
                compute_dtype=self.compute_dtype,
            )
            for fact in facts:
                what = f"{shape[0]}x{shape[1]}: {fact.what}"
                yield Check("facts", algorithm, what, fact.value, fact.low, fact.high)

    def _regression(self, port: Port, algorithm: str) -> Any:
        hyper = {**SETTINGS[algorithm].hyper, **self.hyper.get(algorithm, {})}
        for problem in problems(algorithm):
            scores = [
                score(port, algorithm, hyper, problem, REGRESSION_SEEDS * self.seed + i, self.dtype)
                for i in range(REGRESSION_SEEDS)
            ]
            expected = band(algorithm, hyper, problem)
            half = expected.half_width(len(scores))
            yield Check(
                "regression",
                algorithm,
                f"{problem.shape}: weak features' excess loss left",
                statistics.mean(scores) if all(map(math.isfinite, scores)) else math.nan,
                expected.mean - half,
                expected.mean + half,
            )

    def _gpt(self, port: Port, claimed: Sequence[str]) -> Any:
        rules = [name for name in RULES if name in claimed and name != "adamw"]
        if not rules:
            return
        for algorithm, ratio in steps_over_adamw(port, rules, self.seed, self.gpt_seeds, self.hyper):
            yield Check("gpt", algorithm, "steps over AdamW's on a GPT", ratio, 0.0, LARGEST_RATIO)


def convergence_gate(port: Port, **options: Any) -> GateResult:
    """Level L5 for any port, see `Gate` for the options: `convergence_gate(port, seed=3).passed`."""
    return Gate(**options).run(port)
