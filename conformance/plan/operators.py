"""Operators that a step launches, and how long this machine takes for them and for the rest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from conformance.bench.timing import timed
from conformance.job.training import OPTIMIZER_OF
from dion_dtensor import Muon

__all__ = ["Operator", "Stopwatch"]

CACHES = 32 << 20
"""Bytes to fill them with; the last level of large processors is larger, but then shared."""


@dataclass(frozen=True)
class Operator:
    """A call with its arguments; tensors are there by shape, strides and dtype ("meta") alone.

    Attributes:
        function: of torch's dispatcher.
        args, kwargs: of the call.
        flops: of its products.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    flops: float = 0.0

    @staticmethod
    def of(
        function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, flops: float = 0.0
    ) -> Operator:
        """Of a call that is being made; nothing of its memory is kept."""
        args, kwargs = tree_map_only(Tensor, _bare, (args, dict(kwargs or {})))
        return Operator(function, args, kwargs, flops)

    @property
    def dtype(self) -> str:
        """Of what it is given first."""
        return str(self.args[0].dtype).removeprefix("torch.")

    @property
    def key(self) -> str:
        """Equal for calls that take equally long."""
        described = tree_map_only(
            Tensor, lambda one: (tuple(one.shape), one.stride(), one.dtype), (self.args, dict(self.kwargs))
        )
        return f"{self.function} {described}"


def _bare(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _drawn(tensor: Tensor) -> Tensor:
    """Of small values, whose products overflow nowhere."""
    reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (1e-3 * torch.randn(max(reach, 0))).to(tensor.dtype).as_strided(tensor.shape, tensor.stride())


@dataclass
class Stopwatch:
    """Times on the CPU with torch's threads; each kind once.

    Attributes:
        rates: FLOP/s by dtype, of what is not timed.
        stated: dtypes whose rate is to be used.
        longest: seconds beyond which, by its rate, an operator is not timed.
        seconds: at least to spend on a kind.
        compile: whether steps are compiled.
        known: by what was timed.
        priced: the kinds that were not timed.
        others: what the caches are filled with.
    """

    rates: Mapping[str, float]
    stated: frozenset[str] = frozenset()
    longest: float = 4.0
    seconds: float = 0.2
    compile: bool = True
    known: dict[str, float] = field(default_factory=dict)
    priced: set[str] = field(default_factory=set)
    others: Tensor = field(default_factory=lambda: torch.zeros(CACHES // 4), repr=False, compare=False)

    def operator(self, operator: Operator) -> float:
        """Seconds of an operator, on values drawn for it; by its FLOPs where it would take too long."""
        foreseen = operator.flops / self.rates[operator.dtype] if operator.flops else 0.0
        if foreseen > self.longest or (foreseen and operator.dtype in self.stated):
            self.priced.add(operator.key)
            return foreseen
        if operator.key not in self.known:
            args, kwargs = tree_map_only(Tensor, _drawn, (operator.args, dict(operator.kwargs)))
            self.known[operator.key] = self._median(lambda: operator.function(*args, **kwargs))
        return self.known[operator.key]

    def host(self, algorithm: str, count: int, buckets: int) -> float:
        """Seconds of a step of ``count`` matrices too small to take any: the host's work, and launches."""
        key = f"{algorithm} {count} {buckets}"
        if key not in self.known:
            parameters = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(count)]
            most = -(-count // buckets) * parameters[0].nbytes
            for parameter in parameters:
                parameter.grad = torch.eye(8)
            named = [(f"weights.{index}", parameter) for index, parameter in enumerate(parameters)]
            build: Any = OPTIMIZER_OF.get(algorithm, Muon)
            group = {"params": named, "algorithm": algorithm}
            optimizer = build([group], lr=1e-3, compile=self.compile, max_bucket_bytes=most)
            self.known[key] = self._median(optimizer.step)
        return self.known[key]

    def _median(self, action: Callable[[], object]) -> float:
        """Of three times at least, after three that may compile; of one where that takes a second.

        Each finds the caches full of something else, as it does in a step: the host's work takes twice as long then.
        """
        for _ in range(3):
            last = timed(action, "cpu")
        if last > 1:
            return last
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < 3 or time.perf_counter() < end:
            self.evict()
            times.append(timed(action, "cpu"))
        return statistics.median(times)

    def evict(self) -> None:
        """Put something else into the caches."""
        self.others.mul_(0.5)
