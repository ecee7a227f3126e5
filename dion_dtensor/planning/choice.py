"""Time on a given machine, and which way to orthonormalize takes least of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dion_dtensor.planning.buckets import Bucket, Cost, total
from dion_dtensor.planning.predict import predict, ways

__all__ = ["Choice", "Duration", "Hardware", "choose", "duration", "usual_hardware"]


@dataclass(frozen=True)
class Hardware:
    """A rank and its links.

    Attributes:
        name: for reports.
        flops: achieved FLOP/s of matrix products by name of the dtype.
        memory_bandwidth: bytes/s.
        bandwidth: bytes/s that a rank sends on each axis.
        latency: seconds of a collective of no bytes on each axis.
        source: of the figures.
    """

    name: str
    flops: Mapping[str, float]
    memory_bandwidth: float
    bandwidth: Sequence[float]
    latency: Sequence[float]
    source: str = ""


@dataclass(frozen=True)
class Duration:
    """Seconds: of computation, of communication, and of both when they overlap perfectly."""

    compute: float
    communicate: float

    @property
    def serial(self) -> float:
        """One after the other."""
        return self.compute + self.communicate

    @property
    def overlapped(self) -> float:
        """The longer one alone."""
        return max(self.compute, self.communicate)


@dataclass(frozen=True)
class Choice:
    """The way chosen for a bucket, its cost, and a sentence why."""

    way: str
    cost: Cost
    duration: Duration
    why: str


def duration(cost: Cost, hardware: Hardware) -> Duration:
    """Latency and bandwidth on each axis, FLOPs by dtype, and passes through memory.

    Raises:
        ValueError: the hardware lacks a dtype or an axis of ``cost``.
    """
    missing = set(cost.flops) - set(hardware.flops)
    if missing:
        raise ValueError(f"hardware {hardware.name!r} states no FLOP/s for {sorted(missing)}")
    axes = max((one.axis for one in cost.transfers), default=-1) + 1
    if axes > min(len(hardware.bandwidth), len(hardware.latency)):
        raise ValueError(f"hardware {hardware.name!r} states bandwidth and latency of fewer than {axes} axes")
    compute = sum(count / hardware.flops[dtype] for dtype, count in cost.flops.items())
    compute += cost.touched / hardware.memory_bandwidth
    communicate = sum(
        one.bytes / hardware.bandwidth[one.axis] + hardware.latency[one.axis] for one in cost.transfers
    )
    return Duration(compute, communicate)


def usual_hardware(axes: int) -> Hardware:
    """What choices assume: 60% of an H100's peaks, and links between hosts (400 Gb/s a rank) on every axis."""
    return Hardware(
        name="an H100 on InfiniBand",
        flops={"bfloat16": 593e12, "float16": 593e12, "float32": 40e12, "float64": 20e12},
        memory_bandwidth=2e12,
        bandwidth=(30e9,) * axes,
        latency=(40e-6,) * axes,
        source="NVIDIA H100 SXM datasheet",
    )


def choose(
    buckets: Bucket | Sequence[Bucket],
    algorithm: str,
    hardware: Hardware,
    *,
    fraction: float = 1.0,
    among: Sequence[str] | None = None,
) -> Choice:
    """The way with the least serial time; between equals the earlier of ``ways``.

    Args:
        buckets: the matrices and the mesh; several if those of several shapes are to take one way.
        algorithm: its name.
        hardware: the machine.
        fraction: see :func:`~dion_dtensor.planning.predict`.
        among: the ways that may be taken, where they apply; None for all.  The others are still compared.

    Raises:
        ValueError: see :func:`~dion_dtensor.planning.predict` and :func:`duration`.
    """
    every, options = [buckets] if isinstance(buckets, Bucket) else list(buckets), {}
    for way in ways(every[0], algorithm):
        if all(way in ways(bucket, algorithm) for bucket in every):
            cost = total(predict(bucket, algorithm, way, fraction) for bucket in every)
            options[way] = (cost, duration(cost, hardware))
    allowed = [way for way in options if among is None or way in among] or list(options)
    best = min(allowed, key=lambda way: options[way][1].serial)
    cost, time = options[best]
    if len(options) == 1:
        return Choice(best, cost, time, f"{best}: {_bytes(cost)}; the only way here")
    others = [
        f"{way} {1e3 * other.serial:.3g} ms ({_bytes(options[way][0])}{'' if way in allowed else ', not asked for'})"
        for way, (_, other) in options.items()
        if way != best
    ]
    why = f"{best}: {1e3 * time.serial:.3g} ms ({_bytes(cost)}) against {', '.join(others)}"
    return Choice(best, cost, time, why)


def _bytes(cost: Cost) -> str:
    flops = sum(cost.flops.values())
    return f"{cost.bytes() / 1e6:.3g} MB sent, {flops / 1e9:.3g} GFLOP"
