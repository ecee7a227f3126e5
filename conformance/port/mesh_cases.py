"""Mesh cases as data: a mesh, a placement an axis, parameters of many shapes, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conformance.adapters import Capabilities
from conformance.vectors import VectorSet

SHAPES: tuple[tuple[int, int], ...] = (
    (13, 10),
    (13, 10),
    (13, 10),
    (10, 13),
    (9, 9),
    (1, 7),
    (7, 1),
    (16, 8),
    (8, 16),
)
"""Uneven on every axis, both orientations, fewer rows than ranks, more and fewer matrices than ranks."""
EVERY = tuple(range(len(SHAPES)))
COMPILED, ALSO_COMPILED = (0, 1, 2), (3, 5, 7)
"""Of SHAPES those of compiled runs, and those of which each case has one more, in turn.

Their time is that of compiling, a graph for each shape of each case.
"""
PARTIAL = "gradients:Partial"
TWO_DIMS, ONE_DIM = "shards:two-dims", "shards:one-dim"
"""FSDP2 x TP on two dims of a matrix, and both on one: few ports take either."""
MESH_FEATURES = (PARTIAL, TWO_DIMS, ONE_DIM)
STEPS = 3
RESUME_AFTER = 2


@dataclass(frozen=True)
class Layout:
    """A mesh and a placement an axis. S0, S1: Shard; R: Replicate; T0, T1: _StridedShard, as FSDP2 over TP makes it.

    P: Replicate, but the gradients there are `Partial("avg")`: each rank has one, and their average is the gradient.
    """

    mesh: tuple[int, ...]
    codes: tuple[str, ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        count = 1
        for size in self.mesh:
            count *= size
        return count

    @property
    def requires(self) -> tuple[str, ...]:
        """Features that a port has to claim for it."""
        dims = [
            code[1] for code, size in zip(self.codes, self.mesh, strict=True) if code[0] in "ST" and size > 1
        ]
        shards = ((TWO_DIMS,) if len(set(dims)) > 1 else (ONE_DIM,)) if len(dims) > 1 else ()
        return ((PARTIAL,) if "P" in self.codes else ()) + shards

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes."""
        return ("replicate", "shard", "tensor")[-len(self.mesh) :]

    def __str__(self) -> str:
        return "x".join(map(str, self.mesh)) + "-" + "".join(self.codes)


def layout(text: str) -> Layout:
    """ "2x2 S0 S1" as a Layout."""
    mesh, *codes = text.split()
    return Layout(tuple(int(size) for size in mesh.split("x")), tuple(codes))


LAYOUTS = tuple(
    layout(text)
    for text in (
        *("1 S0", "2 S0", "2 S1", "2 R", "3 S0", "4 S0", "4 S1", "4 R", "8 S0", "8 S1"),
        *("2x2 S0 S1", "2x2 S1 S0", "2x2 S0 S0", "2x2 R S0", "2x2 R S1", "2x2 T0 S0", "2x2 T1 S1"),
        *("2x4 S0 S1", "2x4 T0 S0", "4x2 R S0", "2x2x2 R S0 S1", "2x2x2 R T0 S0", "2x2x2 R S1 S0"),
        *("2 P", "2x2 P S0", "2x2 P S1", "2x2x2 P S0 S1"),
    )
)
"""One, two and three axes: FSDP2, HSDP, TP, FSDP2 x TP on two dims and on one, with HSDP too, averaged or not."""
LARGE = tuple(
    layout(text)
    for text in ("16 S0", "4x4 T0 S0", "64 S0", "64 S1", "8x8 S0 S1", "8x8 T0 S0", "4x4x4 R S0 S1")
)
"""Where there are as many ranks, as there are of threads."""
LARGEST = max(one.ranks for one in LARGE)
RESHARDINGS = tuple(
    (layout(before), layout(after))
    for before, after in (
        *(("1 S0", "1 S0"), ("2 S0", "2 S0"), ("2 S0", "2 S1"), ("4 S0", "2x2 S0 S1"), ("2x2 R S0", "4 S1")),
        *(("2x2 T0 S0", "4 S0"), ("4 S0", "2 S0"), ("8 S0", "2x2x2 R S0 S1"), ("2x2x2 R T0 S0", "2x4 S0 S1")),
    )
)
"""Save on one layout, resume on another."""


@dataclass(frozen=True)
class MeshCase:
    """One case of L3 (save on `layout`, resume on `resume`) or L4 (three steps on `layout`).

    Attributes:
        id: "L4/muon/dion/2x2-S0S1".
        hyper: all hyperparameters, as in the vectors.
        shapes: which of SHAPES the parameters have.
    """

    level: str
    algorithm: str
    dialect: str
    layout: Layout
    hyper: Mapping[str, Any]
    resume: Layout | None = None
    shapes: tuple[int, ...] = EVERY

    @property
    def id(self) -> str:
        """Stable id."""
        resumed = f"-to-{self.resume}" if self.resume else ""
        return f"{self.level}/{self.algorithm}/{self.dialect}/{self.layout}{resumed}"

    @property
    def ranks(self) -> int:
        """Ranks that it needs."""
        return max(self.layout.ranks, self.resume.ranks if self.resume else 1)

    @property
    def requires(self) -> tuple[str, ...]:
        """Features that a port has to claim for it."""
        return tuple(dict.fromkeys(self.layout.requires + (self.resume.requires if self.resume else ())))


def mesh_cases(
    hypers: Mapping[tuple[str, str], Mapping[str, Any]],
    levels: Sequence[str],
    compiled: bool = False,
    ranks: int = 1,
) -> Iterator[MeshCase]:
    """Every case of L3 and L4 for each (algorithm, dialect).

    Args:
        hypers: their hyperparameters.
        levels: of which.
        compiled: with fewer shapes.
        ranks: those of LARGE that need no more are among them.
    """
    fit = [*LAYOUTS, *(one for one in LARGE if one.ranks <= ranks)]
    every = [*(("L3", *both) for both in RESHARDINGS), *(("L4", one, None) for one in fit)]
    for first, ((algorithm, dialect), hyper) in enumerate(hypers.items()):
        for index, (level, before, after) in enumerate(every):
            if level not in levels:
                continue
            turn = (first + index) % len(ALSO_COMPILED)
            shapes = (*COMPILED, ALSO_COMPILED[turn]) if compiled else EVERY
            yield MeshCase(level, algorithm, dialect, before, hyper, after, shapes)


def main_dialect(port: Capabilities, algorithm: str, known: Sequence[str]) -> str | None:
    """The one convention on which a port's meshes are tried: the first that it claims; the mesh knows none."""
    claimed = port.algorithms.get(algorithm, ())
    if "*" in claimed:
        return known[0] if known else None
    return next((name for name in claimed if name in known), None)


def claimed_hypers(port: Capabilities, vectors: VectorSet) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(algorithm, dialect) and hyperparameters on which a port's meshes are tried: those of its first dialect."""
    found = {}
    for algorithm in port.algorithms:
        cases = [case for case in vectors if case.algorithm == algorithm and case.level == "L1"]
        dialect = main_dialect(port, algorithm, list(dict.fromkeys(case.dialect for case in cases)))
        if dialect is not None:
            first = next(case for case in cases if case.dialect == dialect and "cautious" not in case.flags)
            found[algorithm, dialect] = first.hyper
    return found
