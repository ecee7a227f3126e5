"""What ranks are compared with: one device, and how far apart two results are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dtensor.layouts import Layout
from tests.dtensor.programs import run_steps

COMPILED_SHAPES = ((13, 10), (13, 10), (13, 10))
EVERY = ["muon", "normuon", "dion", "orth_dion", "dion2", "dion3"]


def on_one_thread(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """As the ranks run it: with more threads sums run in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(*arguments, **options)
    finally:
        torch.set_num_threads(threads)


@cache
def on_one_device(name: str, small: bool, steps: int = 2) -> dict[str, list[Tensor]]:
    options: dict[str, Any] = {"steps": steps} | ({"shapes": COMPILED_SHAPES} if small else {})
    result: dict[str, list[Tensor]] = on_one_thread(run_steps, name, None, compile=False, **options)
    return result


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def cases(names: Sequence[str], layouts: Sequence[Layout], sample: Sequence[Layout]) -> list[Any]:
    """Each name on each layout; those outside the sample run in the long sweep."""
    return [
        pytest.param(name, where, id=f"{name}-{where}", marks=[] if where in sample else pytest.mark.slow)
        for name in names
        for where in layouts
    ]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)
