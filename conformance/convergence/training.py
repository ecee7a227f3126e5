"""One training run: numbers in, loss curve out, the same on every call."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.convergence.contenders import ContenderPort, is_contender
from conformance.convergence.drivers import Driver, Port
from conformance.convergence.variants import VARIANTS, VariantPort
from conformance.convergence.workloads import Spec, load, matrix_names

WARM_UP = 0.05
SCHEDULES = ("linear", "trapezoid", "constant")
WARM_DOWN = 0.2
DIVERGED = 3.0
"""A training loss this many times the first one ends the run."""


@dataclass(frozen=True)
class Run:
    """One run, by its numbers alone; equal numbers are the same run.

    Attributes:
        spec: the workload.
        algorithm: rule of the matrices: a name in `dion_ref.ALGORITHMS` or in `variants.VARIANTS`, or that of a
            contender's entry.
        hyper: its hyperparameters, as sorted pairs.
        batch: sequences or images of a step.
        steps: the step budget; the rate reaches zero after it.
        lr: largest rate of the matrices.
        seed: of weights, batches and Dion's first Q.
        schedule: all warm up over 5% of the steps; "linear" then decays to zero, "trapezoid" does so over the last 20%
            only, "constant" never.
        scalar_lr, scalar_betas: of AdamW for everything that is no matrix, whatever the rule.
        micro: largest batch of one forward pass; 0 for all at once. Gradients of the parts are averaged.
    """

    spec: Spec
    algorithm: str
    hyper: tuple[tuple[str, Any], ...]
    batch: int
    steps: int
    lr: float
    seed: int
    schedule: str = "linear"
    scalar_lr: float = 3e-3
    scalar_betas: tuple[float, float] = (0.9, 0.95)
    micro: int = 0

    @property
    def key(self) -> str:
        """A name for the run that no other run has."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:20]

    def rate(self, step: int) -> float:
        """The factor on the rates at a step, counted from 0."""
        warm = max(1, round(WARM_UP * self.steps))
        rising = min(1.0, (step + 1) / warm)
        left = 1 - step / self.steps
        falling = {"linear": left, "trapezoid": min(1.0, left / WARM_DOWN), "constant": 1.0}[self.schedule]
        return min(rising, falling)


@dataclass(frozen=True)
class Outcome:
    """What came out of a run.

    Attributes:
        losses: training loss at each step.
        held_out: loss on held-out data at the end; infinite if the run diverged.
        seconds, optimizer_seconds: of the whole run, and of the steps of the matrix rule within.
        port: what took the steps.
    """

    losses: tuple[float, ...]
    held_out: float
    seconds: float
    optimizer_seconds: float
    port: str


class Trainer:
    """A model, its two drivers and its batches; `step` advances by one."""

    def __init__(self, run: Run, port: Port, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        """Prepares a run.

        Args:
            run: its numbers.
            port: steps the matrices; AdamW of the same port steps the rest.
            device: of the model.
            dtype: autocast the forward pass to it; None for none.
        """
        self.run, self.workload, self.device, self.dtype = run, load(run.spec), device, dtype
        self.model = self.workload.model(run.seed).to(device)
        names = set(matrix_names(self.model))
        parameters = dict(self.model.named_parameters())
        # a convolution is one matrix [out, in * kernel]; the views share the parameters' memory
        matrices = {name: parameters[name].detach().flatten(1) for name in parameters if name in names}
        rest = {name: parameters[name].detach() for name in parameters if name not in names}
        self._parameters, self._matrices, self._rest = parameters, matrices, rest
        self.optimizer_seconds = 0.0
        chosen = _port_of(run.algorithm, port)
        hyper = {"weight_decay": 0.0, **dict(run.hyper)}
        self._matrix_driver: Driver = chosen.driver(run.algorithm, matrices, hyper)
        self._scalar_driver: Driver | None = None
        if rest:
            scalar = {"betas": run.scalar_betas, "weight_decay": 0.0}
            self._scalar_driver = port.driver("adamw", rest, scalar)

    def step(self, number: int) -> float:
        """Trains on batch `number` and returns its loss before the step."""
        run = self.run
        inputs, targets = (x.to(self.device) for x in self.workload.batch(run.seed, number, run.batch))
        parts = -(-run.batch // run.micro) if run.micro else 1
        loss = 0.0
        for some, wanted in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            share = some.shape[0] / inputs.shape[0]
            part = self._loss(some, wanted) * share
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        rate = run.rate(number)
        began = time.perf_counter()
        self._matrix_driver.step({name: gradients[name].flatten(1) for name in self._matrices}, run.lr * rate)
        self.optimizer_seconds += time.perf_counter() - began
        if self._scalar_driver is not None:
            self._scalar_driver.step({name: gradients[name] for name in self._rest}, run.scalar_lr * rate)
        self.model.zero_grad(set_to_none=True)
        return loss

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            return self.workload.loss(self.model(inputs), targets)

    @torch.no_grad()
    def held_out(self) -> float:
        """Loss on the held-out data, in parts of at most `micro`."""
        self.model.eval()
        inputs, targets = self.workload.held_out
        size = self.run.micro or inputs.shape[0]
        total = 0.0
        for some, wanted in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
            total += float(self._loss(some.to(self.device), wanted.to(self.device))) * some.shape[0]
        self.model.train()
        return total / inputs.shape[0]


def train(
    run: Run,
    port: Port,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    until: float | None = None,
    window: int = 10,
) -> Outcome:
    """Trains.

    Args:
        run: its numbers.
        port: takes the optimizer steps.
        device, dtype: see `Trainer`.
        on_step: told each step and its loss.
        until: stop once the mean of the last `window` training losses is below.
        window: see `until`.

    Returns:
        The outcome; a run that is not finite or triples its first loss ends early with an infinite `held_out`.
    """
    began = time.perf_counter()
    trainer = Trainer(run, port, device, dtype)
    losses: list[float] = []
    failed = False
    for number in range(run.steps):
        losses.append(trainer.step(number))
        on_step(number, losses[-1])
        failed = not math.isfinite(losses[-1]) or losses[-1] > DIVERGED * losses[0]
        if failed or (until is not None and smoothed(losses[-window:], window)[-1] < until):
            break
    held_out = math.inf if failed else trainer.held_out()
    return Outcome(
        tuple(losses),
        held_out if math.isfinite(held_out) else math.inf,
        time.perf_counter() - began,
        trainer.optimizer_seconds,
        _name_of(_port_of(run.algorithm, port), run.algorithm),
    )


def _port_of(algorithm: str, port: Port) -> Port:
    """What steps the matrices where ``port`` steps the rules that are known."""
    if algorithm in VARIANTS:
        return VariantPort()
    return ContenderPort() if is_contender(algorithm) else port


def _name_of(port: Port, algorithm: str) -> str:
    used = getattr(port, "used", None)
    return used(algorithm).name if used else port.name


def smoothed(losses: list[float] | tuple[float, ...], window: int = 10) -> list[float]:
    """Mean of the last `window` losses at each step."""
    return [sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
