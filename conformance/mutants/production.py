"""Mistakes in `dion_dtensor`, on one device and on meshes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conformance.mutants.gathering import unreduced
from conformance.mutants.mutant import PRODUCTION, Applied, Mutant, attribute
from dion_dtensor import buckets, optimizer, placements
from dion_dtensor.orthonormalize import gram, householder
from dion_dtensor.rules import dion, dion2, dion3, muon, normuon, shared
from dion_dtensor.scale import scale_factor


def _in(owner: Any, name: str, wrong: Callable[[Any], Any]) -> Applied:
    def applied() -> AbstractContextManager[Any]:
        return attribute(owner, name, wrong)

    return applied


def mutants() -> list[Mutant]:
    """All of them."""

    def one(
        name: str, level: str, algorithm: str, applied: Applied, *layouts: str, dtype: str = "float64"
    ) -> Mutant:
        return Mutant(name, PRODUCTION, level, (algorithm,), applied, layouts, dtype)

    def of_gram(name: str, wrong: Callable[[Any], Any]) -> Mutant:
        return one(
            f"{name}, Gram form", "L1", "muon", _in(shared, "gram_newton_schulz", wrong), dtype="float32"
        )

    return [
        one("polynomial in bfloat16 for float64", "L1", "muon",
            _in(shared, "newton_schulz", lambda f: lambda X, **k: f(X.bfloat16(), **k).to(X.dtype))),
        one("epsilon clamped in place of added", "L1", "muon",
            _in(shared, "newton_schulz", lambda f: lambda X, **k: f(X, **{**k, "epsilon_rule": "clamp"}))),
        one("norm factor of polar_express dropped", "L1", "muon",
            _in(shared, "newton_schulz", lambda f: lambda X, **k: f(X, **{**k, "norm_factor": 1.0}))),
        one("last step of the polynomial dropped", "L1", "muon",
            _in(shared, "newton_schulz",
                lambda f: lambda X, **k: f(X, **{**k, "coefficients": k["coefficients"][:-1]}))),
        of_gram("epsilon clamped in place of added", lambda f: lambda X, **k: f(X, **{**k, "epsilon_rule": "clamp"})),
        of_gram("norm factor of polar_express dropped", lambda f: lambda X, **k: f(X, **{**k, "norm_factor": 1.0})),
        of_gram("last step of the polynomial dropped",
                lambda f: lambda X, **k: f(X, **{**k, "coefficients": k["coefficients"][:-1]})),
        of_gram("polynomial in bfloat16 for float32", lambda f: lambda X, **k: f(X.bfloat16(), **k).to(X.dtype)),
        one("no restart of the Gram form", "L1", "muon",
            _in(gram, "segments", lambda _: lambda coefficients, *_, **__: (len(coefficients),)), dtype="float32"),
        one("Gram matrix not updated within a segment", "L1", "muon",
            _in(gram, "symmetric_product", lambda f: _stale_gram(f)), dtype="float32"),
        one("transposed scale", "L1", "muon",
            _in(buckets, "scale_factor", lambda f: lambda scale, shape, stored: f(scale, shape[::-1], stored))),
        one("decay after the update", "L1", "muon", _in(buckets.Bucket, "_apply", lambda _: _decay_last)),
        one("no column is ever dead", "L1", "dion",
            _in(householder, "_dead", lambda f: lambda T, sizes: torch.zeros_like(f(T, sizes)))),
        one("each shard orthonormalized by itself", "L4", "muon",
            _in(muon, "on_whole_matrices", lambda _: _shard_by_shard), "4-S0", "2x2-S0S1"),
        one("scale of a shard's shape", "L4", "muon",
            _in(buckets.Bucket, "scales", lambda _: _shard_scales), "4-S0", "2-S1"),
        one("one axis not reduced (R)", "L4", "dion", _in(dion, "reduced", lambda _: unreduced), "4-S0", "2x2-S0S1"),
        one("L2 norms for L1 in the choice of rows", "L1", "dion2",
            _in(dion2, "row_sums", lambda _: lambda X: X.double().square().sum(-1))),
        one("momentum decayed on all rows", "L1", "dion2",
            _in(dion2, "scaled_rows", lambda _: lambda X, chosen, factor: X * factor)),
        one("momentum decayed on no row", "L1", "dion3", _in(dion3, "scaled_rows", lambda _: lambda X, chosen, mu: X)),
        one("one slice too few", "L1", "dion2",
            _in(dion2, "slices", lambda f: lambda share, size: max(1, f(share, size) - 1))),
        one("rows normalized by the old variance", "L1", "normuon",
            _in(normuon, "normalized_rows", lambda f: lambda U, v, b, e: (f(U, v / b, 1.0, e)[0], f(U, v, b, e)[1]))),
        one("norms of a shard", "L4", "dion", _in(dion, "norm", lambda _: _local_norm), "4-S0", "2x2-S0S1"),
        one("state not copied on load", "L3", "dion",
            _in(optimizer, "load_states", lambda _: lambda members, states: None), "4-S0-to-2x2-S0S1"),
    ]  # fmt: skip


def _stale_gram(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``R <- Z R Z`` loses its second product."""
    last: list[Tensor] = []

    def wrong(left: Tensor, right: Tensor, blocks: int, **options: Any) -> Tensor:
        if last and right is last[0] and options.get("add") is right and left is not right:
            return last.pop()
        result: Tensor = product(left, right, blocks, **options)
        last[:] = [result]
        return result

    return wrong


def _decay_last(self: Any, members: Any, changes: Any, decay: Tensor) -> None:
    weights = [member.local for member in members]
    torch._foreach_add_(weights, list(changes))
    torch._foreach_mul_(weights, decay)


def _shard_by_shard(function: Callable[..., Tensor], stack: Tensor, *others: Tensor) -> Tensor:
    if not isinstance(stack, DTensor):
        return function(stack, *others)
    return _like(stack, function(stack.to_local()).contiguous())


def _shard_scales(self: Any) -> tuple[float, ...]:
    rows, columns = self.members[0].local.shape
    return (scale_factor(self.group.get("scale"), (max(rows, 1), max(columns, 1))),)


def _local_norm(stack: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not isinstance(stack, DTensor):
        whole: Tensor = torch.linalg.vector_norm(stack, dim=dims, keepdim=True)
        return whole
    summed = tuple(dim % stack.ndim for dim in dims)
    squares = torch.linalg.vector_norm(stack.to_local(), dim=dims, keepdim=True)
    placed = placements.of_reduced(placements.of_pending(stack.placements, summed, "sum"))
    shape = torch.Size(1 if dim in summed else size for dim, size in enumerate(stack.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(squares, stack.device_mesh, placed, run_check=False, shape=shape, stride=stride)


def _like(stack: DTensor, local: Tensor) -> DTensor:
    stride = torch.empty(stack.shape, device="meta").stride()
    placed = placements.of_reduced(stack.placements)
    return DTensor.from_local(
        local, stack.device_mesh, placed, run_check=False, shape=stack.shape, stride=stride
    )
