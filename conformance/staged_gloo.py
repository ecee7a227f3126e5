"""gloo for ranks that share GPUs: each collective goes by copies of its tensors on the host.

torch's own gloo ends the process in some collectives of CUDA tensors that DTensor asks for (seen with torch 2.11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.utils._pytree import tree_leaves, tree_map_only

from conformance.ranks import STAGED_GLOO

__all__ = ["StagedGloo"]


class StagedGloo(dist.ProcessGroup):
    """The collectives that DTensor, checkpoints and collectives of objects need; all are done when they return.

    Args:
        store: where the ranks find each other.
        rank: in the group.
        size: of the group.
        timeout: of a collective.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def _staged(self, collective: Callable[..., Any], written: Any, *arguments: Any) -> Any:
        hosts: dict[int, Tensor] = {}

        def host(tensor: Tensor) -> Tensor:
            return hosts.setdefault(id(tensor), tensor.cpu())

        collective(*tree_map_only(Tensor, host, arguments)).wait()
        for tensor in tree_leaves(written):
            tensor.copy_(hosts[id(tensor)])
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(written)
        return _create_work_from_future(done)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *options: Any) -> Any:
        """Every input to every rank."""
        return self._staged(self._gloo.allgather, outputs, outputs, inputs)

    def _allgather_base(self, output: Tensor, given: Tensor, *options: Any) -> Any:
        return self.allgather([list(output.chunk(self.size()))], [given])

    def allgather_into_tensor_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *options: Any
    ) -> Any:
        """:meth:`allgather` of several, each output one tensor."""
        return [self._allgather_base(*pair) for pair in zip(outputs, inputs, strict=True)][-1]

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        """In place."""
        own = dist.AllreduceOptions()
        if options is not None:
            own.reduceOp = options.reduceOp
        return self._staged(lambda given: self._gloo.allreduce(given, own), tensors, tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], options: Any = None) -> Any:
        """:meth:`allreduce` of several."""
        return [self.allreduce([tensor], options) for tensor in tensors][-1]

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        """In place, from one rank."""
        return self._staged(lambda given: self._gloo.broadcast(given, options), tensors, tensors)

    def alltoall_base(
        self, output: Tensor, given: Tensor, output_sizes: list[int], input_sizes: list[int], *options: Any
    ) -> Any:
        """Parts of a tensor to each rank."""
        exchange = self._gloo.alltoall_base
        return self._staged(lambda *both: exchange(*both, output_sizes, input_sizes), [output], output, given)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None) -> Any:
        """A tensor to each rank."""
        sizes = [[tensor.numel() for tensor in tensors] for tensors in (outputs, inputs)]
        given = torch.cat([tensor.reshape(-1) for tensor in inputs])
        received = given.new_empty(sum(sizes[0]))
        work = self.alltoall_base(received, given, *sizes)
        for output, part in zip(outputs, torch.split(received, sizes[0]), strict=True):
            output.copy_(part.view(output.shape))
        return work

    def reduce(self, tensors: list[Tensor], options: Any) -> Any:
        """To one rank; the others keep theirs."""
        whole = [tensor.clone() for tensor in tensors]
        work = self.allreduce(whole, options)
        if self.rank() == options.rootRank:
            for tensor, value in zip(tensors, whole, strict=True):
                tensor.copy_(value)
        return work

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> Any:
        """To one rank."""
        return self._staged(lambda given: self._gloo.send(given, to, tag), [], tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Any:
        """From one rank."""
        return self._staged(lambda given: self._gloo.recv(given, source, tag), tensors, tensors)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any = None) -> Any:
        """The sum of what all ranks have for this one."""
        for output, parts in zip(outputs, inputs, strict=True):
            whole = [part.clone() for part in parts]
            work = self.allreduce_coalesced(whole, options)
            output.copy_(whole[self.rank()])
        return work

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, options: Any = None) -> Any:
        return self.reduce_scatter([output], [list(given.chunk(self.size()))], options)

    def reduce_scatter_tensor_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], options: Any = None
    ) -> Any:
        """:meth:`reduce_scatter` of several, each input one tensor."""
        return [self._reduce_scatter_base(*pair, options) for pair in zip(outputs, inputs, strict=True)][-1]

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Any:
        """From one rank, a tensor to each."""
        return self._staged(lambda *both: self._gloo.scatter(*both, options), outputs, outputs, inputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        """To one rank, a tensor of each."""
        return self._staged(lambda *both: self._gloo.gather(*both, options), outputs, outputs, inputs)

    def barrier(self, *positional: Any, **options: Any) -> Any:
        """Until all ranks are here."""
        return self.allreduce([torch.zeros(1)])

    # Their names since torch 2.14.
    all_gather_single, all_gather_single_coalesced = _allgather_base, allgather_into_tensor_coalesced
    reduce_scatter_single, reduce_scatter_single_coalesced = (
        _reduce_scatter_base,
        reduce_scatter_tensor_coalesced,
    )
    all_to_all_single = alltoall_base

    @property
    def group_name(self) -> str:
        """What torch registered it as."""
        return dist.distributed_c10d._world.pg_names[self]

    # torch asks for it by this name.
    def getBackendName(self) -> str:  # noqa: N802
        """Its name."""
        return STAGED_GLOO


dist.Backend.register_backend(STAGED_GLOO, StagedGloo, devices=["cpu", "cuda"])
