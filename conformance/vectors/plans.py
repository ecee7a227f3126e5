"""What the vectors cover: a plan for each case, without its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dion_ref import ALGORITHMS, PRESETS, Convention, Experts, Flatten, Heads, InterleavedRows, Rows

VERSION = "2026.11.3"
"""Calendar version of the set that `make` writes. Cases of an older version are published and never edited."""

FLAGS: Mapping[str, str] = {
    "shape": "A shape at which orientation, scale or padding goes wrong: single rows and columns, 3:1, odd sizes.",
    "fresh-state": "The first step, from zero state: sums, averages and bias corrections part ways here.",
    "warm-state": "A step from a given state, so that momentum and gradient weigh differently.",
    "zero-gradient": "Nothing to orthonormalize: no NaN, no identity columns; decay applies.",
    "tiny": "Gradients of size 1e-12: shows where epsilon stands and how large it is.",
    "huge": "Gradients of size 1e12: the update must not grow with them, and float16 can't hold them.",
    "overflow": "Gradients of size 1e20: their squares overflow in float32, and norms must not.",
    "rank-deficient": "Fewer independent directions than the rule asks for: rounding must not become an update.",
    "nearly-dependent": "Directions of relative size 1e-9: float64 tells them from rounding, float32 cannot.",
    "tied-norms": "Slices of equal norm: the lowest index wins.",
    "not-a-number": "One NaN in the gradient: an error, never a finite update.",
    "trajectory": "Ten chained steps: state is carried, counted and decayed as it should be.",
    "momentum-warmup": "The momentum factor changes from step to step: sum and average part ways.",
    "weight-decay": "Decoupled decay by the base learning rate, before the update.",
    "no-decay": "No weight decay.",
    "cautious": "Decay only where the update shrinks the weight.",
    "fused": "Row blocks of one parameter are logical matrices of their own.",
    "heads": "Each head is a logical matrix.",
    "experts": "Each expert of a 3-D weight is a logical matrix.",
    "convolution": "A 4-D weight is one matrix, out by all the rest.",
    "rounding-of-counts": "fraction * size is whole, and rounds up in floats.",
    "polynomial": "The polynomial and its normalization alone.",
}


@dataclass(frozen=True)
class Plan:
    """A case to be made.

    Attributes:
        name: last part of the id.
        gradient: "normal", "zero", "tiny", "huge", "overflow", "low-rank", "nearly-low-rank" (float64 only), "tied" or
            "nan".
        warm: start from a given state that is not zero.
        schedule: by hyperparameter, its value at each step.
        deprecated: why the case should not be used any more; all that may change once it is published.
    """

    level: str
    algorithm: str
    dialect: str
    name: str
    shape: tuple[int, ...]
    hyper: Any
    comment: str
    flags: tuple[str, ...]
    gradient: str = "normal"
    warm: bool = False
    steps: int = 1
    split: Any = None
    schedule: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    since: str = "2026.11.1"
    deprecated: str | None = None

    @property
    def id(self) -> str:
        """The case's id."""
        return f"{self.level}/{self.algorithm}/{self.dialect}/{self.name}"


DEPRECATED: Mapping[str, str] = {}
"""By id, why a published case should not be used any more: it keeps its numbers, and no port is held to it."""

SHAPES = ((1, 1), (1, 7), (7, 1), (8, 8), (24, 8), (8, 24), (13, 10))
ODD, TALL, WIDE = (13, 10), (24, 8), (8, 24)
WARMUP = tuple(0.85 + 0.01 * step for step in range(10))
SPLITS: Mapping[str, tuple[Any, tuple[int, ...], str]] = {
    "qkv": (Rows((8, 4, 4)), (16, 8), "fused"),
    "gate-up": (Rows((7, 7)), (14, 10), "fused"),
    "heads": (Heads(4), (16, 8), "heads"),
    "grouped-qkv": (InterleavedRows((4, 2, 2), 2), (16, 8), "fused"),
    "experts": (Experts(), (3, 6, 8), "experts"),
    "convolution": (Flatten(), (6, 3, 2, 2), "convolution"),
    # Its aspect ratio is not that of its kernels.
    "tall-convolution": (Flatten(), (24, 2, 2, 2), "convolution"),
}

_torch = PRESETS["torch"]
DIALECTS: Mapping[str, Convention] = {
    **PRESETS,
    "torch-match-rms": replace(
        _torch, scale="moonlight", source='torch.optim.Muon, adjust_lr_fn="match_rms_adamw"'
    ),
    "dion-keller": Convention(
        polynomial="keller", source="microsoft/dion's convention with Keller Jordan's table"
    ),
    "dion-you": Convention(polynomial="you", source="microsoft/dion, use_polar_express=False"),
    "dion-exact": Convention(polynomial="exact", source="the polar factor itself"),
    "dion-gns": Convention(polynomial="polar_express_gns", source="Dao-AILab/gram-newton-schulz"),
    "dion-cans": Convention(polynomial="cans", source="arXiv 2506.10935"),
    "dion-unscaled": Convention(scale=None, source="microsoft/dion, adjust_lr=None"),
}
"""Conventions by name: the oracle's presets, and further ones."""

