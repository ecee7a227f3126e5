"""The scores of the oracle on the noisy regressions: what a right implementation gives, and how much it varies."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from conformance.convergence.drivers import OraclePort
from conformance.convergence.regression import PROBLEMS, Regression, score

FILE = "bands.json"
COMMAND = "conformance converge bands"
SEEDS = 50
FEWER_SEEDS = 20
"""For a convention that the shipped file does not have."""
FIRST_SEED = 1_000_000
"""Seeds of the bands start here; those of a gate lie below."""


@dataclass(frozen=True)
class Setting:
    """How a rule is run on the regressions.

    Attributes:
        hyper: hyperparameters without `lr`.
        lr: first learning rate.
    """

    hyper: Mapping[str, Any]
    lr: float = 0.02


SETTINGS: Mapping[str, Setting] = {
    "muon": Setting({"weight_decay": 0.0}),
    "normuon": Setting({"weight_decay": 0.0}),
    "dion": Setting({"weight_decay": 0.0, "rank_fraction": 0.125}),
    "orth_dion": Setting({"weight_decay": 0.0, "rank_fraction": 0.125}),
    "dion2": Setting({"weight_decay": 0.0, "fraction": 0.25}),
    "dion3": Setting({"weight_decay": 0.0, "fraction": 0.25}),
    "adamw": Setting({"weight_decay": 0.0}, lr=0.002),
    "lion": Setting({"weight_decay": 0.0}, lr=0.0005),
}


@dataclass(frozen=True)
class Band:
    """Scores of the oracle on one problem.

    Attributes:
        mean, deviation: over `seeds` seeds.
        seeds: how many.
    """

    mean: float
    deviation: float
    seeds: int

    def half_width(self, count: int) -> float:
        """How far the mean of `count` fresh seeds may lie from `mean`.

        A right implementation is outside once in 100,000 such means: the factors are Student's quantiles.
        """
        factor = 5.0 if self.seeds >= SEEDS else 6.0
        return factor * self.deviation * math.sqrt(1 / count + 1 / self.seeds)


def problems(algorithm: str) -> tuple[Regression, ...]:
    """The regressions with the learning rate of a rule."""
    return tuple(replace(problem, lr=SETTINGS[algorithm].lr) for problem in PROBLEMS)


def measure(algorithm: str, hyper: Mapping[str, Any], problem: Regression, seeds: int) -> Iterator[float]:
    """Scores of the oracle in float64 with fresh values for each of `seeds` seeds."""
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        yield score(OraclePort(seed=seed), algorithm, hyper, problem, seed)


def make(path: Path, algorithms: Sequence[str] = tuple(SETTINGS)) -> Iterator[None]:
    """Measures the bands and writes them, one rule after the other; yields after each of its 3 * 50 runs.

    Args:
        path: the JSON file; entries of other algorithms in it are kept.
        algorithms: keys of SETTINGS.
    """
    entries = json.loads(path.read_text())["algorithms"] if path.exists() else {}
    for algorithm in algorithms:
        setting, measured = SETTINGS[algorithm], []
        for problem in problems(algorithm):
            scores = []
            for one in measure(algorithm, setting.hyper, problem, SEEDS):
                scores.append(float(f"{one:.6g}"))
                yield
            measured.append({"problem": asdict(problem), "scores": scores})
        entries[algorithm] = {"hyper": dict(setting.hyper), "problems": measured}
        head = {"made_by": COMMAND, "torch": torch.__version__.split("+")[0], "first_seed": FIRST_SEED}
        path.write_text(json.dumps({**head, "algorithms": dict(sorted(entries.items()))}, indent=1) + "\n")


@functools.cache
def _shipped() -> dict[str, Any]:
    text = resources.files("conformance.convergence").joinpath(FILE).read_text()
    found: dict[str, Any] = json.loads(text)["algorithms"]
    return found


def band(algorithm: str, hyper: Mapping[str, Any], problem: Regression) -> Band:
    """The shipped band, or one measured now where the convention or the problem is another.

    Args:
        algorithm: a key of SETTINGS.
        hyper: hyperparameters without `lr`.
        problem: one of `problems(algorithm)`.
    """
    entry = _shipped().get(algorithm)
    if entry is not None and entry["hyper"] == dict(hyper):
        for one in entry["problems"]:
            if one["problem"] == asdict(problem):
                return _band(one["scores"])
    return _measured(algorithm, json.dumps(dict(hyper), sort_keys=True), problem)


@functools.cache
def _measured(algorithm: str, hyper: str, problem: Regression) -> Band:
    return _band(tuple(measure(algorithm, json.loads(hyper), problem, FEWER_SEEDS)))


def _band(scores: Sequence[float]) -> Band:
    return Band(statistics.mean(scores), statistics.stdev(scores), len(scores))
