"""Whole tensors out of sharded ones: one collective for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Gatherer:
    """Gathers a fixed list of tensors, all of one dtype, to every rank of the default group.

    Which element lies where is not computed here but asked of DTensor: an index is laid out like each tensor,
    once; from then on a gather is one all-gather of flat buffers, where `full_tensor` takes several a tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        indices, start = [], 0
        for tensor in tensors.values():
            indices.append((_index_like(tensor) + start).flatten())
            start += tensor.numel()
        self.total = start
        own = torch.cat(indices)
        device = own.device
        lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, torch.tensor([own.numel()], device=device))
        self.lengths = [int(length) for length in lengths]
        self.places = self._exchange(own)

    def _exchange(self, own: Tensor) -> list[Tensor]:
        """The flat buffers of all ranks."""
        longest = max(self.lengths)
        padded = own.new_zeros(longest)
        padded[: own.numel()] = own
        buffers = [own.new_empty(longest) for _ in self.lengths]
        dist.all_gather(buffers, padded)
        return [buffer[:length] for buffer, length in zip(buffers, self.lengths, strict=True)]

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The whole tensors by name, on the CPU; `tensors` in the order of the constructor."""
        locals_ = [_local(tensor).detach().flatten() for tensor in tensors]
        flat = locals_[0].new_empty(self.total)
        for place, part in zip(self.places, self._exchange(torch.cat(locals_)), strict=True):
            flat[place] = part
        whole, start = {}, 0
        flat = flat.cpu()
        for name, shape in self.shapes.items():
            size = torch.Size(shape).numel()
            whole[name] = flat[start : start + size].view(shape)
            start += size
        return whole


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _index_like(tensor: Tensor) -> Tensor:
    """Flat index of every element of this rank's part of `tensor`."""
    index = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    if not isinstance(tensor, DTensor):
        return index
    whole = DTensor.from_local(index, tensor.device_mesh, run_check=False)
    return whole.redistribute(placements=tensor.placements).to_local()