EXPRESSIBLE: Mapping[str, tuple[str, ...]] = {
    "muon": tuple(DIALECTS),
    "normuon": tuple(PRESETS),
    **dict.fromkeys(("dion", "orth_dion", "dion2", "dion3", "adamw", "lion"), ("dion",)),
}
"""By algorithm, the dialects that it can express: `Convention.hyper` refuses all others."""

COMMON: Mapping[str, Mapping[str, Any]] = {
    "dion": {"rank_fraction": 0.5},
    "orth_dion": {"rank_fraction": 0.5},
    "dion2": {"fraction": 0.4},
    "dion3": {"fraction": 0.4},
}


def hyper_of(algorithm: str, dialect: str, **overrides: Any) -> Any:
    """The oracle's Hyper of an algorithm in a dialect."""
    values = {"lr": 0.05, "weight_decay": 0.1, **COMMON.get(algorithm, {}), **overrides}
    if algorithm in ("adamw", "lion"):
        return ALGORITHMS[algorithm].Hyper(**values)
    return DIALECTS[dialect].hyper(algorithm, **values)


def plans() -> Iterator[Plan]:
    """Every case, in the order of the files."""
    for plan in _plans():
        yield replace(plan, deprecated=DEPRECATED.get(plan.id))


def _plans() -> Iterator[Plan]:
    for dialect in ("keller", "you", "polar_express", "polar_express_gns", "cans", "exact"):
        yield from _orthonormalizer(dialect)
    for algorithm in ALGORITHMS:
        for dialect in EXPRESSIBLE[algorithm]:
            if dialect not in PRESETS:
                yield from _variant(algorithm, dialect)
                continue
            yield from _one_step(algorithm, dialect)
            yield from _special(algorithm, dialect)
            if algorithm not in ("adamw", "lion"):
                yield from _splits(algorithm, dialect)
                yield from _counts(algorithm, dialect)
            yield from _trajectories(algorithm, dialect)


def _orthonormalizer(polynomial: str) -> Iterator[Plan]:
    hyper = ALGORITHMS["muon"].Hyper(polynomial=polynomial)
    for shape in SHAPES:
        if polynomial == "cans" and 1 in shape:  # a singular value of 1, where this polynomial is unstable
            continue
        yield Plan(
            "L0", "orthonormalize", polynomial, _x(shape), shape, hyper, "one matrix", ("polynomial", "shape")
        )
    # not zero: a port that does nothing would pass
    for name, gradient in (("tiny", "tiny"), ("huge", "huge"), ("rank-deficient", "low-rank")):
        yield Plan(
            "L0", "orthonormalize", polynomial, f"{_x(ODD)}-{name}", ODD, hyper, f"a {name} matrix",
            ("polynomial", name), gradient=gradient,
        )  # fmt: skip
    yield Plan(
        "L0", "orthonormalize", polynomial, f"{_x(ODD)}-overflow", ODD, hyper, "a matrix whose squares overflow",
        ("polynomial", "overflow"), gradient="overflow", since="2026.11.2",
    )  # fmt: skip
    if polynomial != "exact":
        yield Plan(
            "L0", "orthonormalize", polynomial, f"{_x(ODD)}-tiny-clamp", ODD,
            replace(hyper, epsilon_rule="clamp", epsilon=1e-7),
            "epsilon as the least norm, not added to it", ("polynomial", "tiny"), gradient="tiny",
        )  # fmt: skip


def _one_step(algorithm: str, dialect: str) -> Iterator[Plan]:
    hyper = hyper_of(algorithm, dialect)
    for shape in SHAPES:
        yield Plan(
            "L1", algorithm, dialect, f"{_x(shape)}-warm", shape, hyper, "one step from a given state",
            ("shape", "warm-state", "weight-decay"), warm=True,
        )  # fmt: skip
    for shape in (TALL, WIDE, ODD):
        yield Plan(
            "L1", algorithm, dialect, f"{_x(shape)}-fresh", shape, hyper_of(algorithm, dialect, weight_decay=0.0),
            "the first step, without decay", ("shape", "fresh-state", "no-decay"),
        )  # fmt: skip


def _variant(algorithm: str, dialect: str) -> Iterator[Plan]:
    """A few cases for a convention that differs from a preset in one choice."""
    kept = {_x(ODD) + "-warm", _x(TALL) + "-fresh", _x(WIDE) + "-fresh"}
    yield from (plan for plan in _one_step(algorithm, dialect) if plan.name in kept)
    yield from (plan for plan in _trajectories(algorithm, dialect) if plan.name == _x(ODD) + "-10")


