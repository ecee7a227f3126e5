"""Philox4x32-10 and its normal values in plain integers and 50 digits."""

from __future__ import annotations

import struct
from hashlib import sha256

from mpmath import mp

from conformance.certify.output import Output
from conformance.certify.precise import Matrix, Real


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Salmon et al. (SC'11), with 64-bit products that Python does not wrap."""
    a, b, c, d = counter
    for turn in range(10):
        left, right = ((key[i] + turn * weyl) % 2**32 for i, weyl in enumerate((0x9E3779B9, 0xBB67AE85)))
        product_a, product_c = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            (product_c // 2**32) ^ b ^ left,
            product_c % 2**32,
            (product_a // 2**32) ^ d ^ right,
            product_a % 2**32,
        )
    return a, b, c, d


def key_of(seed: int, name: str) -> tuple[int, int]:
    """The two little-endian words at the head of SHA-256 of ``seed:name``."""
    first, second = struct.unpack_from("<2I", sha256(f"{seed}:{name}".encode()).digest())
    return first, second


def normals(rows: int, columns: int, seed: int, name: str, matrix: int) -> Output:
    """The first Q of a parameter, entry by entry.

    Radius ``sqrt(-2 ln u)`` and angle ``2 pi u'`` are each right to eps; an error of eps in the angle moves cosine and
    sine by ``angle * eps`` absolutely, however small they are.  Hence the bound ``radius (1 + angle)``.
    """
    key = key_of(seed, name)
    value: Matrix = []
    bound: Matrix = []
    for i in range(rows):
        entries: list[Real] = []
        bounds: list[Real] = []
        for block in range(-(-columns // 4)):
            u = [(2 * word + 1) / mp.mpf(2**33) for word in philox((block, i, matrix, 0), key)]
            for k in (0, 2):
                radius, angle = mp.sqrt(2 * mp.log(1 / u[k])), 2 * mp.pi * u[k + 1]
                entries += [radius * mp.cos(angle), radius * mp.sin(angle)]
                bounds += [radius * (1 + angle)] * 2
        value.append(entries[:columns])
        bound.append(bounds[:columns])
    return Output("normals", value, bound)
