"""The cases of whole steps: every algorithm, single steps from hard states and chains of five."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import dion_ref
from conformance.certify import inputs
from conformance.certify.chain import Logical, StepCase
from conformance.certify.tables import CONVENTIONS

F64 = torch.float64
CHAIN = 5


def _gradients(key: str, shape: tuple[int, ...], count: int) -> list[Tensor]:
    return [inputs.gaussian(f"{key}/gradient {t}", *shape) for t in range(count)]


def _momenta(group: str, sizes: str) -> dict[str, Tensor]:
    """Momenta that every matrix rule meets, by name; a zero gradient comes with them."""
    shapes = ((1, 1), (1, 6), (6, 1), (4, 4), (8, 5), (5, 8))
    found = {f"gaussian {m}x{n}": inputs.gaussian(f"{group}/{m}x{n}", m, n) for m, n in shapes}
    if sizes == "all":
        found["gaussian 24x40"] = inputs.gaussian(f"{group}/24x40", 24, 40)
    for m, n, decades in ((6, 6, 6), (9, 6, 12), (6, 9, 12)):
        found[f"condition 1e{decades} {m}x{n}"] = inputs.conditioned(
            f"{group}/{m}x{n}/{decades}", m, n, decades
        )
    for m, n, rank in ((7, 7, 3), (10, 6, 4), (6, 10, 1)):
        found[f"rank {rank} {m}x{n}"] = inputs.deficient(f"{group}/{m}x{n}/{rank}", m, n, rank)
    found["zero 4x6"] = torch.zeros(4, 6, dtype=F64)
    for exponent in (-1060, -520, 520, 1000):
        found[f"scale 2^{exponent} 4x6"] = inputs.powers(
            inputs.gaussian(f"{group}/{exponent}", 4, 6), exponent
        )
    return found


def _spread(key: str, M: Tensor) -> dict[str, Any]:
    """A state and a gradient that add up to M exactly, so that rank and ties are M's: one of them is zero by turns."""
    zero = torch.zeros_like(M)
    return {"momentum": M, "gradient": zero} if len(key) % 2 else {"momentum": zero, "gradient": M}


def _weight(key: str, shape: tuple[int, ...], zero: bool) -> Tensor:
    """A zero weight shows the update by itself; another one shows the decay."""
    return torch.zeros(shape, dtype=F64) if zero else inputs.gaussian(f"{key}/weight", *shape)


def muon_cases() -> Iterator[StepCase]:
    """Every preset in chains, mixed states, and hard inputs; the exact factor; stacks; caution; the defaults."""
    for preset in CONVENTIONS:
        group = f"muon, {preset}"
        for m, n in ((4, 7), (7, 4)):
            key = f"muon/{preset}/chain {m}x{n}"
            weight = _weight(key, (m, n), False)
            yield StepCase(key, group, "muon", weight, _gradients(key, (m, n), CHAIN), {"mu": 0.9}, preset)
        for name, M in {
            "gaussian 6x9": inputs.gaussian(f"{preset}/6x9", 6, 9),
            "gaussian 12x8": inputs.gaussian(f"{preset}/12x8", 12, 8),
            "tiny 5x3": inputs.gaussian(f"{preset}/tiny", 5, 3) * 1e-8,
            "zero 3x2": torch.zeros(3, 2, dtype=F64),
        }.items():
            key = f"muon/{preset}/{name}"
            G = inputs.gaussian(f"{key}/gradient", *M.shape) * M.abs().max()
            state = {"momentum": M, "step": 3}
            yield StepCase(
                key, group, "muon", _weight(key, M.shape, True), [G], {"lr": 0.5, "mu": 0.7}, preset, state
            )
    for name, M in _momenta("muon", "all").items():
        key = f"muon/dion/{name}"
        parts = _spread(name, M)
        state = {"momentum": parts["momentum"], "step": 0}
        weight = _weight(key, M.shape, len(name) % 3 == 0)
        yield StepCase(key, "muon, dion", "muon", weight, [parts["gradient"]], {"mu": 0.5}, "dion", state)
    for name, M in _momenta("muon exact", "few").items():
        key = f"muon/exact/{name}"
        state = {"momentum": torch.zeros_like(M), "step": 0}
        given = {"polynomial": "exact", "mu": 0.5}
        yield StepCase(
            key, "muon, exact factor", "muon", _weight(key, M.shape, True), [M], given, "dion", state
        )
    given = {"polynomial": ((2.0, -1.5, 0.5), (1.875, -1.25, 0.375)), "norm_factor": 1.25, "scale": None}
    for key, shape, extra in (
        ("muon/stack", (3, 4, 5), {}),
        ("muon/cautious", (5, 6), {"cautious": True, "weight_decay": 0.3}),
        ("muon/literal", (6, 5), given),
        ("muon/rms", (6, 5), {"scale": "rms_norm", "epsilon_rule": "clamp", "weight_storage": "in_out"}),
    ):
        weight, gradients = _weight(key, shape, False), _gradients(key, shape, CHAIN)
        yield StepCase(key, "muon, options", "muon", weight, gradients, extra)


