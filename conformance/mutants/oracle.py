"""Mistakes in the oracle's mathematics; the certificate's, and those that a port makes around it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import dion_ref
from conformance.certify import mistakes
from conformance.certify.mutants import mutants as certified
from conformance.certify.mutants import replaced
from conformance.mutants.mutant import ORACLE, Applied, Mutant, attribute
from dion_ref import matrices, muon, update

GROUPS = {
    "Newton-Schulz": ("orthonormalize",),
    "counts": ("dion2", "dion3"),
    "polar": ("orthonormalize", "muon"),
    "muon": ("muon",),
    "muon, exact": ("muon",),
    "normuon": ("normuon",),
    "dion": ("dion",),
    "orth-dion": ("orth_dion",),
    "dion2": ("dion2",),
    "dion3": ("dion3",),
    "adamw": ("adamw",),
    "lion": ("lion",),
}
"""From the groups of the certificate's cases to algorithms of the vectors."""
ELSEWHERE = {
    "Philox: nine rounds": "Q is given as data here; the certificate and L4 check how it is drawn",
    "normals: no half added": "as above",
    "normals: sine before cosine": "as above",
    "the same Q for every matrix": "as above",
    "ties to the highest index": "graded as acceptable, with its note",
    "polar_express: 13th digit of a coefficient": "cases give the coefficients; see the digits below",
    "keller: last digit of a coefficient": "as above",
    "exact factor keeps the null space": "a full-rank input does not show it; 'dion-exact' has no other",
}
"""Mistakes of the certificate that no vector is there for, and why."""


def mutants() -> list[Mutant]:
    """The certificate's mutants that a port can have, and more."""
    found = []
    for one in certified():
        if one.name in ELSEWHERE:
            continue
        algorithms = tuple(dict.fromkeys(name for group in one.groups for name in GROUPS.get(group, ())))
        level = "L0" if algorithms[:1] == ("orthonormalize",) else "L1"
        if one.wrong is not None:
            found.append(Mutant(one.name, ORACLE, level, algorithms, _replaced(one.original, one.wrong)))
    return found + _further()


def _replaced(original: Any, wrong: Callable[[Any], Any]) -> Applied:
    return lambda: replaced(original, wrong(original))


def _step(algorithm: str, change: Callable[..., tuple[Tensor, Any]]) -> Applied:
    return _replaced(dion_ref.ALGORITHMS, mistakes.step_of(algorithm, change))


