"""What a step really launches: the engine's own function on tensors without data, on a process group without ranks."""

from __future__ import annotations

import logging
import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, _mesh_resources, init_device_mesh
from torch.distributed.tensor import Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.plan.operators import Operator
from dion_dtensor.layout import StorageLayout
from dion_dtensor.orthonormalize import gram
from dion_dtensor.planning import Cost, Transfer
from dion_dtensor.planning.buckets import collective
from dion_dtensor.planning.predict import basis_flops
from dion_dtensor.routes import ROUTES
from dion_dtensor.rules import RULES
from dion_dtensor.updates import Plan, update_of

__all__ = ["Launched", "Recorder", "fake_mesh", "launched"]

RANKS_PER_HOST = 8
COLLECTIVES = {
    "_c10d_functional.all_to_all_single": "all_to_all",
    "_c10d_functional.all_gather_into_tensor": "all_gather",
    "_c10d_functional.reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional.all_reduce": "all_reduce",
}
SORTS = ("aten.sort", "aten.topk")
LOCAL = ("wait_tensor", "_wrap_tensor_autograd")
"""What torch's collectives call on this rank alone."""


@contextmanager
def fake_mesh(sizes: tuple[int, ...], names: tuple[str, ...]) -> Iterator[DeviceMesh]:
    """A mesh of any size in this process alone, for tensors without data ("meta").

    Raises:
        RuntimeError: a process group exists already.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group exists already; count before it is made")
    dist.init_process_group("fake", rank=0, world_size=math.prod(sizes), store=HashStore())
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it tells how to be faster
    hosts = mock.patch.object(type(_mesh_resources), "num_devices_per_host", return_value=RANKS_PER_HOST)
    try:
        with hosts:  # torch asks the device, and "meta" has none
            yield init_device_mesh("meta", sizes, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Launched:
    """What a step launched on this rank.

    Attributes:
        cost: FLOPs, bytes and peak memory.
        collectives: axis, and bytes of this rank before it, of each; gloo's stand-ins for an all-to-all have the same.
        operators: those that multiply, factorize or sort, which no compiler fuses.
    """

    cost: Cost
    collectives: tuple[tuple[int, int], ...]
    operators: tuple[Operator, ...]


def launched(
    mesh: DeviceMesh,
    placements: tuple[Placement, ...],
    shape: tuple[int, int],
    number: int,
    algorithm: str,
    hyper: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: str = "meta",
    kind: str = "cuda",
    pending: tuple[int, ...] = (),
) -> Launched:
    """The step of a bucket of ``number`` matrices, run eagerly and looked at.

    Args:
        mesh: see :func:`fake_mesh`.
        placements: of each matrix.
        shape: of each matrix.
        number: of matrices.
        algorithm: a rule of ``dion_dtensor`` that steps matrices.
        hyper: hyperparameters that differ from the rule's defaults.
        dtype: of parameters, gradients and state.
        compute_dtype: of the orthonormalization.
        device: "meta" for tensors without data; another one runs the step on ones, with the ranks of ``mesh``.
        kind: of the device that tensors without data stand for: "cuda" or "cpu", which take some products otherwise.
        pending: axes of ``mesh`` over which the gradients are not averaged yet.

    Raises:
        ValueError: an elementwise rule, which has no communication and no products; ``pending`` for a rule whose
            gradients are averaged before its step.
    """
    rule = RULES[algorithm]
    if rule.elementwise:
        raise ValueError(f"{algorithm} works on each element alone; there is nothing to count")
    if pending and not rule.pending_states:
        raise ValueError(f"{algorithm} steps averaged gradients alone")
    group = {**rule.defaults, **(hyper or {})}
    layout = StorageLayout(shape, dtype, torch.device(device), mesh, placements)
    stacked = layout.stacked(number)
    specs = rule.states(shape, group)
    states = []
    for key, spec in specs.items():
        own = layout if spec.dims is None else layout.derived(spec.dims, spec.sizes or (), dtype)
        apart = pending if key in rule.pending_states else ()
        states.append((key, own.stacked(number).partial(apart), None))
    values = {name: group[name] for name in rule.defaults} | {"compute_dtype": compute_dtype}
    values |= {"split": None} | rule.prepare(shape, group)
    fields = rule.hyper._fields  # type: ignore[attr-defined]
    fixed = tuple((name, values[name]) for name in fields if name not in rule.scalars)
    plan = Plan(
        rule, (fixed,), False, stacked.partial(pending), stacked, tuple(states), number, (), None, False
    )
    scalars = {
        name: torch.full((), 0.5, dtype=torch.float64, device=device) for name in (*rule.scalars, "lr")
    }
    grads, stacks = _local(stacked), {key: _local(state) for key, state, _ in states}
    before = stacked.largest_shard() * dtype.itemsize  # the engine joins the gradients
    with (
        mock.patch.object(gram, "META_STANDS_FOR", kind),
        Recorder(mesh, (grads, *stacks.values())) as recorder,
    ):
        update_of(plan)(grads, stacks, scalars, torch.ones((), dtype=torch.float64, device=device))
    cost = Cost(dict(recorder.flops), tuple(recorder.transfers), float(before + recorder.peak), 0.0)
    return Launched(cost, tuple(recorder.collectives), tuple(recorder.operators))


def _local(layout: StorageLayout) -> Tensor:
    assert layout.mesh is not None
    shape, _ = compute_local_shape_and_global_offset(layout.shape, layout.mesh, layout.placements)
    return torch.ones(shape, dtype=layout.dtype, device=layout.device)


def _products(name: str, args: tuple[Any, ...]) -> float:
    """FLOPs of an operator, zero if it is none that multiplies matrices."""
    if name == "dion_dtensor.orthonormal_basis":
        number, rows, columns = args[0].shape
        return float(number * basis_flops(rows, columns))
    if name == "aten.linalg_solve_triangular":
        return float(args[0].numel() * args[1].shape[-1])
    if name == "aten.linalg_cholesky_ex":
        return float(args[0].numel() * args[0].shape[-1] / 3)
    if name in ("aten.mm", "aten.bmm", "aten.matmul"):
        return float(2 * args[0].numel() * args[1].shape[-1])
    if name in ("aten.addmm", "aten.baddbmm"):
        return float(2 * args[1].numel() * args[2].shape[-1])
    return 0.0


# Ignored: torch does not type how its base class is subclassed.
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collectives, with the bytes of this rank, products, and the memory that tensors made meanwhile take.

    Attributes:
        transfers, collectives, operators, flops: see `Launched` and `Cost`.
        live, peak: bytes that are held, and that were held at most.
    """

    def __init__(self, mesh: DeviceMesh, given: Iterable[Tensor]) -> None:
        """Of a mesh, and of a step that is given tensors which take no further memory."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.axes: dict[str, int] = {mesh.get_group(axis).group_name: axis for axis in range(mesh.ndim)}
        self.sizes = [mesh.size(axis) for axis in range(mesh.ndim)]
        self.transfers: list[Transfer] = []
        self.collectives: list[tuple[int, int]] = []
        self.operators: list[Operator] = []
        self.flops: defaultdict[str, float] = defaultdict(float)
        self.within = False
        self.live = self.peak = 0
        self._flights: dict[int, tuple[int, int]] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(function).rsplit(".", 1)[0]
        if name == "dion_dtensor.gram_iterations":
            before, self.within = sum(self.flops.values()), True
            with self:  # one operator to the machine, whose products are to be counted
                result = gram.iterate(*args, **(kwargs or {}))
            self.within = False
            self.operators.append(Operator.of(function, args, kwargs, sum(self.flops.values()) - before))
            return result
        result = function(*args, **(kwargs or {}))
        if count := _products(name, args):
            self.flops[str(args[0].dtype).removeprefix("torch.")] += count
        if (count or name in SORTS) and not self.within:
            self.operators.append(Operator.of(function, args, kwargs, count))
        if name in COLLECTIVES:
            axis = next(self.axes[arg] for arg in reversed(args) if isinstance(arg, str) and arg in self.axes)
            size = args[0].numel()
            self.collectives.append((axis, size * args[0].element_size()))
            if COLLECTIVES[name] == "all_to_all":  # where ranks work on more or fewer, one may receive more
                size = max(size, sum(args[1]))
            self._sent(COLLECTIVES[name], axis, size * args[0].element_size())
        elif name.startswith(("_c10d_functional.", "_dtensor.")) and not name.endswith(LOCAL):
            raise NotImplementedError(f"{name} is a collective whose bytes are not counted yet")
        elif name in ("dion_dtensor.start_fetch", "dion_dtensor.start_return"):
            self._flights[result.untyped_storage()._cdata] = self._rows(name.endswith("fetch"), args)
        landed = 0
        for token in args[0] if name == "dion_dtensor.finish_rows" else ():
            sent, arrived = self._flights.pop(token.untyped_storage()._cdata)
            self.live -= sent
            landed += arrived
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._made(tensor)
        self.live -= landed
        return result

    def _sent(self, name: str, axis: int, size: float) -> None:
        self.transfers.append(collective(name, axis, self.sizes[axis], size))

    def _rows(self, fetch: bool, args: tuple[Any, ...]) -> tuple[int, int]:
        """Which rows travel depends on the data: as many as if every rank held as many of them as any other.

        Of as many matrices as the rank has that works on most.

        Returns:
            Bytes of what is sent on the last hop and of what arrives, which take memory until it is waited for.
        """
        values, chosen, route, matrices = args[0], args[1], ROUTES[args[2]], args[3]
        along = [one for one in args[5 if fetch else 6 :] if one is not None]
        before, after = (route.sharded, route.split) if fetch else (route.split, route.sharded)
        rows = float(matrices * chosen.shape[1])
        width = sum(one.shape[2] * one.element_size() for one in (values, *along))
        for size, shared in zip(route.sizes, before, strict=True):
            rows /= size if shared else 1
        sent = arrived = 0
        travels = False
        for axis in route.order if fetch else reversed(route.order):
            size = route.sizes[axis]
            if not before[axis]:  # nothing travels; where the ranks share afterwards, each keeps its part
                rows /= size if after[axis] else 1
                sent, travels = 0, False
                continue
            held, travels = rows * width, True
            rows *= 1 if after[axis] else size
            name = "all_to_all" if after[axis] else "all_gather"
            of_mesh = self.axes[route.mesh.get_group(route.axes[axis]).group_name]
            self.collectives.append((of_mesh, int(held)))
            self._sent(name, of_mesh, held)
            kept, sent, arrived = arrived, int(held if after[axis] else held * size), int(rows * width)
            self.peak = max(self.peak, self.live + kept + sent + arrived)
        if not travels:  # copied, lest they be written over
            kept, arrived = arrived, int(rows * width)
            self.peak = max(self.peak, self.live + kept + arrived)
        self.live += sent + arrived
        return sent, arrived

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
