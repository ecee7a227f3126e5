"""Inputs of the vectors: counter-based normal values on a dyadic grid, the same bits on every machine.

Logarithm and cosine differ in their last bit between machines; after rounding to a multiple of 2^-10 nothing of that
is left. Every input is exact in float32 too, so all compute dtypes start from the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dion_ref import philox

GRID = 2.0**10


def normal(shape: tuple[int, ...], name: str) -> Tensor:
    """Standard normal values by (name, row, column), rounded to the grid; float64 of any shape."""
    rows = shape[0]
    columns = max(1, torch.Size(shape[1:]).numel())
    return on_grid(philox.normal(rows, columns, seed=0, name=f"vectors:{name}")).reshape(shape)


def on_grid(values: Tensor) -> Tensor:
    """The nearest multiples of 1/GRID."""
    return torch.round(values * GRID) / GRID


def low_rank(shape: tuple[int, ...], rank: int, name: str) -> Tensor:
    """A matrix of exactly this rank: a product of small integers, over 8."""
    left = torch.round(normal((shape[0], rank), name + ":left") * 2)
    right = torch.round(normal((rank, shape[1]), name + ":right") * 2)
    return (left.unsqueeze(-1) * right.unsqueeze(0)).sum(1) / 8  # integers: any order of the sum is exact


def tied_rows(shape: tuple[int, ...], name: str) -> Tensor:
    """Rows (columns, if they are fewer) of pairwise equal L1 norm: a slice, and the same one with signs turned."""
    short = 0 if shape[0] <= shape[1] else 1
    values = normal(shape, name).movedim(short, 0).clone()
    for index in range(0, values.shape[0] - 1, 2):
        values[index + 1] = -values[index]
        values[index + 1, 0] = values[index, 0]
    if values.shape[0] % 2:
        values[-1] /= 16  # the odd one out comes last
    return values.movedim(0, short).contiguous()


def positive(shape: tuple[int, ...], name: str) -> Tensor:
    """Second moments: between 1/64 and about 1/4, exact in float32."""
    return torch.round((normal(shape, name).square() / 16 + 1 / 64) * GRID * 16) / (GRID * 16)
