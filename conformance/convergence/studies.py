"""What a sweep consists of: studies (a workload at one batch size and step budget) and their entries (rules)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conformance.convergence.contenders import algorithm_of, settings_of
from conformance.convergence.training import Run
from conformance.convergence.workloads import Spec


@dataclass(frozen=True)
class Entry:
    """A rule with its hyperparameters.

    Attributes:
        label: as figures print it.
        algorithm: see `training.Run`.
        hyper: sorted pairs.
        start: where the search of the rate begins.
    """

    label: str
    algorithm: str
    hyper: tuple[tuple[str, Any], ...] = ()
    start: float = 0.02


MU = ("mu", 0.9)
"""Where the search of the momentum begins: short runs want less of it than the usual 0.95."""


def _fractions(algorithm: str, field_name: str, title: str) -> list[Entry]:
    marks = {1.0: "1", 0.5: "1/2", 0.25: "1/4", 0.125: "1/8", 0.0625: "1/16"}
    return [
        Entry(f"{title} {mark}", algorithm, ((field_name, share), MU), 0.02 * share**-0.25)
        for share, mark in marks.items()
        if algorithm.startswith(("dion_", "orth")) or field_name == "rank_fraction" or share >= 0.125
    ]


ENTRIES: Mapping[str, Entry] = {
    one.label: one
    for one in (
        Entry("AdamW", "adamw", (("betas", (0.8, 0.95)),), 1e-2),
        Entry("Lion", "lion", (("betas", (0.9, 0.98)),), 1.25e-3),
        Entry("Muon", "muon", (MU,)),
        Entry("NorMuon", "normuon", (MU,)),
        *_fractions("dion", "rank_fraction", "Dion"),
        *_fractions("dion_no_error_feedback", "rank_fraction", "Dion without error feedback"),
        *_fractions("orth_dion", "rank_fraction", "Orth-Dion"),
        *_fractions("dion2", "fraction", "Dion2"),
        *_fractions("dion3", "fraction", "Dion3"),
    )
}
"""Every rule of a sweep by label."""


def contender(text: str) -> Entry:
    """The entry of a user's ``module:function``; `mu` or `betas` are tuned where it takes them.

    Raises:
        ValueError: no such function, one called like a rule of a sweep, or one whose optimizer takes no step.
    """
    label = text.partition(":")[2]
    if label in ENTRIES:
        raise ValueError(f"contender {text!r}: a rule of the sweep is called {label}; rename the function")
    begins = {"mu": MU[1], "betas": dict(ENTRIES["AdamW"].hyper)["betas"]}
    hyper = {name: begins[name] for name in settings_of(text) if name in begins}
    return Entry(label, algorithm_of(text, hyper), tuple(sorted(hyper.items())))


@dataclass(frozen=True)
class Study:
    """One workload, batch size and step budget.

    Attributes:
        name: unique in a sweep.
        kind: what it is for: "batch", "fraction", "width", "vision".
        spec: the workload.
        batch: of a step.
        steps: the budget at which rates are tuned and losses compared.
        seeds: how many; the search uses another one.
        with_steps: measure steps to the target too, not only the loss at `steps`.
        micro: see `training.Run`.
        scalar_lr, schedule: see `training.Run`.
    """

    name: str
    kind: str
    spec: Spec
    batch: int
    steps: int
    seeds: int = 3
    with_steps: bool = True
    micro: int = 0
    scalar_lr: float = 3e-3
    schedule: str = "linear"

    def run(self, entry: Entry, lr: float, seed: int, steps: int) -> Run:
        """One run of an entry."""
        return Run(
            self.spec,
            entry.algorithm,
            entry.hyper,
            self.batch,
            steps,
            lr,
            seed,
            micro=self.micro,
            scalar_lr=self.scalar_lr,
            schedule=self.schedule,
        )

    @property
    def report_seeds(self) -> range:
        """Seeds of the reported runs; the search uses seed 0, so that it does not choose what is reported."""
        return range(1, 1 + self.seeds)


@dataclass(frozen=True)
class Task:
    """One entry of one study: what a plan takes or drops as a whole."""

    study: Study
    entry: Entry

    @property
    def name(self) -> str:
        """As progress and plans print it."""
        return f"{self.study.name}: {self.entry.label}"


@dataclass(frozen=True)
class Scale:
    """The sizes of a sweep.

    Attributes:
        core_batch, core_steps: of the study in which all rules meet.
        batches: the others. All get the same steps, so that a trend is one of the batch size alone.
        long_steps: of the study of error feedback.
        widths: of the models of the width trend; the first is the core's.
        spec: the core's workload.
        seeds: of every reported number.
        vision_steps: of the vision studies.
        micro, scalar_lr, schedule: see `training.Run`.
    """

    core_batch: int = 20
    core_steps: int = 160
    batches: tuple[int, ...] = (200, 2, 6, 63)
    long_steps: int = 320
    widths: tuple[int, ...] = (64, 128, 256, 384)
    spec: Spec = field(default_factory=Spec)
    seeds: int = 4
    vision_steps: int = 80
    images: str = ""
    micro: int = 0
    scalar_lr: float = 3e-3
    schedule: str = "linear"


MAIN = ("AdamW", "Muon", "Dion 1", "Dion 1/4", "Dion2 1/4")
FEEDBACK = ("Dion 1/16", "Dion without error feedback 1/16", "Dion 1/4", "Dion without error feedback 1/4")
WIDE = ("Dion 1/4", "Dion 1", "Muon", "AdamW", "Dion2 1/4")
VISION = ("AdamW", "Muon", "Dion 1", "Dion2 1/4")
SECOND = (
    "Dion2 1/2",
    "Dion 1/16",
    "Dion 1/2",
    "Dion 1/8",
    "Dion2 1/8",
    "NorMuon",
    "Dion3 1/2",
    "Dion3 1/4",
    "Lion",
)
THIRD = ("Orth-Dion 1/4", "Orth-Dion 1", "Orth-Dion 1/2", "Orth-Dion 1/8", "Orth-Dion 1/16")
LAST = ("Dion2 1", "Dion3 1", "Dion3 1/8")


def tasks(scale: Scale, contenders: Sequence[Entry] = (), against: Sequence[str] = ("Muon",)) -> list[Task]:
    """Every task of a sweep, the most telling first; a plan takes them in this order.

    Args:
        scale: its sizes.
        contenders: users' own, which then alone meet AdamW and `against`: in the core, at another width, on images and
            at the largest and the smallest batch.
        against: labels of `ENTRIES`.
    """
    core = Study("core", "batch", scale.spec, scale.core_batch, scale.core_steps, scale.seeds,
                 micro=scale.micro, scalar_lr=scale.scalar_lr, schedule=scale.schedule)  # fmt: skip
    batches = [replace(core, name=f"batch {batch}", batch=batch) for batch in scale.batches]
    long = replace(core, name="error feedback", kind="fraction", steps=scale.long_steps, with_steps=False)
    widths = [
        replace(
            core, name=f"width {width}", kind="width", spec=replace(scale.spec, width=width), with_steps=False
        )
        for width in scale.widths
        if width != scale.spec.width
    ]
    transformer, resnet = (
        replace(core, name=name, kind="vision", batch=64, steps=scale.vision_steps, micro=0,
                spec=Spec(kind, 64, layers, data=scale.images))
        for name, kind, layers in (("vision transformer", "vit", 2), ("ResNet", "resnet", 1))
    )  # fmt: skip
    outer, inner = batches[:2], batches[2:]
    if contenders:
        entries = [ENTRIES[label] for label in dict.fromkeys(("AdamW", *against))] + list(contenders)
        studies = (core, *widths[:1], transformer, *outer)
        return [Task(study, entry) for study in studies for entry in entries]
    parts = [
        _of(core, MAIN),
        *(_of(study, ("AdamW", "Muon")) for study in outer),
        _of(long, FEEDBACK[:2]),
        *(_of(study, WIDE[:2]) for study in widths[:1]),
        *(_of(study, ("Dion 1",)) for study in outer),
        _of(core, SECOND[:4]),
        _of(transformer, VISION),
        _of(core, SECOND[4:]),
        *(_of(study, WIDE[:2]) for study in widths[1:2]),
        *(_of(study, WIDE[2:4]) for study in widths[:2]),
        *(_of(study, ("AdamW", "Muon", "Dion 1")) for study in inner),
        _of(resnet, VISION),
        _of(long, FEEDBACK[2:]),
        _of(core, THIRD),
        *(_of(study, WIDE) for study in widths),
        _of(core, LAST),
    ]
    return list(dict.fromkeys(task for part in parts for task in part))


def _of(study: Study, labels: tuple[str, ...]) -> list[Task]:
    return [Task(study, ENTRIES[label]) for label in labels]


SCALES: Mapping[str, Scale] = {
    "tiny": Scale(),
    "small": Scale(
        spec=Spec(width=128, layers=4, length=64),
        core_steps=400,
        long_steps=1000,
        widths=(128, 256, 384),
    ),
    "160m": Scale(
        spec=Spec(width=768, layers=12, length=1024, heads=6),
        core_batch=1024,
        core_steps=3000,
        batches=(8192, 64, 256, 4096),
        long_steps=6000,
        widths=(768, 384, 1536),
        micro=16,
        scalar_lr=2e-3,
        schedule="trapezoid",
    ),
}
"""By the name that --preset takes. "160m" is the size and schedule of microsoft/dion: bring a GPU and a text."""