def _further() -> list[Mutant]:
    every = ("muon", "normuon", "dion", "orth_dion", "dion2", "dion3")

    def made(name: str, level: str, algorithms: tuple[str, ...], applied: Applied) -> Mutant:
        return Mutant(name, ORACLE, level, algorithms, applied)

    def accumulate(change: Callable[..., tuple[Tensor, Tensor]]) -> Applied:
        return _replaced(muon.accumulate, lambda original: lambda *given: change(original, *given))

    def scale(factor: Callable[[float, str | None, int, int], float]) -> Applied:
        def wrong(original: Any) -> Any:
            return lambda kind, m, n, storage="out_in": factor(original(kind, m, n, storage), kind, m, n)

        return _replaced(update.scale_factor, wrong)

    return [
        made("9th digit of a coefficient", "L0", ("orthonormalize",), _digit(4, 0, 1e-9)),
        made("last printed digit of a coefficient", "L0", ("orthonormalize", "muon"), _digit(2, 1, 1e-4)),
        made("polynomial: one step too few", "L1", ("muon", "dion2"),
             _replaced(dion_ref.linalg.newton_schulz, lambda f: lambda X, c: f(X, c[:-1]))),
        made("polynomial: always on the rows' side of X", "L1", ("muon",),
             _replaced(dion_ref.linalg.newton_schulz, lambda f: lambda X, c: f(X[: min(X.shape)], c)
                       if X.shape[0] <= X.shape[1] else torch.cat((f(X[: X.shape[1]], c), X[X.shape[1] :])))),
        made("Nesterov flipped", "L1", ("muon", "normuon"),
             accumulate(lambda f, M, G, h, t: f(M, G, replace(h, nesterov=not h.nesterov), t))),
        made("gradient mixed in with weight one (EMA, Nesterov)", "L1", ("muon",),
             accumulate(lambda f, M, G, h, t: (f(M, G, h, t)[0], h.mu * f(M, G, h, t)[0] + G)
                        if h.nesterov else f(M, G, h, t))),
        made("steps are not counted (bias correction)", "L2", ("muon",),
             accumulate(lambda f, M, G, h, t: f(M, G, h, 1))),
        made("momentum kept in bfloat16", "L1", ("muon", "normuon"),
             accumulate(lambda f, M, G, h, t: tuple(x.bfloat16().double() for x in f(M, G, h, t)))),
        made("momentum of the last step lost", "L1", ("muon",), accumulate(lambda f, M, G, h, t: f(0 * M, G, h, t))),
        made("decay by the scaled learning rate", "L1", every, _replaced(update.apply_update, _scaled_decay)),
        made("decay is added to the gradient", "L1", ("muon", "dion"), _coupled("muon", "dion")),
        made("scale without max(1, .)", "L1", ("muon",),
             scale(lambda s, kind, m, n: math.sqrt(m / n) if kind == "keller" else s)),
        made("moonlight: min for max", "L1", ("muon",),
             scale(lambda s, kind, m, n: 0.2 * math.sqrt(min(m, n)) if kind == "moonlight" else s)),
        made("moonlight without 0.2", "L1", ("muon",),
             scale(lambda s, kind, m, n: s / 0.2 if kind == "moonlight" else s)),
        made("weights stored in-out read as out-in (optax)", "L1", ("muon",),
             _replaced(update.scale_factor, lambda f: lambda kind, m, n, storage="out_in": f(kind, m, n))),
        made("k rounded down", "L1", ("dion2", "dion3"),
             _replaced(update.exact_ceil, lambda _: lambda s, size, multiple=1: max(1, int(s * size)))),
        made("error feedback dropped", "L1", ("dion", "orth_dion"), _without_feedback),
        made("Dion: P on the shorter side", "L1", ("dion",), _step("dion", _other_side)),
        made("Q of the last step kept", "L1", ("dion",),
             _step("dion", lambda f, W, G, s, h: (lambda W1, s1: (W1, replace(s1, Q=s.Q)))(*f(W, G, s, h)))),
        made("variance updated on unselected rows", "L1", ("dion3",), _step("dion3", _variance_everywhere)),
        made("variance bias-corrected", "L1", ("normuon",), _replaced(dion_ref.normuon.normalize_rows, _corrected)),
        made("variance: beta2 and 1 - beta2 swapped", "L1", ("normuon", "dion3"),
             _replaced(dion_ref.normuon.normalize_rows, lambda f: lambda U, v, b, e: f(U, v, 1 - b, e))),
        made("selection by the gradient, not the momentum", "L1", ("dion2",), _step("dion2", _by_gradient)),
        made("unselected slices move too", "L1", ("dion2",), _step("dion2", _moved_everywhere)),
        made("momentum of selected slices cleared", "L1", ("dion2",),
             _step("dion2", lambda f, W, G, s, h: f(W, G, s, replace(h, mu=0.0)))),
        made("wrong head boundary", "L1", ("muon",), lambda: _Methods(
            matrices.Heads, lambda f, own, x: f(own, x.roll(1, 0)),
            lambda f, own, p, shape: f(own, p, shape).roll(-1, 0))),
        made("fused QKV as one matrix", "L1", ("muon",), lambda: _Methods(
            matrices.Rows, lambda f, own, x: (x,), lambda f, own, p, shape: p[0].clone())),
        made("experts as one matrix", "L1", ("muon",),
             lambda: attribute(matrices.Experts, "split", lambda _: lambda self, x: (x.reshape(1, -1, x.shape[-1]),))),
        made("convolution flattened from the other side", "L1", ("muon",),
             lambda: attribute(matrices.Flatten, "split", lambda _: lambda self, x: (x.flatten(0, -2),))),
        made("convolution scaled by its kernel (KellerJordan/Muon)", "L1", ("muon",), _scaled_by_kernels),
        made("AdamW: beta2 of torch's default", "L1", ("adamw",),
             _step("adamw", lambda f, W, G, s, h: f(W, G, s, replace(h, betas=(h.betas[0], 0.999))))),
        made("AdamW: steps are not counted", "L2", ("adamw",),
             _step("adamw", lambda f, W, G, s, h: f(W, G, replace(s, step=0), h))),
        made("Lion: momentum in place of the sign", "L1", ("lion",),
             _step("lion", lambda f, W, G, s, h: (
                 W * (1 - h.lr * h.weight_decay) - h.lr * s.exp_avg, f(W, G, s, h)[1]))),
    ]  # fmt: skip


@contextmanager
def _scaled_by_kernels() -> Iterator[None]:
    """The factor of the last two dims of a convolution, not of its matrix."""
    kernels: dict[tuple[int, int], tuple[int, int]] = {}

    def flattened(original: Any) -> Any:
        def split(self: Any, tensor: Tensor) -> Any:
            kernels[tensor.shape[0], tensor[0].numel()] = (tensor.shape[-2], tensor.shape[-1])
            return original(self, tensor)

        return split

    def wrong(original: Any) -> Any:
        def of_kernel(kind: str | None, m: int, n: int, storage: str = "out_in") -> float:
            kernel = kernels.pop((m, n), (m, n))
            factor: float = original(kind, *(kernel if kind == "keller" else (m, n)), storage)
            return factor

        return of_kernel

    with (
        attribute(matrices.Flatten, "split", flattened),
        replaced(update.scale_factor, wrong(update.scale_factor)),
    ):
        yield


