"""How long one call takes, on the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["keep_freed_memory", "timed"]

FREED = (32 << 20) - (64 << 10)
"""Bytes; glibc heeds no block of 32 MiB or more (M_MMAP_THRESHOLD in mallopt(3))."""


def timed(step: Callable[[], object], device: str) -> float:
    """Seconds of one call, from an idle device until it is idle again.

    Args:
        step: what is called.
        device: "cpu" or "cuda", which is timed by its own events.
    """
    if device != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    # torch has no types for events.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, up to 64 MB, as it does in one that trains.

    glibc returns freed memory to the system, which costs the next step thousands of page faults, until a block of
    almost 32 MiB was freed once; activations are such blocks.
    """
    torch.empty(FREED, dtype=torch.uint8)
