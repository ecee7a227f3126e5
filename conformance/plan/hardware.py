"""What ranks and links do: stated figures, or measured here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from conformance.bench.timing import timed
from dion_dtensor.planning import Hardware

__all__ = ["h100", "this_machine"]

# NVIDIA H100 SXM datasheet: dense bfloat16 989 TFLOP/s, float32 67 TFLOP/s, HBM3 3.35 TB/s, NVLink 900 GB/s both ways.
FLOPS = {"bfloat16": 989e12, "float32": 67e12, "float64": 34e12}
MEMORY = 3.35e12
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s of one direction; 400 Gb/s a GPU
LATENCY_NVLINK, LATENCY_INFINIBAND = 15e-6, 40e-6
HOST = 8


def h100(sizes: Sequence[int], efficiency: float = 0.6) -> Hardware:
    """Hosts of eight H100 SXM: the last axes lie within a host as long as they fit, the others between hosts.

    Args:
        sizes: of the mesh axes.
        efficiency: share of the peaks that products, memory and links reach.
    """
    inside, within = 1, []
    for size in reversed(sizes):
        inside *= size
        within.append(inside <= HOST)
    within.reverse()
    return Hardware(
        name=f"hosts of 8 H100 SXM, {efficiency:.0%} of peak",
        flops={name: efficiency * value for name, value in FLOPS.items()},
        memory_bandwidth=efficiency * MEMORY,
        bandwidth=[efficiency * (NVLINK if near else INFINIBAND) for near in within],
        latency=[LATENCY_NVLINK if near else LATENCY_INFINIBAND for near in within],
        source="NVIDIA H100 datasheet; 400 Gb/s InfiniBand a GPU",
    )


def this_machine(sizes: Sequence[int], seconds: float = 3.0) -> Hardware:
    """Bytes/s of memory beyond the caches and FLOP/s by dtype, measured with torch's threads; links cost nothing.

    Products are better timed one by one, at their own sizes (`operators.Stopwatch`).

    Args:
        sizes: of the mesh axes.
        seconds: to spend.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        left, right = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
        product = _fastest(partial(torch.mm, left, right), seconds / 4)
        rates[str(dtype).removeprefix("torch.")] = 2 * 1024**3 / product
    low, high = torch.randn(1 << 26), torch.randn(1 << 26)
    passes = _fastest(lambda: low.add_(high, alpha=1e-6), seconds / 4)
    memory = 3 * 4 * low.numel() / passes
    shown = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    return Hardware(
        name="this machine",
        flops=rates,
        memory_bandwidth=memory,
        bandwidth=[math.inf] * len(sizes),
        latency=[0.0] * len(sizes),
        source=f"measured: {memory / 1e9:.1f} GB/s, {shown}, each product by itself; no links",
    )


def _fastest(action: Callable[[], object], seconds: float) -> float:
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        best = min(best, timed(action, "cpu"))
    return best
