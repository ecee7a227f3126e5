"""Parameter <-> logical matrices: what is orthonormalized as one, by the whole parameter's shape."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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
    "InterleavedColumns",
    "InterleavedRows",
    "Piece",
    "Rows",
    "Split",
    "by_rows",
    "each_piece",
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
        hint = ""
        if isinstance(split, ROW_BLOCKS) and len(shape) == 3:
            hint = f"; the matrices of a stack are cut by 'experts({split})'"
        if isinstance(split, OF_OUTPUTS) and 3 <= len(shape) <= 5:
            hint += f"; a convolution is cut by 'flatten({split})'"
        raise ValueError(f"split={str(split)!r} needs {what}, not the shape {list(shape)}{hint}")


def _positive(split: str, **values: Any) -> None:
    for name, value in values.items():
        numbers = value if name == "sizes" else (value,)
        fits = isinstance(numbers, tuple) and len(numbers) > 0
        if not fits or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise ValueError(f"{split} needs positive integers for {name}, not {value!r}")


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
class Heads:
    """``count`` blocks of equal size, each a logical matrix."""

    count: int

    def __post_init__(self) -> None:
        _positive("heads", count=self.count)

    def __str__(self) -> str:
        return f"heads({self.count})"

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """One stack of all heads."""
        fits = len(shape) == 2 and shape[0] % self.count == 0
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

    def __post_init__(self) -> None:
        _positive("interleaved_rows", sizes=self.sizes, groups=self.groups)

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
        grouped = stack.reshape(len(stack), self.groups, sum(self.sizes), stack.shape[2])
        blocks = torch.split(grouped, list(self.sizes), dim=2)
        return [block.flatten(0, 1) if self.stacked else block.flatten(1, 2) for block in blocks]

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The rows interleaved again."""
        count = len(stacks[0]) // self.groups if self.stacked else len(stacks[0])
        pairs = zip(stacks, self.sizes, strict=True)
        blocks = [stack.reshape(count, self.groups, size, stack.shape[2]) for stack, size in pairs]
        return torch.cat(blocks, dim=2).flatten(1, 2)


class _Across(ABC):
    """Blocks of columns of a weight stored as ``[in, out]``: those of rows of its transpose."""

    @property
    @abstractmethod
    def rows(self) -> Split:
        """The same of the transpose."""

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """Those of the transpose."""
        fits = len(shape) == 2 and shape[1] == self._total
        _need(self, shape, fits, f"a matrix of {self._total} columns")
        return self.rows.pieces((shape[1], shape[0]))

    def split(self, stack: Tensor) -> list[Tensor]:
        """Those of the transpose; what has a number a logical row comes as a column already."""
        return self.rows.split(stack if self._a_number_a_row(stack.shape[1:]) else stack.mT)

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The blocks beside one another again."""
        number = self._a_number_a_row(shape)
        rows = self.rows.merge(stacks, shape if number else (shape[1], shape[0]))
        return rows if number else rows.mT.contiguous()

    @property
    @abstractmethod
    def _total(self) -> int:
        """Columns of the weight."""

    def _a_number_a_row(self, shape: Sequence[int]) -> bool:
        return tuple(shape) == (self._total, 1)


@dataclass(frozen=True)
class Columns(_Across):
    """Blocks of columns of a weight stored as ``[in, out]``, each transposed to the logical ``[block, in]``.

    What ``Conv1D`` of Hugging Face's GPT-2 stores; one block of all columns for a weight that is not fused.
    """

    sizes: tuple[int, ...]

    def __init__(self, *sizes: int) -> None:
        object.__setattr__(self, "sizes", Rows(*sizes).sizes)

    def __str__(self) -> str:
        return f"columns({', '.join(map(str, self.sizes))})"

    @property
    def rows(self) -> Split:
        """Blocks of rows of the same sizes."""
        return Rows(*self.sizes)

    @property
    def _total(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class InterleavedColumns(_Across):
    """:class:`InterleavedRows` of a weight stored as ``[in, out]``: gpt-oss's gate and up, column by column."""

    sizes: tuple[int, ...]
    groups: int
    stacked: bool = False

    def __post_init__(self) -> None:
        _positive("interleaved_columns", sizes=self.sizes, groups=self.groups)

    def __str__(self) -> str:
        return str(self.rows).replace("rows", "columns", 1)

    @property
    def rows(self) -> Split:
        """Interleaved rows of the same sizes."""
        return InterleavedRows(self.sizes, self.groups, self.stacked)

    @property
    def _total(self) -> int:
        return sum(self.sizes) * self.groups


