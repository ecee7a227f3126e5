"""Meshes: the shape of the running one, and the larger ones that are simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """A device mesh by its axes. An axis "dp" replicates (HSDP), "fsdp" shards, "tp" is tensor-parallel."""

    axes: tuple[tuple[str, int], ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        count = 1
        for _, size in self.axes:
            count *= size
        return count

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of each axis."""
        return tuple(size for _, size in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each axis."""
        return tuple(name for name, _ in self.axes)

    @property
    def label(self) -> str:
        """In words: `2x2 fsdp,tp`."""
        return f"{'x'.join(map(str, self.sizes))} {','.join(self.names)}"


SIMULATED: Mapping[str, Mesh] = {
    "2x32": Mesh((("fsdp", 2), ("tp", 32))),
    "8x8": Mesh((("fsdp", 8), ("tp", 8))),
    "hsdp-4x8": Mesh((("dp", 4), ("fsdp", 8))),
    "4x4x4": Mesh((("dp", 4), ("fsdp", 4), ("tp", 4))),
}
"""By name: the meshes of which one process plays all ranks."""


def mesh_for(ranks: int, heads: int) -> Mesh:
    """The FSDP×TP mesh of the main job on `ranks` ranks: an even count gets a "tp" axis of two.

    Raises:
        ValueError: no ranks.
    """
    if ranks < 1:
        raise ValueError(f"a mesh needs at least one rank, not {ranks}")
    tensor = 2 if ranks % 2 == 0 and heads % 2 == 0 else 1
    return Mesh((("fsdp", ranks // tensor), ("tp", tensor)))
