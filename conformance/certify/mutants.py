"""Wrong oracles: each a small, plausible mistake that the cases must show."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import dion_ref
from conformance.certify import mistakes
from dion_ref import linalg, muon, normuon, orth_dion, philox, polynomials, update


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Args:
        name: what is wrong.
        groups: beginnings of the names of the groups whose cases should notice.
        original: the function, class or table that is replaced, everywhere in the oracle.
        wrong: the replacement, made from the original.
    """

    name: str
    groups: tuple[str, ...]
    original: Any
    wrong: Callable[[Any], Any]


@contextmanager
def replaced(original: Any, replacement: Any) -> Iterator[None]:
    """Every module of the oracle that holds ``original`` under some name holds ``replacement`` until the end."""
    places = [
        (module, name)
        for key, module in list(sys.modules.items())
        if key == "dion_ref" or key.startswith("dion_ref.")
        for name, value in list(vars(module).items())
        if value is original
    ]
    if not places:
        raise LookupError(f"no module of the oracle holds {original!r}")
    for module, name in places:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, original)


def mutants() -> list[Mutant]:
    """All of them."""
    sums = ("muon", "normuon")
    low, selected = ("dion", "orth-dion"), ("dion2", "dion3")
    everything = (*sums, *low, *selected, "adamw", "lion")
    tables, algorithms = polynomials.POLYNOMIALS, dion_ref.ALGORITHMS
    norm, top = linalg.norm, linalg.top_slices
    return [
        Mutant(
            "polar_express: 13th digit of a coefficient",
            ("Newton-Schulz",),
            tables,
            mistakes.changed_digit("polar_express", 4, 0, -1e-12),
        ),
        Mutant(
            "keller: last digit of a coefficient",
            ("Newton-Schulz", "muon"),
            tables,
            mistakes.changed_digit("keller", 2, 1, 1e-4),
        ),
        Mutant(
            "Newton-Schulz in float32", ("Newton-Schulz", "muon"), linalg.newton_schulz, mistakes.in_float32
        ),
        Mutant(
            "norm factor 1.02 dropped",
            sums,
            linalg.normalize_input,
            mistakes.input_divisor(
                lambda M, e, rule, f: norm(M) + e if rule == "add" else f * norm(M).clamp(min=e)
            ),
        ),
        Mutant(
            "epsilon clamped in place of added",
            sums,
            linalg.normalize_input,
            mistakes.input_divisor(lambda M, e, rule, f: f * norm(M).clamp(min=e)),
        ),
        Mutant(
            "epsilon inside the root of the input's norm",
            sums,
            linalg.normalize_input,
            mistakes.input_divisor(lambda M, e, rule, f: f * (norm(M).square() + e).sqrt()),
        ),
        Mutant(
            "root mean square for Frobenius norm",
            sums,
            linalg.normalize_input,
            mistakes.input_divisor(lambda M, e, rule, f: f * M.square().mean().sqrt() + e),
        ),
        Mutant(
            "EMA for sum (Muon)",
            sums,
            muon.accumulate,
            mistakes.with_hyper(lambda h: replace(h, momentum="ema")),
        ),
        Mutant(
            "Nesterov dropped",
            sums,
            muon.accumulate,
            mistakes.with_hyper(lambda h: replace(h, nesterov=False)),
        ),
        Mutant(
            "bias correction dropped (optax)",
            sums,
            muon.accumulate,
            mistakes.with_hyper(lambda h: replace(h, bias_correction=False)),
        ),
        Mutant(
            "bias correction one step late (optax)",
            sums,
            muon.accumulate,
            lambda original: lambda M, G, hyper, t: original(M, G, hyper, t + 1),
        ),
        Mutant("transposed scale", everything[:-2], update.scale_factor, mistakes.swapped_sides),
        Mutant("decay after the update", everything[:-2], update.apply_update, mistakes.decay_last),
        Mutant(
            "decay without lr", everything, update.decay, mistakes.decay_factor(lambda h: 1 - h.weight_decay)
        ),
        Mutant(
            "caution ignored",
            everything,
            update.decay,
            lambda original: lambda W, U, hyper: original(W, U, replace(hyper, cautious=False)),
        ),
        Mutant(
            "cautious: > for >=",
            everything,
            update.decay,
            mistakes.decay_factor(lambda h: 1 - h.lr * h.weight_decay, strict=True),
        ),
        Mutant(
            "exact factor keeps the null space",
            ("polar", "muon, exact"),
            linalg.polar_factor,
            mistakes.polar_without_threshold,
        ),
        Mutant(
            "row variance: sum for mean",
            ("normuon", "dion3"),
            normuon.normalize_rows,
            mistakes.row_normalization(mean=False),
        ),
        Mutant(
            "row variance: epsilon inside the root",
            ("normuon", "dion3"),
            normuon.normalize_rows,
            mistakes.row_normalization(inside=True),
        ),
        Mutant(
            "row variance: no rescaling to ||O||",
            ("normuon", "dion3"),
            normuon.normalize_rows,
            mistakes.row_normalization(rescale=False),
        ),
        Mutant(
            "EMA for sum (Dion)", ("dion",), algorithms, mistakes.step_of("dion", mistakes.averaged_gradient)
        ),
        Mutant(
            "mu and 1 - mu swapped in the feedback",
            ("dion",),
            algorithms,
            mistakes.step_of("dion", mistakes.swapped_feedback),
        ),
        Mutant("unnormalized Q", ("column", *low), linalg.normalize_columns, lambda _: lambda R, epsilon: R),
        Mutant(
            "Q: epsilon inside the root",
            ("column", *low),
            linalg.normalize_columns,
            mistakes.column_divisor(lambda R, e: (norm(R, dim=0).square() + e).sqrt()),
        ),
        Mutant(
            "Q: Frobenius norm for column norms",
            ("column", *low),
            linalg.normalize_columns,
            mistakes.column_divisor(lambda R, e: norm(R) + e),
        ),
        Mutant(
            "polar factor for ordered basis",
            ("ordered basis", *low),
            linalg.ordered_basis,
            mistakes.polar_for_basis,
        ),
        Mutant(
            "dead columns kept",
            low,
            linalg.ordered_basis,
            lambda original: lambda A, negligible: original(A, negligible * 0),
        ),
        Mutant(
            "columns dead at float32's rounding",
            low,
            linalg.ordered_basis,
            lambda original: lambda A, negligible: original(A, negligible * 2.0**29),
        ),
        Mutant(
            "Orth-Dion normalizes columns", ("orth-dion",), orth_dion.right_factor, mistakes.column_normalized
        ),
        Mutant(
            "ties to the highest index",
            ("top", *selected),
            top,
            mistakes.selection(lambda S: S.abs().sum(1), ties_to_last=True),
        ),
        Mutant("L2 for L1 norm", ("top", *selected), top, mistakes.selection(lambda S: S.square().sum(1))),
        Mutant(
            "sum for sum of absolute values", ("top", *selected), top, mistakes.selection(lambda S: S.sum(1))
        ),
        Mutant(
            "smallest slices",
            ("top", *selected),
            top,
            mistakes.selection(lambda S: S.abs().sum(1), smallest=True),
        ),
        Mutant(
            "all slices damped (Dion2)",
            ("dion2",),
            algorithms,
            mistakes.step_of("dion2", mistakes.damped_everywhere),
        ),
        Mutant(
            "ceiling in floats",
            ("counts",),
            update.exact_ceil,
            lambda _: lambda share, size, multiple=1: multiple * math.ceil(share * size / multiple),
        ),
        Mutant(
            "AdamW: epsilon inside the root",
            ("adamw",),
            algorithms,
            mistakes.step_of("adamw", mistakes.adamw_weight(lambda v, bc, e: (v / bc + e).sqrt(), True)),
        ),
        Mutant(
            "AdamW: epsilon before the correction",
            ("adamw",),
            algorithms,
            mistakes.step_of(
                "adamw", mistakes.adamw_weight(lambda v, bc, e: (v.sqrt() + e) / math.sqrt(bc), True)
            ),
        ),
        Mutant(
            "AdamW: first correction dropped",
            ("adamw",),
            algorithms,
            mistakes.step_of(
                "adamw", mistakes.adamw_weight(lambda v, bc, e: v.sqrt() / math.sqrt(bc) + e, False)
            ),
        ),
        Mutant(
            "AdamW: second correction dropped",
            ("adamw",),
            algorithms,
            mistakes.step_of("adamw", mistakes.adamw_weight(lambda v, bc, e: v.sqrt() + e, True)),
        ),
        Mutant(
            "Lion: betas swapped", ("lion",), algorithms, mistakes.step_of("lion", mistakes.swapped_betas)
        ),
        Mutant("Philox: nine rounds", ("Philox",), philox.philox4x32, mistakes.nine_rounds),
        Mutant("normals: no half added", ("normal values",), philox.philox4x32, mistakes.words_without_half),
        Mutant("normals: sine before cosine", ("normal values",), philox.normal, mistakes.sine_first),
        Mutant("the same Q for every matrix", low, philox.normal, mistakes.first_matrix_only),
    ]
