"""A step's arithmetic is its own, whatever the training loop has set for the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion_dtensor import Dion, Muon
from dion_dtensor.updates import update_of

PLACES: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.mark.parametrize("compile", [False, True])
def test_autocast_changes_neither_the_update_nor_its_graph(compile: bool) -> None:
    update_of.cache_clear()
    results = []
    for dtype in (None, torch.bfloat16, torch.float16):
        weight = nn.Parameter(torch.ones(6, 4))
        optimizer = Muon([weight], compile=compile)
        weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        if dtype is None:
            torch._dynamo.utils.counters.clear()
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=dtype is None):
            seen: list[bool] = []
            # Ignored: torch types a closure as one without arguments, and a default is one.
            optimizer.step(lambda seen=seen: seen.append(torch.is_autocast_enabled("cpu")) or 0.0)  # type: ignore[misc]
            assert seen == [dtype is not None]
            assert torch.is_autocast_enabled("cpu") == seen[0]
        results.append(weight.detach())
    assert all(torch.equal(one, results[0]) for one in results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compile)


def legacy() -> str:
    """The older switch; torch refuses to tell where the newer ones say something else."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "mixed"


def switches() -> tuple[str, ...]:
    return (legacy(), *(place.fp32_precision for place in PLACES))


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    for place in PLACES:  # so that the older switch may be used again
        place.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


def older() -> None:
    torch.set_float32_matmul_precision("medium")


def oldest() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def newer() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def for_all() -> None:
    for place in PLACES:
        place.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"


def dion_step(compile: bool) -> Tensor:
    """Of a gradient of rank one, which leaves all columns of the basis but one dead."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 256, generator=generator)
    weight = nn.Parameter(torch.zeros(256, 256))
    optimizer = Dion([weight], lr=1.0, weight_decay=0.0, scale=None, compile=compile)
    for _ in range(3):
        weight.grad = torch.outer(u, v)
        optimizer.step()
    return weight.detach()


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("switch", [older, oldest, newer, for_all])
def test_products_of_float32_are_of_float32(switch: Callable[[], None], compile: bool) -> None:
    expected = dion_step(compile)
    update_of.cache_clear()
    torch._dynamo.utils.counters.clear()
    before = dion_step(compile)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    switch()
    asked = switches()
    assert "tf32" in asked[1:] or "bf16" in asked[1:]
    after = dion_step(compile)
    assert switches() == asked
    assert torch.equal(before, expected)
    assert torch.equal(after, expected)
    assert float(expected.norm()) < 3.01  # three updates of one unit column each
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("as_before")
def test_what_followed_the_switch_of_all_backends_follows_it_after_a_step() -> None:
    for_all()
    dion_step(False)
    torch.backends.fp32_precision = "ieee"
    assert [place.fp32_precision for place in PLACES] == ["ieee", "ieee"]


@pytest.mark.usefixtures("as_before")
def test_the_switches_are_put_back_after_a_step_that_failed() -> None:
    older()
    asked = switches()
    weight = nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.full((4, 4), torch.nan)
    with pytest.raises(RuntimeError, match="NaN or inf"):
        Muon([weight], compile=False).step()
    assert switches() == asked
