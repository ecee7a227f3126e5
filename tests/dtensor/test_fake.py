"""Steps of torch's fake tensors: on CPUs and on GPUs that are not there, where a mix of devices raises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dion_dtensor import Muon, audit
from dion_dtensor.rules import RULES as BY_NAME
from tests.dtensor.programs import OPTIMIZERS, OWN
from tests.dtensor.small import RULES

# As FSDP2 and TP lay them on a mesh of 2 x 2: both dims, one dim twice, uneven, replicated, and blocks that are cut.
LAYOUTS: list[tuple[tuple[int, ...], tuple[Placement, ...], str | None]] = [
    ((64, 32), (Shard(0), Shard(1)), None),
    ((48, 32), (Shard(0), Replicate()), None),
    ((32, 64), (_StridedShard(0, split_factor=2), Shard(0)), None),
    ((33, 65), (Replicate(), Shard(1)), None),
    ((24, 24), (Replicate(), Replicate()), None),
    ((4, 32, 64), (Shard(0), Shard(1)), "experts"),
    ((64, 32), (Shard(0), Shard(1)), "heads(4)"),
    ((48, 32), (Shard(0), Shard(0)), "rows(20, 20, 8)"),
]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


def parameter(mesh: DeviceMesh, shape: Sequence[int], placements: Sequence[Placement]) -> nn.Parameter:
    with unset_fake_temporarily():  # torch reads the sizes of strided shards off a tensor
        local, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    full = torch.empty(shape, device="meta")
    made = DTensor.from_local(
        torch.empty(local, device=mesh.device_type),
        mesh,
        placements,
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )
    own = nn.Parameter(made)
    own.grad = torch.empty_like(own)
    return own


def optimizer_of(algorithm: str, mesh: DeviceMesh, **options: Any) -> Any:
    rule = "dion" if algorithm == "orth_dion" else algorithm
    groups = [
        {"params": [(f"w{index}", parameter(mesh, shape, placements))], "algorithm": rule}
        | ({} if split is None or BY_NAME[rule].elementwise else {"split": split})
        for index, (shape, placements, split) in enumerate(LAYOUTS)
    ]
    return OPTIMIZERS[algorithm](groups, **OWN.get(algorithm, {}) | options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("algorithm", RULES)
def test_fake_tensors_are_stepped_on_every_layout(algorithm: str, compiled: bool, device: str) -> None:
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("fsdp", "tp"))
    with FakeTensorMode():
        optimizer = optimizer_of(algorithm, mesh, compile=compiled, atomic=True, capture=compiled)
        for _ in range(2):
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert "w0" in str(audit(optimizer))
        held: list[Tensor] = [value for state in optimizer.state.values() for value in state.values()]
        locals_ = [value.to_local() if isinstance(value, DTensor) else value for value in held]
    assert locals_
    assert all(isinstance(value, FakeTensor) for value in locals_)


def test_a_gradient_that_lies_otherwise_is_named_of_fake_tensors_too() -> None:
    mesh = init_device_mesh("cuda", (4,))
    with FakeTensorMode():
        own = parameter(mesh, (8, 8), [Shard(0)])
        optimizer = Muon([("w", own)])
        own.grad = parameter(mesh, (8, 8), [Shard(1)]).detach()
        with pytest.raises(RuntimeError, match=r"w .*: the gradient does not lie as its parameter does"):
            optimizer.step()


def test_fake_replicas_are_stepped() -> None:
    mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("replicate", "shard"))
    with FakeTensorMode():
        own = parameter(mesh["shard"], (8, 8), [Shard(0)])
        Muon([("w", own)], replicate_mesh=mesh["replicate"]).step()


@pytest.mark.parametrize("algorithm", ["dion2", "dion3", "normuon"])
def test_real_steps_after_fake_ones_find_real_tables(algorithm: str) -> None:
    """What is kept for later steps, such as the rows of each rank, must not be made of fake tensors."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    with FakeTensorMode():
        optimizer_of(algorithm, mesh, compile=False).step()
    optimizer_of(algorithm, mesh, compile=False, validate=False).step()


def test_torch_tells_the_memory_of_a_step_that_does_not_run() -> None:
    """Of 16 matrices [256, 256] on 4 ranks, which work on 4 each; with a bound on 1 each."""
    mesh, matrix = init_device_mesh("cuda", (4,)), 256 * 256 * 4
    most = {}
    for bound in (None, matrix):
        with FakeTensorMode():
            own = [(f"w{index}", parameter(mesh, (256, 256), [Shard(0)])) for index in range(16)]
            optimizer = Muon(own, max_bucket_bytes=bound)
            tracker = MemTracker()
            tracker.track_external(*(one.grad for _, one in own), *(one for _, one in own), optimizer)
            with tracker:
                optimizer.step()
            most[bound] = tracker.get_tracker_snapshot("peak")[torch.device("cuda:0")]["Total"]
    held = 3 * 4 * matrix  # weights, gradients, momentum: a quarter of 16
    assert held + 4 * matrix <= most[None]
    assert held + matrix <= most[matrix] <= held + (most[None] - held) / 3, most
