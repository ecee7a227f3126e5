"""From a parameter to its logical matrices and back: what is orthonormalized as one.

A split turns a parameter into pieces, each a matrix ``[m, n]`` or a stack ``[N, m, n]``; every matrix in it is
a logical matrix with its own shape for scale, rank and selection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from dion_ref.hyper import flag, integer
from dion_ref.precision import Precision


class Split(Protocol):
    """What ``init`` and ``step`` need of a split."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The pieces, each ``[m, n]`` or ``[N, m, n]``; may be views of ``tensor``."""
        ...

    def merge(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of ``split``: a new tensor of ``shape``."""
        ...


def _need_dims(split: object, tensor: Tensor, allowed: tuple[int, ...]) -> None:
    if tensor.ndim not in allowed:
        raise ValueError(
            f"{split} needs a tensor of {' or '.join(map(str, allowed))} dims, got {list(tensor.shape)}"
        )


def _need_pieces(split: object, pieces: Sequence[Tensor], count: int) -> None:
    if len(pieces) != count:
        raise ValueError(f"{split} merges {count} pieces, got {len(pieces)}")


def _counts(split: object, field: str, values: Any) -> tuple[int, ...]:
    """The values as ints, if they are positive integers (NumPy's too)."""
    name = f"{type(split).__name__}.{field}"
    try:
        counts = tuple(values)
    except TypeError:
        raise TypeError(
            f"{name} must be a sequence of positive integers such as (4, 2, 2), one a block, got {values!r}"
        ) from None
    if not counts or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in counts):
        raise ValueError(f"{name} must be positive integers, got {counts!r}")
    return tuple(int(n) for n in counts)


def _need_split(split: Any) -> None:
    if isinstance(split, Mapping):
        raise TypeError(
            "split must be a split such as Rows((4, 2, 2)), got a mapping; if it is that of a test vector, "
            f"conformance.adapters.oracle.make_split turns it into one: {split!r}"
        )
    # a class has both functions too, but no sizes
    if isinstance(split, type) or not all(callable(getattr(split, n, None)) for n in ("split", "merge")):
        raise TypeError(
            "split must be an instance of Rows, Columns, Heads, InterleavedRows, InterleavedColumns, Experts or "
            f"Flatten, such as Rows((4, 2, 2)) for blocks of 4, 2 and 2 rows, or None; got {split!r}"
        )


@dataclass(frozen=True)
class Rows:
    """Row blocks of a fused matrix, such as QKV or gate-up, each a logical matrix.

    ``[sum(sizes), n]`` -> one ``[size, n]`` a block; a stack ``[N, sum(sizes), n]`` -> stacks.

    Raises:
        TypeError: sizes that are no sequence.
        ValueError: sizes that are no positive integers, or don't add up to the rows.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", _counts(self, "sizes", self.sizes))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One piece a block, in order."""
        _need_dims(self, tensor, (2, 3))
        if tensor.shape[-2] != sum(self.sizes):
            raise ValueError(f"{self} needs {sum(self.sizes)} rows, got {list(tensor.shape)}")
        return torch.split(tensor, list(self.sizes), dim=-2)

    def merge(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Stack the blocks again."""
        _need_pieces(self, pieces, len(self.sizes))
        return torch.cat(tuple(pieces), dim=-2).reshape(tuple(shape))


@dataclass(frozen=True)
class Columns:
    """Column blocks of a weight stored as ``[in, out]``, as GPT-2's Conv1D of Hugging Face is; transposed each.

    ``[n, sum(sizes)]`` -> one ``[size, n]`` a block.

    Raises:
        TypeError: sizes that are no sequence.
        ValueError: sizes that are no positive integers, or don't add up to the columns.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", _counts(self, "sizes", self.sizes))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One piece a block, in order."""
        _need_dims(self, tensor, (2,))
        if tensor.shape[1] != sum(self.sizes):
            raise ValueError(f"{self} needs {sum(self.sizes)} columns, got {list(tensor.shape)}")
        return torch.split(tensor.mT, list(self.sizes))

    def merge(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Put the blocks beside one another again."""
        _need_pieces(self, pieces, len(self.sizes))
        return torch.cat(tuple(pieces)).mT.clone().reshape(tuple(shape))


@dataclass(frozen=True)
class Heads:
    """Rows cut into equal blocks, one a head: ``[m, n]`` -> one stack ``[count, m / count, n]``.

    Raises:
        ValueError: ``count`` is no positive integer, or doesn't divide the rows.
    """

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", _counts(self, "count", (self.count,))[0])

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One stack of all heads."""
        _need_dims(self, tensor, (2,))
        if tensor.shape[0] % self.count:
            raise ValueError(f"{self} needs rows divisible by {self.count}, got {list(tensor.shape)}")
        return (tensor.reshape(self.count, -1, tensor.shape[1]),)

    def merge(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Lay the heads' rows below one another again."""
        _need_pieces(self, pieces, 1)
        return pieces[0].clone().reshape(tuple(shape))


@dataclass(frozen=True)
class InterleavedRows:
    """Rows laid out ``[groups, sum(sizes)]``: grouped-query attention stores (q.., k, v) of one group after another.

    ``[groups * sum(sizes), n]`` -> for each size the rows of all groups: one matrix ``[groups * size, n]``, or
    with ``stacked`` one stack ``[groups, size, n]`` in which each group is a logical matrix of its own.

    Raises:
        TypeError: sizes that are no sequence, or ``stacked`` no bool.
        ValueError: sizes or groups that are no positive integers; the sizes of all groups don't add up to the rows.
    """

    sizes: tuple[int, ...]
    groups: int
    stacked: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", _counts(self, "sizes", self.sizes))
        object.__setattr__(self, "groups", _counts(self, "groups", (self.groups,))[0])
        flag("InterleavedRows.stacked", self.stacked)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One piece a size, in order."""
        _need_dims(self, tensor, (2,))
        rows, columns = tensor.shape
        if rows != self.groups * sum(self.sizes):
            raise ValueError(f"{self} needs {self.groups * sum(self.sizes)} rows, got {list(tensor.shape)}")
        stacks = torch.split(tensor.reshape(self.groups, -1, columns), list(self.sizes), dim=1)
        return stacks if self.stacked else tuple(stack.reshape(-1, columns) for stack in stacks)

    def merge(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Interleave the groups' rows again."""
        _need_pieces(self, pieces, len(self.sizes))
        columns = pieces[0].shape[-1]
        return torch.cat([piece.reshape(self.groups, -1, columns) for piece in pieces], dim=1).reshape(
            tuple(shape)
        )


@dataclass(frozen=True)
class InterleavedColumns:
    """:class:`InterleavedRows` of a weight stored as ``[in, out]``, as the gate and up of gpt-oss's experts are.

    Raises:
        TypeError: as InterleavedRows.
        ValueError: as InterleavedRows, of the columns.
    """

    sizes: tuple[int, ...]
    groups: int
    stacked: bool = False

    def __post_init__(self) -> None:
        rows = self._rows()
        object.__setattr__(self, "sizes", rows.sizes)
        object.__setattr__(self, "groups", rows.groups)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One piece a size, in order."""
        _need_dims(self, tensor, (2,))
        if tensor.shape[1] != self.groups * sum(self.sizes):
            raise ValueError(
                f"{self} needs {self.groups * sum(self.sizes)} columns, got {list(tensor.shape)}"
            )
        return self._rows().split(tensor.mT)

    def merge(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Interleave the groups' columns again."""
        m, n = shape
        return self._rows().merge(pieces, (n, m)).mT.clone()

    def _rows(self) -> InterleavedRows:
        return InterleavedRows(self.sizes, self.groups, self.stacked)


@dataclass(frozen=True, repr=False)
class _Cut:
    """Matrices that the split ``inner`` cuts in turn, if there is one."""

    inner: Split | None = None

    def __post_init__(self) -> None:
        if self.inner is not None:
            _need_split(self.inner)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.inner is None else repr(self.inner)})"


@dataclass(frozen=True, repr=False)
class Experts(_Cut):
    """A 3-D weight ``[E, m, n]`` as a stack of E matrices, each a logical one or cut by ``inner``.

    With ``inner``, such as ``Rows((I, I))`` for a fused gate and up, there is a stack for each of its pieces: of the
    first of every expert, then of the second of every expert.

    Raises:
        TypeError: ``inner`` is neither a split nor None.
    """

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensor itself, a stack, or a stack a piece."""
        _need_dims(self, tensor, (3,))
        if self.inner is None:
            return (tensor,)
        of_experts = [self.inner.split(expert) for expert in tensor]
        return tuple(
            torch.stack(same) if same[0].ndim == 2 else torch.cat(same)
            for same in zip(*of_experts, strict=True)
        )

    def merge(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The experts, whole again, in a new stack."""
        if self.inner is None:
            _need_pieces(self, pieces, 1)
            return pieces[0].clone().reshape(tuple(shape))
        E, *one = shape
        of_experts = zip(*(self._per_expert(piece, E) for piece in pieces), strict=True)
        return torch.stack([self.inner.merge(expert, one) for expert in of_experts])

    @staticmethod
    def _per_expert(piece: Tensor, E: int) -> list[Tensor]:
        return list(piece) if len(piece) == E else list(piece.reshape(E, -1, *piece.shape[1:]))


@dataclass(frozen=True, repr=False)
class Flatten(_Cut):
    """A convolution ``[out, in, kh, kw]`` (or of 1 or 3 spatial dims) as the matrix ``[out, in * kh * kw]``.

    With ``inner`` that matrix is cut into blocks: ``Heads(groups)`` for one of several groups, whose outputs see
    inputs of their own, ``Rows((q, k, v))`` for a fused QKV of kernel size one.

    Raises:
        TypeError: ``inner`` is neither a split nor None.
    """

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One matrix, or its blocks."""
        _need_dims(self, tensor, (3, 4, 5))
        matrix = tensor.flatten(1)
        return (matrix,) if self.inner is None else self.inner.split(matrix)

    def merge(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The convolution's shape again."""
        if self.inner is not None:
            out, *kernel = shape
            return self.inner.merge(pieces, (out, prod(kernel))).reshape(tuple(shape))
        _need_pieces(self, pieces, 1)
        return pieces[0].clone().reshape(tuple(shape))


def each_matrix(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply a function of matrices to matrices, or one by one to the matrices of stacks.

    Args:
        function: takes one ``[m, n]`` for each of ``tensors``, returns a tuple of tensors.
        tensors: all 2-D, or all 3-D with one leading size.

    Returns:
        What ``function`` returns, stacked if the input was.
    """
    if tensors[0].ndim == 2:
        return function(*tensors)
    results = [function(*matrices) for matrices in zip(*tensors, strict=True)]
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def init_pieces(init: Callable[..., Any], param: Tensor, split: Split, first_matrix: int) -> tuple[Any, ...]:
    """Initial states of a split parameter, one a piece; matrices are counted on from piece to piece.

    Args:
        init: takes ``(piece, first_matrix)``.
        param: the whole parameter.
        split: how it is cut.
        first_matrix: running index of the first logical matrix.

    Raises:
        TypeError: ``split`` is no split, ``param`` no tensor or ``first_matrix`` no integer.
        ValueError: a split that doesn't fit, or a negative ``first_matrix``.
    """
    _need_split(split)
    first_matrix = integer("first_matrix", first_matrix, low=0)
    if not isinstance(param, Tensor):
        raise TypeError(f"param must be a torch.Tensor, got {type(param).__name__}")
    states = []
    for piece in split.split(param):
        states.append(init(piece, first_matrix))
        first_matrix += piece.shape[0] if piece.ndim == 3 else 1
    return tuple(states)


def step_pieces(
    step: Callable[..., tuple[Tensor, Any]],
    param: Tensor,
    grad: Tensor,
    states: Any,
    hyper: Any,
    split: Split,
    precision: Precision,
) -> tuple[Tensor, tuple[Any, ...]]:
    """Step every piece of a split parameter by itself.

    Args:
        step: the algorithm's.
        param, grad: whole tensors of one shape.
        states: a tuple of states, one a piece.
        hyper, split, precision: as given to ``step``.

    Raises:
        TypeError: ``split`` is no split, ``param`` or ``grad`` no tensor, or ``states`` no tuple.
        ValueError: another number of states than pieces, or ``grad`` of another shape.
    """
    _need_split(split)
    for name, value in (("param", param), ("grad", grad)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if tuple(grad.shape) != tuple(param.shape):
        raise ValueError(f"grad must have shape {list(param.shape)}, got {list(grad.shape)}")
    if not isinstance(states, tuple):
        raise TypeError(f"with a split, state must be a tuple of states, got {type(states).__name__}")
    params, grads = split.split(param), split.split(grad)
    if len(states) != len(params):
        raise ValueError(f"{split} makes {len(params)} pieces, got {len(states)} states")
    results = [
        step(piece, piece_grad, state, hyper, precision=precision)
        for piece, piece_grad, state in zip(params, grads, states, strict=True)
    ]
    return split.merge([piece for piece, _ in results], param.shape), tuple(state for _, state in results)
