"""A bucket's update as a CUDA graph: recorded once, then launched as one, without the host's time for each kernel.

What changes from step to step stays outside: gradients are joined into a buffer that the graph reads, and
hyperparameters and counts are written to the 0-d tensors that it reads, before each launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["Memory", "Recorder", "recorder_on"]

# Steps that are taken as ever before a recording: what is compiled, tuned or allocated once comes to be there.
WARM_UP = 2


class Memory:
    """What the graphs of one optimizer share: they run one after the other, and each leaves nothing behind.

    Args:
        device: of all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised; the next one may be the same memory, which lives as long as any of them."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > self._bytes.numel():
            self._bytes = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._bytes[:size].view(dtype).view(*shape)


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
        self._turns = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """Whether the next step is a launch of the graph."""
        return self._graph is not None

    def take(self, key: Hashable, parts: Sequence[Tensor], update: Callable[[Tensor], None]) -> None:
        """``update(torch.cat(parts))``.

        Args:
            key: equal as long as ``update`` launches the same kernels on the same memory.
            parts: of the input.
            update: reads the input, and writes in place.
        """
        key = (key, tuple(part.shape for part in parts), parts[0].dtype)
        if key != self._key:
            self.forget()
            self._key = key
        self._turns += 1
        if self._turns <= WARM_UP:
            update(torch.cat(list(parts)))
            return
        if self._graph is None:
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            self._input = self._memory.buffer(shape, parts[0].dtype)
            # Of this thread alone: NCCL's own asks for events at any time.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory.pool, capture_error_mode="thread_local"):
                update(self._input)
            self._graph = graph
        assert self._input is not None
        torch.cat(list(parts), out=self._input)
        self._graph.replay()


def recorder_on(device: torch.device, memory: dict[torch.device, Memory] | None) -> Recorder | None:
    """A recorder, its memory shared with the others on ``device``; None off CUDA, and where ``memory`` is None."""
    if memory is None or device.type != "cuda":
        return None
    if device not in memory:
        memory[device] = Memory(device)
    return Recorder(memory[device])
