"""Parameter <-> logical matrices: what is orthonormalized as one, by the whole parameter's shape.

A split is written as plain text in a param group, so that it goes through any checkpoint: ``"rows(768, 256, 256)"``,
``"columns(768, 768, 768)"``, ``"heads(12)"``, ``"interleaved_rows((3, 1, 1), 4)"``, ``"experts"``, ``"flatten"``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "ROW_BLOCKS",
    "SPLITS",
    "Columns",
    "Experts",
    "Flatten",
    "Heads",
    "InterleavedRows",
    "Piece",
    "Rows",
    "Split",
    "by_rows",
    "each_piece",
    "parse_split",
]


@dataclass(frozen=True)
class Piece:
    """``count`` logical matrices of one shape ``[m, n]``; ``first`` is the number of the first in the parameter."""

    count: int
    m: int
    n: int
    first: int


class Split(Protocol):
    """How a parameter is cut into logical matrices."""

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """The pieces of a parameter of ``shape``.

        Raises:
            ValueError: the shape does not fit.
        """

    def split(self, stack: Tensor) -> list[Tensor]:
        """``[k, *shape]`` to one stack ``[k * count, m, n]`` a piece; a last dim of size one stays so."""

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse, ``[k, *shape]``; ``shape`` may have one for the last dim."""


def _need(split: object, shape: Sequence[int], fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"split={str(split)!r} needs {what}, not the shape {list(shape)}")


@dataclass(frozen=True)
class Rows:
    """Blocks of rows, one below the other: a fused QKV with any sizes, gate and up."""

    sizes: tuple[int, ...]

    def __init__(self, *sizes: int) -> None:
        object.__setattr__(self, "sizes", tuple(int(size) for size in sizes))
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"the sizes of a split by rows must be positive, not {self.sizes}")

    def __str__(self) -> str:
        return f"rows({', '.join(map(str, self.sizes))})"

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """One matrix a block."""
        fits = len(shape) == 2 and shape[0] == sum(self.sizes)
        _need(self, shape, fits, f"a matrix of {sum(self.sizes)} rows")
        return tuple(Piece(1, size, shape[1], index) for index, size in enumerate(self.sizes))

    def split(self, stack: Tensor) -> list[Tensor]:
        """Views."""
        return list(torch.split(stack, list(self.sizes), dim=1))

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The blocks below one another again."""
        return torch.cat(list(stacks), dim=1)


@dataclass(frozen=True)
class Columns:
    """Blocks of columns of a weight stored as ``[in, out]``, each transposed to the logical ``[block, in]``.

    What ``Conv1D`` of Hugging Face's GPT-2 stores; one block of all columns for a weight that is not fused.
    """

    sizes: tuple[int, ...]

    def __init__(self, *sizes: int) -> None:
        object.__setattr__(self, "sizes", Rows(*sizes).sizes)

    def __str__(self) -> str:
        return f"columns({', '.join(map(str, self.sizes))})"

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """One matrix a block."""
        fits = len(shape) == 2 and shape[1] == sum(self.sizes)
        _need(self, shape, fits, f"a matrix of {sum(self.sizes)} columns")
        return tuple(Piece(1, size, shape[0], index) for index, size in enumerate(self.sizes))

    def split(self, stack: Tensor) -> list[Tensor]:
        """Views; what has a number a logical row comes as a column already."""
        rows = stack if self._a_number_a_row(stack.shape[1:]) else stack.mT
        return list(torch.split(rows, list(self.sizes), dim=1))

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The blocks beside one another again."""
        rows = torch.cat(list(stacks), dim=1)
        return rows if self._a_number_a_row(shape) else rows.mT.contiguous()

    def _a_number_a_row(self, shape: Sequence[int]) -> bool:
        return tuple(shape) == (sum(self.sizes), 1)


