"""A bucket's update as a CUDA graph: recorded once, then launched as one, without the host's time for each kernel.

What changes from step to step stays outside: gradients are joined into a buffer that the graph reads, and
hyperparameters and counts are written to the 0-d tensors that it reads, before each launch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Memory", "Recorder", "joined", "recorder_on"]

# Steps that are taken as ever before a recording: what is compiled, tuned or allocated once comes to be there.
WARM_UP = 2


class Memory:
    """What the graphs of one optimizer share: they run one after the other, and each leaves nothing behind.

    Args:
        device: of all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.largest = 0
        """Bytes of the largest input to come."""
        self.recorded: set[Recorder] = set()
        # Of its own: cuBLAS keeps a workspace a stream, and a graph that goes takes it along.  It has no types.
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def pool(self) -> Any:
        """That of the graphs that are there, or a new one: the allocator gives up a pool with its last graph."""
        if not self.recorded:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised; the next one may be the same memory, which lives as long as any of them."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > self._bytes.numel():
            self._bytes = torch.empty(max(size, self.largest), dtype=torch.uint8, device=self.device)
        return self._bytes[:size].view(dtype).view(*shape)

    def clear(self) -> None:
        """Keep no buffer beyond those that graphs still read."""
        self._bytes = self._bytes.new_empty(0)


class Recorder:
    """Takes a bucket's update, by a graph as soon as the same one has been taken ``WARM_UP`` times.

    Args:
        memory: shared with other recorders.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.forget()

    def forget(self) -> None:
        """Give up the graph; the next steps are taken as ever, and recorded anew."""
        self._key: Hashable = None
        self.places: Hashable = None
        """Where the last update wrote; None before the first."""
        self._turns = 0
        self._refused = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: Tensor | None = None
        self._memory.recorded.discard(self)

    @property
    def turns(self) -> int:
        """Steps taken alike so far, up to the one that is recorded; the same on all ranks, or some record alone."""
        return min(self._turns, WARM_UP + 1)

    @property
    def recorded(self) -> bool:
        """Whether the next step is a launch of the graph."""
        return self._graph is not None

    def take(
        self,
        key: Hashable,
        places: Hashable,
        parts: Sequence[Tensor],
        update: Callable[[Tensor], None],
        on_all: Callable[[bool], bool] = bool,
    ) -> None:
        """``update(joined(parts))``.

        Warns once if it cannot be recorded, for want of memory say, and takes it as ever.

        Args:
            key: equal as long as ``update`` launches the same kernels.
            places: equal as long as they write to the same memory.
            parts: of the input.
            update: reads the input, and writes in place.
            on_all: whether something holds on all ranks that take part in ``update``, of what holds on this one:
                collectives are recorded by all of them or by none.
        """
        key = (key, tuple((part.shape, part.dtype) for part in parts), _switches())
        if (key, places) != (self._key, self.places):
            self.forget()
            self._key, self.places = key, places
        self._turns += 1
        if self._turns > WARM_UP and not self._refused and self._graph is None:
            self._record(parts, update, on_all)
        if self._graph is None:
            update(joined(parts))
            return
        assert self._input is not None
        torch.cat(list(parts), out=self._input)
        self._graph.replay()

    def _record(
        self, parts: Sequence[Tensor], update: Callable[[Tensor], None], on_all: Callable[[bool], bool]
    ) -> None:
        memory, graph = self._memory, torch.cuda.CUDAGraph()
        refusal: object = None
        try:
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
            given = memory.buffer(shape, dtype)
            # Of this thread alone: NCCL's own asks for events at any time.
            recording = torch.cuda.graph(
                graph, pool=memory.pool(), stream=memory.stream, capture_error_mode="thread_local"
            )
            with torch.cuda.device(memory.device), recording:
                update(given)
        except Exception as error:  # nothing has been computed yet
            refusal = error
        if not on_all(refusal is None):
            self._refused = True
            refusal = refusal or "it could not be recorded on another rank"
            warnings.warn(
                f"this update is not recorded as a CUDA graph, but taken as ever: {refusal}", stacklevel=2
            )
            return
        self._graph, self._input = graph, given
        memory.recorded.add(self)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` along dim 0, contiguous; a view if there is one only."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts))


def _switches() -> Hashable:
    """What chooses kernels besides the arguments."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    )


def recorder_on(
    device: torch.device, memory: dict[torch.device, Memory] | None, size: int
) -> Recorder | None:
    """A recorder, its memory shared with the others on ``device``; None off CUDA, and where ``memory`` is None.

    Args:
        device: of the bucket.
        memory: by device.
        size: bytes of its gradients.
    """
    if memory is None or device.type != "cuda":
        return None
    if device not in memory:
        memory[device] = Memory(device)
    memory[device].largest = max(memory[device].largest, size)
    return Recorder(memory[device])