def normuon_cases() -> Iterator[StepCase]:
    """Chains, a zero row, no variance, hard inputs, another convention, a stack."""
    for name, shape, given, preset in (
        ("chain 4x7", (4, 7), {}, None),
        ("chain 7x4", (7, 4), {"mu": 0.9, "beta2": 0.8, "nesterov": True, "momentum": "ema"}, None),
        ("chain keller 5x6", (5, 6), {}, "keller"),
        ("chain stack", (2, 5, 3), {"weight_decay": 0.2, "cautious": True}, None),
        ("chain optax", (4, 5), {"variance_epsilon": 1e-3}, "optax"),
    ):
        key = f"normuon/{name}"
        weight = _weight(key, shape, False)
        yield StepCase(key, "normuon", "normuon", weight, _gradients(key, shape, CHAIN), given, preset)
    inputs_found = _momenta("normuon", "few")
    zero_row = inputs.gaussian("normuon/zero row", 6, 5)
    zero_row[2] = 0
    inputs_found["zero row 6x5"] = zero_row
    for name, M in inputs_found.items():
        key = f"normuon/{name}"
        parts = _spread(name, M)
        variance = inputs.gaussian(f"{key}/variance", M.shape[0], 1).square() * (
            1e-2 if len(name) % 2 else 0.0
        )
        state = {"momentum": parts["momentum"], "variance": variance, "step": 0}
        given = {"mu": 0.5, "lr": 0.5, "variance_epsilon": 1e-5 if len(name) % 3 else 1e-8}
        weight = _weight(key, M.shape, len(name) % 4 != 0)
        yield StepCase(key, "normuon", "normuon", weight, [parts["gradient"]], given, None, state)