def _special(algorithm: str, dialect: str) -> Iterator[Plan]:
    hyper = hyper_of(algorithm, dialect)
    base = Plan("L1", algorithm, dialect, "", ODD, hyper, "", ())

    def made(name: str, comment: str, *flags: str, shape: tuple[int, ...] = ODD, **changes: Any) -> Plan:
        return replace(base, name=f"{_x(shape)}-{name}", shape=shape, comment=comment, flags=flags, **changes)

    yield made("zero", "a zero gradient from zero state", "zero-gradient", "weight-decay", gradient="zero")
    yield made("zero-warm", "a zero gradient from a given state", "zero-gradient", "warm-state", gradient="zero",
               warm=True)  # fmt: skip
    yield made("tiny", "a gradient of size 1e-12", "tiny", "weight-decay", shape=TALL, gradient="tiny")
    yield made("huge", "a gradient of size 1e12", "huge", "weight-decay", shape=TALL, gradient="huge")
    if algorithm != "adamw":  # it is defined by squares, which overflow in float32 whatever the port does
        yield made("overflow", "a gradient of size 1e20", "overflow", "weight-decay", shape=TALL,
                   gradient="overflow", since="2026.11.2")  # fmt: skip
    if algorithm not in ("adamw", "lion"):
        yield made("rank-deficient", "a gradient of rank 2", "rank-deficient", gradient="low-rank")
        yield made(
            "rank-deficient", "a gradient of rank 2", "rank-deficient", shape=(10, 13), gradient="low-rank"
        )
    if algorithm in ("dion", "orth_dion"):
        yield made("nearly-dependent", "a gradient of rank 2 and a remainder of size 1e-9", "nearly-dependent",
                   gradient="nearly-low-rank")  # fmt: skip
    if algorithm in ("dion2", "dion3"):
        yield made("tied", "slices of equal norm, and a zero slice of the momentum", "tied-norms", shape=(9, 12),
                   gradient="tied", hyper=hyper_of(algorithm, dialect, fraction=1 / 3))  # fmt: skip
    yield made("nan", "one NaN in the gradient", "not-a-number", shape=(8, 8), gradient="nan")
    careful = hyper_of(algorithm, dialect, cautious=True)
    yield made("cautious", "cautious decay", "cautious", "warm-state", hyper=careful, warm=True)
    yield made("cautious-fresh", "cautious decay, the first step", "cautious", shape=WIDE, hyper=careful)


def _splits(algorithm: str, dialect: str) -> Iterator[Plan]:
    since = "2026.11.1" if dialect in ("dion", "torch", "keller") else "2026.11.2"
    for name, (split, shape, flag) in SPLITS.items():
        yield Plan(
            "L1", algorithm, dialect, f"{_x(shape)}-{name}", shape, hyper_of(algorithm, dialect),
            f"a parameter of several logical matrices: {split}", (flag, "weight-decay"), split=split,
            since="2026.11.3" if name == "tall-convolution" else since,
        )  # fmt: skip


def _counts(algorithm: str, dialect: str) -> Iterator[Plan]:
    field_ = {"dion": "rank_fraction", "orth_dion": "rank_fraction", "dion2": "fraction", "dion3": "fraction"}
    if algorithm in field_:
        yield Plan(
            "L1", algorithm, dialect, "25x26-count", (25, 26),
            hyper_of(algorithm, dialect, **{field_[algorithm]: 0.28}),
            "0.28 of 25 is 7; in floats it rounds up to 8", ("rounding-of-counts",),
        )  # fmt: skip
        yield Plan(
            "L1", algorithm, dialect, "8x8-all", (8, 8), hyper_of(algorithm, dialect, **{field_[algorithm]: 1.0}),
            "all of it", ("shape", "warm-state"), warm=True,
        )  # fmt: skip


def _trajectories(algorithm: str, dialect: str) -> Iterator[Plan]:
    hyper = hyper_of(algorithm, dialect)
    rates = tuple(0.05 * (1 - 0.05 * step) for step in range(10))
    for shape in (ODD, WIDE):
        yield Plan(
            "L2", algorithm, dialect, f"{_x(shape)}-10", shape, hyper, "ten steps, the learning rate falls",
            ("trajectory", "weight-decay"), steps=10, schedule={"lr": rates},
        )  # fmt: skip
    if hasattr(hyper, "mu"):
        yield Plan(
            "L2", algorithm, dialect, f"{_x(ODD)}-10-warmup", ODD, hyper, "ten steps, mu rises from 0.85 to 0.94",
            ("trajectory", "momentum-warmup"), steps=10, schedule={"mu": WARMUP},
        )  # fmt: skip


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
