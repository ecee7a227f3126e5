"""Dion on logical matrices that are blocks of one parameter's rows, where shards may cut the blocks.

The parameter stays as it lies.  What travels is as long as one side of a matrix and as wide as its rank: factors along
the rows lie as the parameter's rows do, those along the columns are summed over the ranks that hold rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from dion_dtensor import placements as algebra
from dion_dtensor.assembly import (
    across,
    from_local,
    is_pending,
    local_of,
    norm,
    placed,
    reduced,
    whole_dim,
)
from dion_dtensor.matrices import Split, by_rows
from dion_dtensor.orthonormalize import orthonormal_basis
from dion_dtensor.spans import Span, index_of, spans
from dion_dtensor.whole_matrices import on_whole_matrices

__all__ = ["on_blocks"]

Outer = Callable[[Tensor, Tensor, torch.dtype], Tensor]


def on_blocks(
    momentum: Tensor, factors: Sequence[Tensor], hyper: Any, split: Split, outer: Outer
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One step of parameters ``[N, height, n]`` whose blocks of rows are logical matrices.

    Args:
        momentum: the gradient included, a tensor or a DTensor; averages may be pending.
        factors: Q of each block, ``[N, min(m, n), r]``, whole on every rank.
        hyper: Dion's.
        split: into blocks of rows, each one matrix, or of columns of what ``momentum`` is the transpose of.
        outer: ``(P, Q, dtype) -> P Q^T``, rounded as the rule rounds it.

    Returns:
        The direction, the new momentum, both as ``momentum`` lies, and the new factors.
    """

    def whole(momentum: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        direction, kept, new = _on_blocks(momentum, factors, hyper, split, outer)
        return direction, kept, *new

    if hyper.path == "assemble" and not is_pending(momentum):
        likes = (0, 0, *range(1, len(factors) + 1))
        direction, kept, *new = on_whole_matrices(whole, momentum, *factors, likes=likes)
        return direction, kept, new
    return _on_blocks(momentum, factors, hyper, split, outer)


def _on_blocks(
    momentum: Tensor, factors: Sequence[Tensor], hyper: Any, split: Split, outer: Outer
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Where the parameters lie."""
    dtype, X = momentum.dtype, local_of(momentum)
    Qs = [local_of(Q).to(dtype) for Q in factors]
    shapes = [(piece.m, piece.n) for piece in by_rows(split)[1].pieces(momentum.shape[1:])]
    found = spans(*_mesh_of(momentum), str(split), (momentum.shape[1], momentum.shape[2]))
    direction, kept = torch.zeros_like(X), X.clone()
    # Blocks of one rank and one side for P go together.
    kinds = [(m >= n, Q.shape[-1]) for (m, n), Q in zip(shapes, Qs, strict=True)]
    for kind in dict.fromkeys(kinds):
        which = [index for index, own in enumerate(kinds) if own == kind]
        blocks = _Blocks(momentum, [found[index] for index in which])
        tall, _ = kind
        new = _stepped(blocks, [Qs[index] for index in which], tall, hyper, outer, direction, kept)
        for index, Q in zip(which, new, strict=True):
            Qs[index] = Q
    if not isinstance(momentum, DTensor):
        return direction, kept, Qs
    mesh, alone = momentum.device_mesh, algebra.of_only(momentum.placements, (0,))
    whole: list[Tensor] = [
        from_local(Q, mesh, alone, tuple(old.shape)) for Q, old in zip(Qs, factors, strict=True)
    ]
    shape, lies = tuple(momentum.shape), momentum.placements
    direction = from_local(direction, mesh, algebra.of_reduced(lies), shape)
    return direction, from_local(kept, mesh, lies, shape), whole


def _stepped(
    blocks: _Blocks,
    Qs: list[Tensor],
    tall: bool,
    hyper: Any,
    outer: Outer,
    direction: Tensor,
    kept: Tensor,
) -> list[Tensor]:
    """Write the rows of some matrices into ``direction`` and ``kept``; returns their new factors."""
    rows, columns = _AlongRows(blocks), _AlongColumns(blocks)
    of_P, of_Q = (rows, columns) if tall else (columns, rows)
    old = of_Q.own(Qs)
    lengths = torch.stack([torch.linalg.vector_norm(Q, dim=-2, dtype=torch.float64) for Q in Qs], 1)
    lengths = lengths.to(old[0].dtype)
    P = of_P.basis(of_P.products(old), lengths * blocks.sizes())
    R = reduced(of_Q.products(of_P.parts(P)))

    def pairs(P: Sequence[Tensor], Q: Sequence[Tensor]) -> list[Tensor]:
        along = zip(P, Q, strict=True) if tall else zip(Q, P, strict=True)
        return [outer(F, C, hyper.compute_dtype) for F, C in along]

    for here, feedback in zip(blocks.here, pairs(of_P.parts(P), of_Q.parts(R)), strict=True):
        kept[:, here] -= (1 - hyper.mu) * feedback

    if hyper.right_factor == "orthonormalize":
        size = of_Q.lengths(R).double().square().sum(-1, keepdim=True).sqrt().to(lengths.dtype)
        R = of_Q.basis(R, size.expand_as(lengths))
        alive = of_Q.lengths(R)
        left = _each(lambda P, alive: torch.where(alive > 0.5, P, 0), of_P.parts(P), alive)
        right = of_Q.parts(R)
    else:
        alive, left = of_P.lengths(P), of_P.parts(P)
        right = _each(lambda R, size: R / (size + hyper.epsilon), of_Q.parts(R), of_Q.lengths(R))
    # A dead column keeps its old column of Q, and takes no part in the update.
    old = _each(lambda Q, size: Q / (size + hyper.epsilon), old, lengths)
    new = [
        torch.where(live > 0.5, R, Q)
        for R, Q, live in zip(right, old, torch.split(alive, 1, dim=1), strict=True)
    ]
    for here, change in zip(blocks.here, pairs(left, new), strict=True):
        direction[:, here] = change
    return of_Q.whole(of_Q.joined(new))


def _each(function: Callable[..., Tensor], parts: Sequence[Tensor], numbers: Tensor) -> list[Tensor]:
    """Of each matrix ``[N, j, r]`` and its numbers, of ``[N, matrices, r]``."""
    return [function(part, own) for part, own in zip(parts, torch.split(numbers, 1, dim=1), strict=True)]


class _Blocks:
    """Some logical matrices in a stack ``[N, height, n]``.

    Attributes:
        stack: the parameters.
        rows: which of a parameter's rows each matrix has.
        here: where in the local shard those lie that are held here.
        own: which of the matrix's own rows these are.
    """

    def __init__(self, stack: Tensor, found: Sequence[tuple[Span, Span, Span]]) -> None:
        self.stack, self.local = stack, local_of(stack)
        self.rows, self.here, self.own = (
            [index_of(span, stack.device) for span in some] for some in zip(*found, strict=True)
        )

    def matrices(self) -> list[Tensor]:
        """The rows held here of each."""
        return [self.local[:, here] for here in self.here]

    def sizes(self) -> Tensor:
        """``[N, matrices, 1]``, the Frobenius norm of each."""
        squares = [
            torch.linalg.vector_norm(part, dim=(1, 2), dtype=torch.float64).square()
            for part in self.matrices()
        ]
        total = across(torch.stack(squares, 1).unsqueeze(-1), self.stack, "sum", (1, 2), (len(squares), 1))
        return total.sqrt().to(self.local.dtype)

    def laid(self, local: Tensor, placements: Callable[[tuple[Placement, ...]], Any], *sizes: int) -> Tensor:
        """A stack of any number of matrices of ``sizes``, by what becomes of the parameters' placements."""
        if not isinstance(self.stack, DTensor):
            return local
        count = self.stack.shape[0] * (local.shape[0] // self.local.shape[0])
        return from_local(local, self.stack.device_mesh, placements(self.stack.placements), (count, *sizes))


class _AlongRows:
    """Factors of some matrices along their rows, as one stack ``[N, height, r]`` that lies as the parameters do."""

    def __init__(self, blocks: _Blocks) -> None:
        self.blocks = blocks

    def own(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """Of ``[N, m, r]`` that every rank has, the rows held here."""
        return [one[:, own] for one, own in zip(whole, self.blocks.own, strict=True)]

    def whole(self, values: Tensor) -> list[Tensor]:
        """``[N, m, r]`` of each matrix on every rank."""
        local = local_of(whole_dim(values, 1))
        return [local[:, rows] for rows in self.blocks.rows]

    def parts(self, values: Tensor) -> list[Tensor]:
        """The rows held here of each matrix."""
        return [local_of(values)[:, here] for here in self.blocks.here]

    def joined(self, parts: Sequence[Tensor], pending: bool = False) -> Tensor:
        """The stack; ``pending`` if what other ranks hold of the columns is still to be added."""
        local = self.blocks.local
        stack = local.new_zeros(local.shape[0], local.shape[1], parts[0].shape[2])
        for here, part in zip(self.blocks.here, parts, strict=True):
            stack[:, here] = part
        lies = _rows_pending if pending else _rows_alone
        return self.blocks.laid(stack, lies, self.blocks.stack.shape[1], parts[0].shape[2])

    def products(self, others: Sequence[Tensor]) -> Tensor:
        """Each matrix with its factor along the columns."""
        pairs = zip(self.blocks.matrices(), others, strict=True)
        return self.joined([matrix @ other for matrix, other in pairs], pending=True)

    def basis(self, values: Tensor, roundings: Tensor) -> Tensor:
        """The orthonormal basis of each matrix's columns."""
        numbers = self.blocks.laid(roundings, _alone, *roundings.shape[1:])

        def bases(stack: Tensor, roundings: Tensor) -> Tensor:
            result = torch.zeros_like(stack)
            for index, rows in enumerate(self.blocks.rows):
                own = roundings[:, index : index + 1].contiguous()
                result[:, rows] = orthonormal_basis(stack[:, rows].contiguous(), own)
            return result

        found: Tensor = on_whole_matrices(bases, values, numbers)
        return found

    def lengths(self, values: Tensor) -> Tensor:
        """``[N, matrices, r]``, the norm of each column."""
        squares = [
            torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square() for part in self.parts(values)
        ]
        total = across(torch.stack(squares, 1), values, "sum", (1,), (len(squares),))
        return total.sqrt().to(self.blocks.local.dtype)


class _AlongColumns:
    """Factors of some matrices along their columns, as a stack ``[N * matrices, n, r]``."""

    def __init__(self, blocks: _Blocks) -> None:
        self.blocks = blocks

    def own(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """Of ``[N, n, r]`` that every rank has, the columns held here."""
        stack = self.blocks.stack
        if not isinstance(stack, DTensor):
            return list(whole)
        lies = algebra.of_transposed(algebra.of_only(stack.placements, (2,)))
        return [placed(one, stack.device_mesh, lies) for one in whole]

    def whole(self, values: Tensor) -> list[Tensor]:
        """``[N, n, r]`` of each matrix on every rank."""
        return self._each(local_of(whole_dim(values, 1)))

    def parts(self, values: Tensor) -> list[Tensor]:
        """The columns held here of each matrix."""
        return self._each(local_of(values))

    def joined(self, parts: Sequence[Tensor], pending: bool = False) -> Tensor:
        """The stack; ``pending`` if what other ranks hold of the rows is still to be added."""
        lies = _columns_pending if pending else _columns_alone
        stack = torch.stack(list(parts), 1).flatten(0, 1)
        return self.blocks.laid(stack, lies, self.blocks.stack.shape[2], parts[0].shape[2])

    def products(self, others: Sequence[Tensor]) -> Tensor:
        """The transpose of each matrix with its factor along the rows."""
        pairs = zip(self.blocks.matrices(), others, strict=True)
        return self.joined([matrix.mT @ other for matrix, other in pairs], pending=True)

    def basis(self, values: Tensor, roundings: Tensor) -> Tensor:
        """The orthonormal basis of each matrix's columns."""
        numbers = self.blocks.laid(
            roundings.reshape(-1, 1, roundings.shape[2]), _alone, 1, roundings.shape[2]
        )
        found: Tensor = on_whole_matrices(orthonormal_basis, values, numbers)
        return found

    def lengths(self, values: Tensor) -> Tensor:
        """``[N, matrices, r]``, the norm of each column."""
        sizes = local_of(norm(values, (-2,)))
        return sizes.reshape(self.blocks.local.shape[0], len(self.blocks.here), sizes.shape[2])

    def _each(self, local: Tensor) -> list[Tensor]:
        blocks = self.blocks
        return list(local.reshape(blocks.local.shape[0], len(blocks.here), *local.shape[1:]).unbind(1))


def _alone(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
    return algebra.of_only(placements, (0,))


def _rows_alone(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
    return algebra.of_only(placements, (0, 1))


def _rows_pending(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
    return algebra.of_pending(placements, (2,), "sum")


def _columns_alone(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
    return algebra.of_transposed(algebra.of_only(placements, (0, 2)))


def _columns_pending(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
    return algebra.of_transposed(algebra.of_pending(placements, (1,), "sum"))


def _mesh_of(stack: Tensor) -> tuple[DeviceMesh | None, tuple[Placement, ...]]:
    return (stack.device_mesh, stack.placements) if isinstance(stack, DTensor) else (None, ())
