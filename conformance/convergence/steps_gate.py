"""The part of the gate that trains a real GPT: steps to a loss, over AdamW's."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conformance.convergence.drivers import BestPort, Driver, Port
from conformance.convergence.training import Run, smoothed, train
from conformance.convergence.workloads import Spec

SPEC = Spec(data="new-testament")
BATCH = 16
LARGEST_STEPS = 300
TARGET = 2.2
"""Nats a character, mean of the last WINDOW training losses."""
WINDOW = 20
RULES: Mapping[str, tuple[float, Mapping[str, Any]]] = {
    "adamw": (0.0025, {"betas": (0.9, 0.95)}),
    "muon": (0.014, {}),
    "dion": (0.014, {"rank_fraction": 1.0}),
}
"""Rate and hyperparameters of each rule, the best of a grid; `tests/convergence/test_steps_gate.py` checks AdamW's."""


class _MatricesBy:
    """One port for the matrices and the production AdamW for everything else, which is the same for all."""

    def __init__(self, port: Port) -> None:
        self._port, self._scalar = port, BestPort()
        self.name, self.algorithms = port.name, (*port.algorithms, "adamw")

    def driver(self, algorithm: str, parameters: Mapping[str, Any], hyper: Mapping[str, Any]) -> Driver:
        """See `drivers.Port`."""
        chosen = self._scalar if algorithm == "adamw" else self._port
        return chosen.driver(algorithm, parameters, hyper)


def steps_needed(port: Port, algorithm: str, lr: float, hyper: Mapping[str, Any], seed: int) -> float:
    """Steps until the smoothed training loss is below TARGET, to a fraction of a step; infinite if never."""
    run = Run(
        SPEC, algorithm, tuple(sorted(hyper.items())), BATCH, LARGEST_STEPS, lr, seed, schedule="constant"
    )
    losses = smoothed(train(run, port, until=TARGET, window=WINDOW).losses, WINDOW)
    if losses[-1] >= TARGET or len(losses) < 2:
        return math.inf
    return len(losses) - (TARGET - losses[-1]) / (losses[-2] - losses[-1])


@functools.cache
def _adamw_steps(seed: int) -> float:
    lr, hyper = RULES["adamw"]
    return steps_needed(BestPort(), "adamw", lr, hyper, seed)


def steps_over_adamw(
    port: Port,
    algorithms: Sequence[str],
    seed: int,
    seeds: int,
    hyper: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, float]]:
    """Mean steps over AdamW's mean steps for each rule, same weights and batches.

    Args:
        port: steps the matrices, in float32.
        algorithms: keys of RULES.
        seed: first of the seeds is `seeds * seed`.
        seeds: how many.
        hyper: further hyperparameters by rule.
    """
    numbers = range(seeds * seed, seeds * (seed + 1))
    reference = statistics.mean(_adamw_steps(number) for number in numbers)
    for algorithm in algorithms:
        lr, own = RULES[algorithm]
        chosen = {**own, **hyper.get(algorithm, {})}
        steps = [steps_needed(_MatricesBy(port), algorithm, lr, chosen, number) for number in numbers]
        yield algorithm, statistics.mean(steps) / reference
