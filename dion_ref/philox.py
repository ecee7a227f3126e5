"""Counter-based random numbers: the value at (seed, name, matrix, row, column) is the same whoever asks.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11); constants and
known answers from the Random123 distribution.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from dion_ref.hyper import integer

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four int64 tensors of one shape that hold uint32 values."""


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant * word``; by 16-bit halves, since int64 can't hold 64 bits unsigned."""
    low_part = constant * (word & 0xFFFF)
    carried = constant * (word >> 16) + (low_part >> 16)
    return carried >> 16, ((carried & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """The ten-round Philox4x32 bijection.

    Args:
        counter: four int64 tensors of one shape, each value in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors of that shape, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def key_of(seed: int, name: str) -> tuple[int, int]:
    """The Philox key of a parameter: the first 8 bytes of SHA-256 of ``"{seed}:{name}"``, little endian."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def normal(rows: int, columns: int, *, seed: int, name: str, matrix: int = 0) -> Tensor:
    """Independent standard normal values by counter.

    Entry (i, j) uses the counter ``(j // 4, i, matrix, 0)``: its four words ``v`` become
    ``u = (v + 1/2) / 2^32`` and, by Box-Muller, ``z0, z1`` from ``u0, u1`` and ``z2, z3`` from ``u2, u3``;
    the entry is ``z[j % 4]``.  It depends on neither ``rows`` nor ``columns``.

    Args:
        rows, columns: shape of the result, each in [0, 2^32].
        seed: any integer.
        name: fully qualified name of the parameter.
        matrix: running index of the logical matrix within the parameter, in [0, 2^32).

    Returns:
        float64 ``[rows, columns]`` on the CPU.

    Raises:
        TypeError: ``seed`` is no integer or ``name`` no string.
        ValueError: a size or ``matrix`` is out of range.
    """
    seed = integer("seed", seed)
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    if not (0 <= rows <= 1 << 32 and 0 <= columns <= 1 << 32 and 0 <= matrix < 1 << 32):
        raise ValueError(f"rows, columns and matrix must fit 32 bits, got {rows}, {columns}, {matrix}")
    blocks = -(-columns // 4)
    row = torch.arange(rows, dtype=torch.int64)[:, None].expand(rows, blocks)
    block = torch.arange(blocks, dtype=torch.int64)[None, :].expand(rows, blocks)
    zero = torch.zeros_like(row)
    words = philox4x32((block, row, zero + matrix, zero), key_of(seed, name))
    u0, u1, u2, u3 = ((word.to(torch.float64) + 0.5) / 2.0**32 for word in words)
    radius0, radius1 = torch.sqrt(-2 * torch.log(u0)), torch.sqrt(-2 * torch.log(u2))
    angle0, angle1 = 2 * math.pi * u1, 2 * math.pi * u3
    z = torch.stack(
        (
            radius0 * torch.cos(angle0),
            radius0 * torch.sin(angle0),
            radius1 * torch.cos(angle1),
            radius1 * torch.sin(angle1),
        ),
        dim=-1,
    )
    return z.reshape(rows, 4 * blocks)[:, :columns].contiguous()
