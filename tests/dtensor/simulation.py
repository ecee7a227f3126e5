"""One process that plays all ranks of a mesh: LocalTensorMode over the fake process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.dtensor.layouts import Layout
from tests.dtensor.programs import Problem, run_steps


def simulated_steps(name: str, where: Layout, data: Problem, options: dict[str, Any]) -> list[Tensor]:
    """Full weights after a step for each gradient of ``data``, drawn beforehand: inside each rank would draw anew."""
    torch.distributed.init_process_group("fake", rank=0, world_size=where.world, store=FakeStore())
    try:
        with LocalTensorMode(where.world):
            result = run_steps(name, where, data=data, compile=False, states=False, **options)
            assert result is not None
            return [w.reconcile() if isinstance(w, LocalTensor) else w for w in result["weight"]]
    finally:
        torch.distributed.destroy_process_group()
