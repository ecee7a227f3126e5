"""Steps of more ranks than there are processes: each a thread of this one."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from conformance.rank_threads import on_threads
from tests.dtensor.layouts import Layout
from tests.dtensor.programs import run_steps


def simulated_steps(name: str, where: Layout, options: dict[str, Any]) -> list[dict[str, list[Tensor]]]:
    """Full weights and state after some steps, by rank."""
    ranks = on_threads(partial(run_steps, name, where, compile=False, **options), where.world)
    return [rank for rank in ranks if rank is not None]