def _digit(step: int, position: int, change: float) -> Applied:
    """One coefficient a little off."""

    def wrong(original: Any) -> Any:
        def newton_schulz(X: Tensor, coefficients: Any) -> Tensor:
            rows = [list(row) for row in coefficients]
            rows[step][position] += change
            result: Tensor = original(X, rows)
            return result

        return newton_schulz

    return _replaced(dion_ref.linalg.newton_schulz, wrong)


def _scaled_decay(_: Any) -> Any:
    def apply_update(W: Tensor, U: Tensor, hyper: Any) -> Tensor:
        factor = update.scale_factor(hyper.scale, W.shape[0], W.shape[1], hyper.weight_storage)
        scaled = replace(hyper, lr=hyper.lr * factor)
        result: Tensor = update.decay(W, U, scaled) - scaled.lr * U
        return result

    return apply_update


def _coupled(*algorithms: str) -> Applied:
    """L2 regularization in place of decoupled decay."""

    def wrong(known: Any) -> Any:
        changed = dict(known)
        for name in algorithms:

            def step(W: Tensor, G: Tensor, s: Any, h: Any, *, _of: Any = known[name]) -> tuple[Tensor, Any]:
                result: tuple[Tensor, Any] = _of.step(
                    W, G + h.weight_decay * W, s, replace(h, weight_decay=0.0)
                )
                return result

            changed[name] = replace(known[name], step=step)
        return changed

    return _replaced(dion_ref.ALGORITHMS, wrong)


def _without_feedback() -> Any:
    def wrong(known: Any) -> Any:
        changed = dict(known)
        for name in ("dion", "orth_dion"):

            def step(W: Tensor, G: Tensor, s: Any, h: Any, *, _of: Any = known[name]) -> tuple[Tensor, Any]:
                W1, s1 = _of.step(W, G, s, h)
                return W1, replace(s1, momentum=s.momentum + G)

            changed[name] = replace(known[name], step=step)
        return changed

    return replaced(dion_ref.ALGORITHMS, wrong(dion_ref.ALGORITHMS))


def _other_side(f: Any, W: Tensor, G: Tensor, s: Any, h: Any) -> tuple[Tensor, Any]:
    """Square matrices only can be stepped from the other side with a Q of this shape; others are left alone."""
    if W.shape[0] != W.shape[1]:
        return f(W, G, s, h)  # type: ignore[no-any-return]
    W1, s1 = f(W.mT.contiguous(), G.mT.contiguous(), replace(s, momentum=s.momentum.mT.contiguous()), h)
    return W1.mT.contiguous(), replace(s1, momentum=s1.momentum.mT.contiguous())


def _variance_everywhere(f: Any, W: Tensor, G: Tensor, s: Any, h: Any) -> tuple[Tensor, Any]:
    W1, s1 = f(W, G, s, h)
    untouched = s1.variance == s.variance
    return W1, replace(s1, variance=torch.where(untouched, h.beta2 * s.variance, s1.variance))


def _corrected(original: Any) -> Any:
    def normalize_rows(U: Tensor, v: Tensor, beta2: float, epsilon: float) -> tuple[Tensor, Tensor]:
        U1, v1 = original(U, v, beta2, epsilon)
        return U1, v1 / (1 - beta2)

    return normalize_rows


def _by_gradient(f: Any, W: Tensor, G: Tensor, s: Any, h: Any) -> tuple[Tensor, Any]:
    top = dion_ref.linalg.top_slices
    with replaced(top, lambda M, count, dim: top(G, count, dim)):
        return f(W, G, s, h)  # type: ignore[no-any-return]


def _moved_everywhere(f: Any, W: Tensor, G: Tensor, s: Any, h: Any) -> tuple[Tensor, Any]:
    W1, s1 = f(W, G, s, h)
    return W1 - h.lr * 1e-3 * (s.momentum + G), s1


class _Methods:
    """Other `split` and `merge` for a split until the end."""

    def __init__(self, split: type, cut: Callable[..., Any], merge: Callable[..., Any]) -> None:
        self.split: Any = split
        self.new = cut, merge

    def __enter__(self) -> None:
        self.old = self.split.split, self.split.merge
        cut, merge = (functools.partial(new, old) for new, old in zip(self.new, self.old, strict=True))
        self.split.split = lambda self, tensor: cut(self, tensor)
        self.split.merge = lambda self, pieces, shape: merge(self, pieces, shape)

    def __exit__(self, *_: object) -> None:
        self.split.split, self.split.merge = self.old