@dataclass(frozen=True)
class Heads:
    """``count`` blocks of equal size, each a logical matrix."""

    count: int

    def __str__(self) -> str:
        return f"heads({self.count})"

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """One stack of all heads."""
        fits = len(shape) == 2 and self.count > 0 and shape[0] % self.count == 0
        _need(self, shape, fits, f"a matrix whose rows divide by {self.count}")
        return (Piece(self.count, shape[0] // self.count, shape[1], 0),)

    def split(self, stack: Tensor) -> list[Tensor]:
        """A view if the stack is contiguous."""
        return [stack.reshape(len(stack) * self.count, stack.shape[1] // self.count, stack.shape[2])]

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The heads below one another again."""
        (heads,) = stacks
        return heads.reshape(len(heads) // self.count, heads.shape[1] * self.count, heads.shape[2])


@dataclass(frozen=True)
class InterleavedRows:
    """Rows that come in ``groups``, each with a block of every size: a fused QKV by key-value head.

    Attributes:
        sizes: rows of each kind in a group.
        groups: how many groups.
        stacked: each block a matrix of its own; otherwise the blocks of a kind together are one matrix.
    """

    sizes: tuple[int, ...]
    groups: int
    stacked: bool = False

    def __str__(self) -> str:
        tail = ", True" if self.stacked else ""
        return f"interleaved_rows(({', '.join(map(str, self.sizes))},), {self.groups}{tail})"

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """One matrix, or one stack, a kind."""
        rows = self.groups * sum(self.sizes)
        _need(self, shape, len(shape) == 2 and shape[0] == rows, f"a matrix of {rows} rows")
        count = self.groups if self.stacked else 1
        height = 1 if self.stacked else self.groups
        return tuple(
            Piece(count, size * height, shape[1], index * count) for index, size in enumerate(self.sizes)
        )

    def split(self, stack: Tensor) -> list[Tensor]:
        """Copies where the blocks of a kind are one matrix."""
        grouped = stack.reshape(len(stack), self.groups, -1, stack.shape[2])
        blocks = torch.split(grouped, list(self.sizes), dim=2)
        return [block.flatten(0, 1) if self.stacked else block.flatten(1, 2) for block in blocks]

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The rows interleaved again."""
        count = len(stacks[0]) // self.groups if self.stacked else len(stacks[0])
        blocks = [stack.reshape(count, self.groups, -1, stack.shape[2]) for stack in stacks]
        return torch.cat(blocks, dim=2).flatten(1, 2)


@dataclass(frozen=True)
class Experts:
    """A weight ``[E, m, n]`` as E logical matrices."""

    def __str__(self) -> str:
        return "experts"

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """One stack."""
        _need(self, shape, len(shape) == 3, "three dims [experts, m, n]")
        return (Piece(shape[0], shape[1], shape[2], 0),)

    def split(self, stack: Tensor) -> list[Tensor]:
        """A view."""
        return [stack.flatten(0, 1)]

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """A view."""
        return stacks[0].reshape(len(stacks[0]) // shape[0], *shape)


@dataclass(frozen=True)
class Flatten:
    """A convolution ``[out, in, ...]`` as the one matrix ``[out, in * ...]``."""

    def __str__(self) -> str:
        return "flatten"

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """One matrix."""
        _need(self, shape, len(shape) in (3, 4, 5), "three to five dims [out, in, ...]")
        columns = 1
        for size in shape[1:]:
            columns *= size
        return (Piece(1, shape[0], columns, 0),)

    def split(self, stack: Tensor) -> list[Tensor]:
        """A view if the stack is contiguous."""
        return [stack.flatten(2)]

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The dims of the kernel again."""
        return stacks[0].reshape(len(stacks[0]), *shape)


ROW_BLOCKS: tuple[type[Split], ...] = (Rows, Columns, Heads, InterleavedRows)
"""Splits into blocks of rows, or of a transposed parameter's."""
SPLITS: tuple[type[Split], ...] = (*ROW_BLOCKS, Experts, Flatten)
KINDS = {"rows": Rows, "columns": Columns, "heads": Heads, "interleaved_rows": InterleavedRows}


def parse_split(split: Split | str | Sequence[int] | None) -> Split | None:
    """A split from its text, a sequence of rows' sizes, or a split itself.

    Raises:
        ValueError: neither.
    """
    if split is None or isinstance(split, SPLITS):
        return split
    if not isinstance(split, str):
        return Rows(*split)  # type: ignore[misc]
    if split in ("experts", "flatten"):
        return Experts() if split == "experts" else Flatten()
    match = re.fullmatch(r"(\w+)\((.*)\)", split)
    if match and match[1] in KINDS:
        try:
            arguments = ast.literal_eval(f"({match[2]},)")
            made: Split = KINDS[match[1]](*arguments)
        except (SyntaxError, TypeError, ValueError) as error:
            raise ValueError(f"split={split!r} cannot be read: {error}") from error
        return made
    raise ValueError(
        f"split={split!r} is unknown; write rows(q, k, v), columns(q, k, v), heads(count), "
        "interleaved_rows((q, k, v), groups), experts or flatten"
    )


def by_rows(split: Split) -> tuple[bool, Split]:
    """Whether a split into blocks is one of columns, and the same as one of (the transposed parameter's) rows."""
    return (True, Rows(*split.sizes)) if isinstance(split, Columns) else (False, split)


def each_piece(function: Callable[..., Any], split: Split | None) -> Callable[..., Any]:
    """``function`` of stacks of logical matrices, as one of stacks of whole parameters that ``split`` cuts.

    Args:
        function: of stacks ``[k, m, n]`` (and ``[k, m, 1]``), to a stack of the shape of the first, or to a tuple of
            which each has the shape of the argument in its place.
        split: of the parameters; None leaves ``function`` as it is.
    """
    if split is None:
        return function

    def joined(*stacks: Tensor) -> Any:
        # Contiguous, so that sums run in the same order as on one device.
        cut = zip(*([piece.contiguous() for piece in split.split(stack)] for stack in stacks), strict=True)
        made = [function(*pieces) for pieces in cut]
        if isinstance(made[0], Tensor):
            return split.merge(made, stacks[0].shape[1:])
        return tuple(
            split.merge(list(results), stack.shape[1:])
            for results, stack in zip(zip(*made, strict=True), stacks, strict=True)
        )

    return joined