def low_rank_cases(algorithm: str) -> Iterator[StepCase]:
    """Dion or Orth-Dion: chains from the drawn Q, hard momenta at full and at half rank, dead columns, stacks."""
    label = algorithm.replace("_", "-")
    for name, shape, given in (
        ("chain 9x5", (9, 5), {}),
        ("chain 5x9", (5, 9), {"rank_fraction": 0.6, "mu": 0.8}),
        ("chain 6x6", (6, 6), {"rank_fraction": 0.5, "cautious": True, "weight_decay": 0.3}),
        ("chain 12x8", (12, 8), {"rank_fraction": 0.25, "rank_multiple": 3, "scale": "moonlight"}),
        ("chain stack", (2, 4, 6), {"rank_fraction": 0.5, "weight_storage": "in_out"}),
    ):
        key = f"{algorithm}/{name}"
        weight, gradients = _weight(key, shape, False), _gradients(key, shape, CHAIN)
        yield StepCase(key, label, algorithm, weight, gradients, given)
    for name, M in _momenta(algorithm, "all").items():
        for share in (1.0, 0.5):
            short = min(M.shape)
            if (share == 0.5 and short < 4) or (share == 1.0 and short > 20):
                continue
            key = f"{algorithm}/{name}/{share}"
            parts = _spread(key, M)
            Q = inputs.gaussian(f"{key}/Q", short, -(-short // 2) if share == 0.5 else short)
            state = {"momentum": parts["momentum"], "Q": Q}
            given = {"rank_fraction": share, "mu": 0.7, "lr": 0.5}
            weight = _weight(key, M.shape, len(name) % 3 != 0)
            yield StepCase(key, label, algorithm, weight, [parts["gradient"]], given, None, state)
    for name, M, Q in _dead_columns():
        key = f"{algorithm}/{name}"
        given = {"mu": 0.5, "rank_fraction": 1.0, "lr": 0.5}
        state = {"momentum": torch.zeros_like(M), "Q": Q}
        yield StepCase(key, label, algorithm, _weight(key, M.shape, False), [M], given, None, state)


def _dead_columns() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Exactly dependent columns of A = M Q in the middle of others, by whole numbers."""
    M, Q = inputs.integers("dead/M", 8, 5), inputs.integers("dead/Q", 5, 5)
    repeated = Q.clone()
    repeated[:, 2] = 3 * Q[:, 0] - Q[:, 1]
    yield "dependent Q 8x5", M, repeated
    zero = Q.clone()
    zero[:, 0] = 0
    yield "zero column of Q 8x5", M, zero
    null = M.clone()
    null[:, 1] = 0
    axis = Q.clone()
    axis[:, 3] = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0], dtype=F64)
    yield "null vector in Q 8x5", null, axis
    yield "zero M 6x3", torch.zeros(6, 3, dtype=F64), inputs.gaussian("dead/zero", 3, 3)
    small = 10.0 ** -torch.arange(0, 16, 5, dtype=F64)
    yield (
        "small columns of Q 9x4",
        inputs.gaussian("dead/small", 9, 4),
        inputs.gaussian("dead/small Q", 4, 4) * small,
    )
    # what rounding leaves of the third column is 20 eps of its own size: the first two are near parallel
    yield (
        "near-parallel columns 4x4",
        inputs.deficient("probe44/44", 4, 4, 2),
        torch.cat((inputs.gaussian("probe44/44/Q", 4, 3), inputs.gaussian("probe44/44/q", 4, 1)), dim=1),
    )
    # both columns of A are new, but those of R = M^T P are parallel: dead on the right only
    weak = torch.diag(torch.tensor([1.0, 2.0**-60], dtype=F64))
    yield "dead on the right 2x2", weak, torch.tensor([[2.0**-45, 1.0], [1.0, 0.0]], dtype=F64)


def selected_cases(algorithm: str) -> Iterator[StepCase]:
    """Dion2 or Dion3: chains, exact ties, hard momenta, all and single slices, stacks."""

    def state(M: Tensor, key: str) -> dict[str, Any]:
        if algorithm == "dion2":
            return {"momentum": M}
        return {"momentum": M, "variance": inputs.gaussian(f"{key}/variance", M.shape[0], 1).square() * 1e-2}

    chains: tuple[tuple[str, tuple[int, ...], Mapping[str, Any]], ...] = (
        ("chain 8x5", (8, 5), {"fraction": 0.5}),
        ("chain 5x8", (5, 8), {"fraction": 0.4, "mu": 0.6}),
        ("chain 7x7", (7, 7), {"cautious": True, "weight_decay": 0.3, "polynomial": "keller"}),
        ("chain 6x12", (6, 12), {"fraction": 1.0, "scale": "moonlight"}),
        ("chain stack", (2, 6, 4), {"fraction": 0.28}),
    )
    for name, shape, given in chains:
        key = f"{algorithm}/{name}"
        weight, gradients = _weight(key, shape, False), _gradients(key, shape, CHAIN)
        yield StepCase(key, algorithm, algorithm, weight, gradients, given)
    found = _momenta(algorithm, "all")
    found["tied 6x8"] = inputs.tied_rows(f"{algorithm}/tied", 6, 8, 2)
    found["tied 10x4"] = inputs.tied_rows(f"{algorithm}/tied tall", 10, 4, 2)
    found["tied columns 9x6"] = inputs.tied_rows(f"{algorithm}/tied columns", 6, 9, 2).mT.contiguous()
    found["all tied 6x7"] = torch.ones(6, 7, dtype=F64)
    flat = torch.zeros(6, 8, dtype=F64)
    flat[:, 0], flat[3], flat[5] = 6.0, 1.0, 1.25
    found["flat or peaked 6x8"] = flat
    zero_rows = torch.zeros(6, 7, dtype=F64)
    zero_rows[4] = inputs.integers(f"{algorithm}/one row", 7)
    found["zero rows selected 6x7"] = zero_rows
    for name, M in found.items():
        key = f"{algorithm}/{name}"
        parts = _spread(name, M)
        given = {"fraction": 0.5, "mu": 0.25, "lr": 0.5}
        weight = _weight(key, M.shape, len(name) % 3 != 0)
        before = state(parts["momentum"], key)
        yield StepCase(key, algorithm, algorithm, weight, [parts["gradient"]], given, None, before)


def scalar_cases(algorithm: str, cautious: bool) -> Iterator[StepCase]:
    """AdamW or Lion, plain or cautious: chains from zero and from late states, scales, zeros."""
    group = f"{algorithm}, cautious" if cautious else algorithm
    base: dict[str, Any] = {"cautious": cautious}
    chains: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
        ("chain defaults", (3, 4), {}),
        ("chain betas", (2, 3, 2), {"betas": (0.8, 0.999), "lr": 0.1, "weight_decay": 0.5}),
        ("chain vector", (5,), {"betas": (0.0, 0.99)}),
        ("chain zero entries", (3, 3), {"lr": 0.3, "weight_decay": 1.0}),
    )
    for name, shape, options in chains:
        key = f"{group}/{name}"
        weight, gradients = _weight(key, shape, False), _gradients(key, shape, CHAIN)
        if name == "chain zero entries":
            for gradient in gradients:
                gradient[1] = 0
            weight[:, 2] = 0
        yield StepCase(key, group, algorithm, weight, gradients, base | options)
    for name, exponent, taken, weight_exponent in (
        ("late", 0, 1000, 0), ("early", 0, 1, 0), ("tiny", -30, 4, 0),
        ("denormal", -1060, 2, 0), ("small", -520, 2, -520), ("large", 480, 2, 0),
    ):  # fmt: skip
        key = f"{group}/{name}"
        shape = (3, 4)
        first = inputs.powers(inputs.gaussian(f"{key}/first", *shape), exponent)
        state: dict[str, Any] = {"exp_avg": first}
        given: dict[str, Any] = base | {"lr": 0.2, "weight_decay": 0.3}
        if algorithm == "adamw":
            squares = inputs.gaussian(f"{key}/second", *shape).square()
            state |= {"exp_avg_sq": inputs.powers(squares, max(2 * exponent, -1074)), "step": taken}
            given |= {"betas": (0.9, 0.999)}
        weight = inputs.powers(_weight(key, shape, False), weight_exponent)
        gradients = [inputs.powers(g, exponent) for g in _gradients(key, shape, 2)]
        yield StepCase(key, group, algorithm, weight, gradients, given, None, state)


def split_cases() -> Iterator[StepCase]:
    """Parameters cut into logical matrices: each has its own selection, scale, rank and Q."""
    fused = [Logical(range(4), 0), Logical(range(4, 6), 1), Logical(range(6, 9), 2)]
    heads = [Logical(range(3 * head, 3 * head + 3), 0, head) for head in range(3)]
    # two groups of two rows of q, one of k and one of v
    grouped = [Logical((0, 1, 4, 5), 0), Logical((2, 6), 1), Logical((3, 7), 2)]
    for algorithm in ("muon", "normuon", "dion", "orth_dion", "dion2", "dion3"):
        for name, rows, split, logical in (
            ("fused rows", 9, dion_ref.Rows((4, 2, 3)), fused),
            ("heads", 9, dion_ref.Heads(3), heads),
            ("grouped rows", 8, dion_ref.InterleavedRows((2, 1, 1), 2), grouped),
        ):
            key, shape = f"{algorithm}/split/{name}", (rows, 5)
            weight, gradients = _weight(key, shape, False), _gradients(key, shape, 2)
            label = "muon, options" if algorithm == "muon" else algorithm.replace("_", "-")
            yield StepCase(key, label, algorithm, weight, gradients, {}, split=split, logical=logical)


def step_cases() -> list[StepCase]:
    """All of them."""
    found = [*muon_cases(), *normuon_cases()]
    for algorithm in ("dion", "orth_dion"):
        found += low_rank_cases(algorithm)
    for algorithm in ("dion2", "dion3"):
        found += selected_cases(algorithm)
    for algorithm in ("adamw", "lion"):
        for cautious in (False, True):
            found += scalar_cases(algorithm, cautious)
    found += split_cases()
    return found
