"""Deterministic float64 inputs, each the same on every machine: Python's generator, keyed by a string."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor


def gaussian(key: str, *shape: int) -> Tensor:
    """Independent standard normal entries."""
    generator = Random(key)
    count = 1
    for size in shape:
        count *= size
    return torch.tensor([generator.gauss(0.0, 1.0) for _ in range(count)], dtype=torch.float64).reshape(shape)


def integers(key: str, *shape: int, low: int = -4, high: int = 4) -> Tensor:
    """Independent whole numbers from low to high."""
    generator = Random(key)
    count = 1
    for size in shape:
        count *= size
    entries = [float(generator.randint(low, high)) for _ in range(count)]
    return torch.tensor(entries, dtype=torch.float64).reshape(shape)


def conditioned(key: str, rows: int, columns: int, decades: float) -> Tensor:
    """Singular values evenly spread in the logarithm from 1 down to ``10^-decades``."""
    short = min(rows, columns)
    left = torch.linalg.qr(gaussian(f"{key}/left", rows, short)).Q
    right = torch.linalg.qr(gaussian(f"{key}/right", columns, short)).Q
    exponents = torch.linspace(0.0, -decades, short, dtype=torch.float64)
    result: Tensor = (left * torch.pow(10.0, exponents)) @ right.mT
    return result


def deficient(key: str, rows: int, columns: int, rank: int) -> Tensor:
    """A product of whole numbers: its rank is exact in float64 and in 50 digits alike."""
    left = integers(f"{key}/left", rows, rank, low=-3, high=3)
    right = integers(f"{key}/right", rank, columns, low=-3, high=3)
    return left @ right


def tied_rows(key: str, rows: int, columns: int, levels: int) -> Tensor:
    """Whole numbers whose rows have only ``levels`` different L1 norms, far apart: ties are exact."""
    generator = Random(key)
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        total = 7 * columns * (1 + generator.randrange(levels))
        parts = [generator.randint(1, 6) for _ in range(columns - 1)]
        entries = [*parts, total - sum(parts)]
        generator.shuffle(entries)
        matrix[i] = torch.tensor(
            [entry * generator.choice((-1, 1)) for entry in entries], dtype=torch.float64
        )
    return matrix


def powers(tensor: Tensor, exponent: int) -> Tensor:
    """Times ``2^exponent``; exact unless the result is denormal (then rounded, and exact from there on)."""
    return torch.ldexp(tensor, torch.tensor(exponent // 2)).ldexp(torch.tensor(exponent - exponent // 2))
