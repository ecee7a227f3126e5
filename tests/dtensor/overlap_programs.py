"""In which order a step starts collectives, waits for them, and works."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.profiler import ProfilerActivity, profile

import dion_dtensor
from dion_dtensor import exchange, whole_matrices
from dion_dtensor.routes import route
from dion_dtensor.updates import update_of
from tests.dtensor.layouts import Layout, build_mesh, lay_out, layout
from tests.dtensor.programs import full, run_steps

NINE = ((13, 10),) * 9
"""Uneven shards; three matrices a rank on four ranks, the last three of them padding."""
OPTIONS = {"Dion2": {"path": "exchange"}}
WORDS = {
    "_c10d_functional::all_to_all_single": "start",
    "_c10d_functional::wait_tensor": "wait",
    "dion_dtensor::gram_iterations": "work",
    "dion_dtensor::start_fetch": "fetch",
    "dion_dtensor::start_return": "return",
    "dion_dtensor::finish_rows": "finish",
}


def run_in_turns(name: str, place: Layout, overlap_bytes: int = 0) -> dict[str, list[Tensor]] | None:
    """``run_steps`` with the matrices in two turns from so many bytes on."""
    with mock.patch.object(whole_matrices, "OVERLAP_BYTES", overlap_bytes):
        return run_steps(name, place, NINE, compile=False)


def steps_of(
    name: str, place: Layout, compiled: bool, overlap_bytes: int
) -> tuple[list[str], list[Tensor], bool] | None:
    """What the third step on eight matrices did, in order, and the weights then; None outside the mesh.

    And whether no exchange of rows was waited for as it was started.
    """
    mesh = build_mesh(place)
    if mesh.get_coordinate() is None:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 16, 24, generator=generator) for _ in range(8)]
    weights = [nn.Parameter(lay_out(weight, place, mesh)) for weight, _ in drawn]
    update_of.cache_clear()
    with mock.patch.object(whole_matrices, "OVERLAP_BYTES", overlap_bytes):
        optimizer = getattr(dion_dtensor, name)(weights, compile=compiled, **OPTIONS.get(name, {}))
        for weight, (_, grad) in zip(weights, drawn, strict=True):
            weight.grad = lay_out(grad, place, mesh)
        for _ in range(2):
            optimizer.step()
        token, apart = exchange._token, []

        def watched(flight: exchange.Flight, *places: Tensor) -> Tensor:
            apart.append(flight.work is not None)
            return token(flight, *places)

        with (
            mock.patch.object(exchange, "_token", watched),
            profile(activities=[ProfilerActivity.CPU]) as profiled,
        ):
            optimizer.step()
    update_of.cache_clear()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    order = [WORDS[event.name()] for event in events if event.name() in WORDS]
    return order, [full(weight) for weight in weights], all(apart)


def lays_what_was_returned() -> bool | None:
    """Rows that need not travel back, laid after what was given has been written over."""
    place = layout("4 S0")
    mesh = build_mesh(place)
    if mesh.get_coordinate() is None:
        return None
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 3, 5], [1, 2, 7]])
    expected = torch.zeros(2, 8, 5).scatter(1, chosen.unsqueeze(-1).expand_as(values), values)
    number = route(mesh, (Shard(1),), 8, ())
    token = exchange.start_return(values, chosen, number, 2, 0, [])
    values.zero_()
    found: Tensor = exchange.finish_rows([token], (2, 2, 5), values.dtype, [])[0]
    return torch.equal(found, expected.chunk(4, dim=1)[mesh.get_local_rank(0)])