@dataclass(frozen=True)
class Experts:
    """A weight ``[E, m, n]`` as E matrices, each a logical one or cut in turn.

    Attributes:
        inner: how each is cut, a split into blocks: ``Rows(I, I)`` for a fused gate and up; None for not at all.
    """

    inner: Split | None = None

    def __str__(self) -> str:
        return "experts" if self.inner is None else f"experts({self.inner})"

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """A stack of all experts, or of each of their pieces."""
        _need(self, shape, len(shape) == 3, "three dims [experts, m, n]")
        count, m, n = shape
        if self.inner is None:
            return (Piece(count, m, n, 0),)
        return tuple(Piece(count * p.count, p.m, p.n, count * p.first) for p in self.inner.pieces((m, n)))

    def split(self, stack: Tensor) -> list[Tensor]:
        """A view, unless the experts are cut."""
        experts = stack.flatten(0, 1)
        return [experts] if self.inner is None else self.inner.split(experts)

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse; a view, unless the experts are cut."""
        experts = stacks[0] if self.inner is None else self.inner.merge(stacks, shape[1:])
        return experts.reshape(len(experts) // shape[0], *shape)


@dataclass(frozen=True)
class Flatten:
    """A convolution ``[out, in, ...]`` as the matrix ``[out, in * ...]``, one logical matrix or cut in turn.

    Attributes:
        inner: how it is cut, a split into blocks of rows: ``Heads(groups)`` for one of several groups,
            ``Rows(q, k, v)`` for a fused QKV of kernel size one; None for not at all.
    """

    inner: Split | None = None

    def __post_init__(self) -> None:
        if self.inner == Heads(1):  # the whole matrix
            object.__setattr__(self, "inner", None)
        if self.inner is not None and not isinstance(self.inner, SPLITS):
            raise TypeError(f"Flatten takes a split such as Heads(4), not {self.inner!r}")
        if self.inner is not None and not isinstance(self.inner, OF_OUTPUTS):
            raise ValueError(f"flatten({self.inner}): a convolution is cut into blocks of rows")

    def __str__(self) -> str:
        return "flatten" if self.inner is None else f"flatten({self.inner})"

    def pieces(self, shape: Sequence[int]) -> tuple[Piece, ...]:
        """One matrix, or its blocks."""
        _need(self, shape, len(shape) in (3, 4, 5), "three to five dims [out, in, ...]")
        m, n = self.matrix(shape)
        return (Piece(1, m, n, 0),) if self.inner is None else self.inner.pieces((m, n))

    def split(self, stack: Tensor) -> list[Tensor]:
        """A view if the stack is contiguous, unless the matrix is cut."""
        matrices = stack.flatten(2)
        return [matrices] if self.inner is None else self.inner.split(matrices)

    def merge(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The dims of the kernel again."""
        matrices = stacks[0] if self.inner is None else self.inner.merge(stacks, self.matrix(shape))
        return matrices.reshape(len(matrices), *shape)

    @staticmethod
    def matrix(shape: Sequence[int]) -> tuple[int, int]:
        """The shape of the matrix."""
        return shape[0], math.prod(shape[1:])


ROW_BLOCKS: tuple[type[Split], ...] = (Rows, Columns, Heads, InterleavedRows, InterleavedColumns)
"""Splits into blocks of rows, or of a transposed parameter's."""
OF_OUTPUTS: tuple[type[Split], ...] = (Rows, Heads, InterleavedRows)
SPLITS: tuple[type[Split], ...] = (*ROW_BLOCKS, Experts, Flatten)


def by_rows(split: Split) -> tuple[bool, Split]:
    """Whether a split into blocks is one of columns, and the same as one of (the transposed parameter's) rows."""
    return (True, split.rows) if isinstance(split, _Across) else (False, split)


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
