"""Normal values keyed by (seed, name, row, column): the same on every mesh, whoever asks.

Philox4x32-10 (Salmon et al., SC 2011) on the counter ``(column // 4, row, matrix, 0)`` with a key hashed from the seed
and the name; the four words give four normals by Box-Muller.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

__all__ = ["normal", "signs"]

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


TOGETHER = 1 << 16
"""Counters that are worked on at a time: more leave the caches of a CPU, and take ten times as long."""


def normal(rows: int | Tensor, columns: int, *, seed: int, name: str, matrix: int = 0) -> Tensor:
    """Standard normal values.

    Args:
        rows: of the matrix, or the indices of those that are asked for, int64 on the CPU.
        columns: of the matrix; a larger one has the smaller one as its upper left corner.
        seed: any integer.
        name: fully qualified name of the parameter.
        matrix: index of the logical matrix within the parameter.

    Returns:
        float64 ``[rows, columns]`` on the CPU.
    """
    index = torch.arange(rows, device="cpu") if isinstance(rows, int) else rows
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    some = max(1, TOGETHER // max(1, -(-columns // 4)))
    values = [_normal(part, columns, key, matrix) for part in torch.split(index, some)]
    return values[0] if len(values) == 1 else torch.cat(values)


def _normal(rows: Tensor, columns: int, key: tuple[int, int], matrix: int) -> Tensor:
    blocks = -(-columns // 4)
    block = torch.arange(blocks, device="cpu").expand(len(rows), blocks)
    row = rows.unsqueeze(1).expand(len(rows), blocks)
    words = _philox((block, row, torch.full_like(block, matrix), torch.zeros_like(block)), key)
    uniform = [(word.double() + 0.5) / 2**32 for word in words]
    values = []
    for radius, angle in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        length = (-2 * radius.log()).sqrt()
        values += [length * (2 * math.pi * angle).cos(), length * (2 * math.pi * angle).sin()]
    return torch.stack(values, dim=-1).reshape(len(rows), 4 * blocks)[:, :columns].contiguous()


def signs(rows: int, columns: Tensor) -> Tensor:
    """Random signs, the same whoever asks.

    Args:
        rows: how many.
        columns: ``[j]``, indices of the columns that are asked for.

    Returns:
        ``[rows, j]`` of 1 and -1, int64, on the device of ``columns``.
    """
    blocks = torch.arange(-(-rows // 128), device=columns.device).unsqueeze(1)
    zero = torch.zeros_like(blocks * columns)
    words = torch.stack(
        _philox((blocks + zero, columns + zero, zero, zero + 1), (0, 0)), dim=1
    )  # [blocks, 4, j]
    bits = torch.arange(32, device=columns.device).view(1, 1, 32, 1)
    return (1 - 2 * ((words.unsqueeze(2) >> bits) & 1)).flatten(0, 2)[:rows]


def _philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32x32-bit product; in halves, since int64 would overflow."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & MASK, total & MASK
