"""The public claims, each held against what was measured here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conformance.convergence.contenders import is_contender
from conformance.convergence.spread import Interval, interval, steps_to, within_seeds
from conformance.convergence.studies import Study
from conformance.convergence.sweep import Result

SHOWN = "shown"
NOT_SHOWN = "not shown at this scale"
CONTRADICTED = "contradicted at this scale"
NOT_MEASURED = "not measured"
NEAR = 0.01
"""Two losses are "near" if they are within this share of the smaller one."""
Seeds = Mapping[int, float]


@dataclass(frozen=True)
class Verdict:
    """One claim in one setting.

    Attributes:
        claim: in words.
        setting: workload, batch, steps.
        verdict: SHOWN, NOT_SHOWN, CONTRADICTED or NOT_MEASURED.
        effect: what was measured.
        low, high: its 95% interval, over the same seeds of both sides.
        unit: of the effect.
    """

    claim: str
    setting: str
    verdict: str
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    unit: str = ""


def smaller(a: Seeds, b: Seeds) -> tuple[str, Interval]:
    """Is `a` smaller than `b`? The interval is that of a - b over the seeds of both.

    Shown only if the intervals of a and of b do not overlap, contradicted likewise the other way round.  They are
    those of `within_seeds`: a seed gives all rules the same weights and batches, and what it does to all is no
    difference between them.
    """
    seeds = sorted(set(a) & set(b))
    difference = interval([a[seed] - b[seed] for seed in seeds])
    own, other = within_seeds([{seed: side[seed] for seed in seeds} for side in (a, b)])
    apart = not own.overlaps(other)
    if apart and difference.high < 0:
        return SHOWN, difference
    if apart and difference.low > 0:
        return CONTRADICTED, difference
    return NOT_SHOWN, difference


def near(a: Seeds, b: Seeds) -> tuple[str, Interval]:
    """Is `a` at most `NEAR` above `b`? Shown only if all of the interval of a - b is; contradicted if none of it."""
    seeds = sorted(set(a) & set(b))
    difference = interval([a[seed] - b[seed] for seed in seeds])
    allowed = NEAR * min((b[seed] for seed in seeds), default=math.nan)
    if difference.high <= allowed:
        return SHOWN, difference
    if difference.low > allowed:
        return CONTRADICTED, difference
    return NOT_SHOWN, difference


class Measured:
    """The results of a sweep, by study and label."""

    def __init__(self, results: Sequence[Result]) -> None:
        """Takes every result that has its losses."""
        self.results = [result for result in results if result.final]
        self._by = {(r.task.study.name, r.task.entry.label): r for r in self.results}

    def get(self, study: str, label: str) -> Result | None:
        """A result, or None."""
        return self._by.get((study, label))

    def target(self, study: str) -> float | None:
        """AdamW's mean loss at the study's budget."""
        reference = self.get(study, "AdamW")
        return interval(list(reference.final.values())).mean if reference else None

    def within(self, study: str) -> dict[str, Interval]:
        """Losses at the study's budget by label, with intervals within seeds (`spread.within_seeds`)."""
        some = [result for result in self.results if result.task.study.name == study]
        seeds = set.intersection(*(set(result.final) for result in some))
        sides = [{seed: result.final[seed] for seed in sorted(seeds)} for result in some]
        labels = [result.task.entry.label for result in some]
        return dict(zip(labels, within_seeds(sides), strict=True))

    def steps(self, study: str, label: str) -> dict[int, float]:
        """Steps to AdamW's loss by seed; infinite where the seed never reached it (see `spread.steps_to`)."""
        result, target = self.get(study, label), self.target(study)
        if result is None or target is None or not math.isfinite(target):
            return {}
        found = {}
        for seed in result.final:
            steps = steps_to(target, {n: by[seed] for n, by in result.losses.items() if seed in by})
            if steps is not None:
                found[seed] = steps
        return found

    def ratios(self, study: str, label: str, reference: str = "AdamW") -> dict[int, float]:
        """Steps over those of `reference`, seed by seed; infinite where the rule never reached AdamW's loss."""
        own, theirs = self.steps(study, label), self.steps(study, reference)
        both = [seed for seed in own if math.isfinite(theirs.get(seed, math.inf))]
        return {seed: own[seed] / theirs[seed] for seed in both}

    def studies(self, *kinds: str) -> list[str]:
        """Names of the studies of these kinds, in the order in which they were done."""
        return list(dict.fromkeys(r.task.study.name for r in self.results if r.task.study.kind in kinds))

    def _study(self, name: str) -> Study:
        return next(r.task.study for r in self.results if r.task.study.name == name)

    def batch_of(self, study: str) -> int:
        """The study's batch size."""
        return self._study(study).batch

    def budget_of(self, study: str) -> int:
        """The step budget at which the study's rules were tuned."""
        return self._study(study).steps

    def workload(self, study: str) -> str:
        """Its title."""
        return self._study(study).spec.title

    def unit(self, study: str) -> str:
        """Of its loss."""
        return self._study(study).spec.unit

    def title(self, study: str) -> str:
        """Workload and batch size."""
        one = self._study(study)
        return f"{one.spec.title}, batch {one.batch}"

    def setting(self, study: str) -> str:
        """Workload, batch size and steps."""
        one = self._study(study)
        return f"{self.title(study)}, {one.steps} steps"


def verdicts(measured: Measured) -> list[Verdict]:
    """Every claim that the results speak to; a claim without results is listed as not measured.

    Where there are contenders, what is asked of them, and no public claim.
    """
    if any(is_contender(result.task.entry.algorithm) for result in measured.results):
        return [*_fewer_steps(measured), *_of_contenders(measured)]
    return [
        *_fewer_steps(measured),
        *_grows_with_batch(measured),
        *_close("a quarter of the rank is near full rank (Dion)", measured, (("Dion 1/4", "Dion 1"),)),
        *_feedback(measured),
        *_close(
            "half or a quarter of the slices is near Muon (Dion2)",
            measured,
            (("Dion2 1/2", "Muon"), ("Dion2 1/4", "Muon")),
        ),
        *_close(
            "half or a quarter of the rows is near NorMuon (Dion3)",
            measured,
            (("Dion3 1/2", "NorMuon"), ("Dion3 1/4", "NorMuon")),
        ),
        *_narrows(measured),
        *_better("NorMuon has a smaller loss at equal steps than Muon", measured, (("NorMuon", "Muon"),)),
        *_better(
            "Orth-Dion has a smaller loss at equal steps than Dion",
            measured,
            tuple((f"Orth-Dion {f}", f"Dion {f}") for f in ("1", "1/4", "1/16")),
        ),
        Verdict(
            "two to three times less time to a target loss at 3B parameters; ten times less optimizer time at 405B",
            "out of reach of training here: see `conformance plan`",
            NOT_MEASURED,
        ),
    ]


def _none(claim: str) -> list[Verdict]:
    return [Verdict(claim, "no finished study", NOT_MEASURED)]


def _fewer_steps(measured: Measured) -> list[Verdict]:
    made = []
    for study in measured.studies("batch", "vision"):
        for label in dict.fromkeys(
            r.task.entry.label for r in measured.results if r.task.study.name == study
        ):
            own, reference = measured.steps(study, label), measured.steps(study, "AdamW")
            if label == "AdamW" or len(own) < 2:
                continue
            verdict, _ = smaller(own, reference)
            ratio = interval(list(measured.ratios(study, label).values()))
            claim = f"fewer steps than AdamW to the same loss ({label})"
            late = sum(map(math.isinf, own.values()))
            never = f"; {late} of {len(own)} seeds never reached it" if late else ""
            made.append(
                Verdict(
                    claim,
                    measured.setting(study) + never,
                    verdict,
                    ratio.mean,
                    ratio.low,
                    ratio.high,
                    "x AdamW's steps",
                )
            )
    return made or _none("fewer steps than AdamW to the same loss")


def _grows_with_batch(measured: Measured) -> list[Verdict]:
    """By the slope of the ratio's logarithm over all batch sizes, seed by seed.

    Shown only if the ratios' own intervals at the two ends do not overlap either: seeds share the weights of all batch
    sizes, not the batches.
    """
    made = []
    studies = sorted(measured.studies("batch"), key=measured.batch_of)
    for label in ("Muon", "Dion 1"):
        found = {measured.batch_of(study): measured.ratios(study, label) for study in studies}
        ratios = {batch: by_seed for batch, by_seed in found.items() if len(by_seed) >= 2}
        if len(ratios) < 2:
            continue
        slope = interval(_slopes(ratios))
        first, last = (interval(list(ratios[batch].values())) for batch in (min(ratios), max(ratios)))
        verdict = NOT_SHOWN
        if not first.overlaps(last) and slope.high < 0:
            verdict = SHOWN
        elif not first.overlaps(last) and slope.low > 0:
            verdict = CONTRADICTED
        made.append(
            Verdict(
                f"the margin over AdamW grows with the batch size ({label})",
                f"batch {', '.join(map(str, sorted(ratios)))}; {measured.budget_of(studies[0])} steps, own targets",
                verdict,
                math.exp(slope.mean),
                math.exp(slope.low),
                math.exp(slope.high),
                "x AdamW's steps for ten times the batch",
            )
        )
    return made or _none("the margin over AdamW grows with the batch size")


def _slopes(ratios: Mapping[int, Seeds]) -> list[float]:
    """Of the logarithm of the ratio over log10 of the batch size by least squares, for each seed of all batches.

    Not a number where the seed never reached the loss at some batch size.
    """
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in ratios.values())))
    x, slopes = [math.log10(batch) for batch in ratios], []
    for seed in seeds:
        y = [math.log(by[seed]) for by in ratios.values()]
        finite = all(map(math.isfinite, y))
        slopes.append(statistics.linear_regression(x, y).slope if finite else math.nan)
    return slopes


def _close(claim: str, measured: Measured, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    return _compared(claim, measured, pairs, near)


def _better(claim: str, measured: Measured, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    return _compared(claim, measured, pairs, smaller)


def _compared(
    claim: str, measured: Measured, pairs: Sequence[tuple[str, str]], compare: object
) -> list[Verdict]:
    assert callable(compare)
    made = []
    for study in measured.studies("batch", "fraction", "width", "vision"):
        for label, reference in pairs:
            a, b = measured.get(study, label), measured.get(study, reference)
            if a and b:
                verdict, gap = compare(a.final, b.final)
                made.append(
                    Verdict(
                        f"{claim}: {label}",
                        measured.setting(study),
                        verdict,
                        gap.mean,
                        gap.low,
                        gap.high,
                        f"{measured.unit(study)} above {reference}",
                    )
                )
    return made or _none(claim)


def _of_contenders(measured: Measured) -> list[Verdict]:
    """Of each contender against each known rule but AdamW: steps to AdamW's loss, and loss at equal steps."""
    labels = {result.task.entry.label: result.task.entry.algorithm for result in measured.results}
    own = [label for label, algorithm in labels.items() if is_contender(algorithm)]
    made = []
    for reference in [label for label in labels if label not in own and label != "AdamW"]:
        claim = f"fewer steps than {reference} to AdamW's loss"
        for study in measured.studies("batch", "vision"):
            for label in own:
                ratios = measured.ratios(study, label, reference)
                if len(ratios) < 2:
                    continue
                verdict, _ = smaller(measured.steps(study, label), measured.steps(study, reference))
                ratio = interval(list(ratios.values()))
                made.append(
                    Verdict(
                        f"{claim}: {label}",
                        measured.setting(study),
                        verdict,
                        ratio.mean,
                        ratio.low,
                        ratio.high,
                        f"x {reference}'s steps",
                    )
                )
        pairs = tuple((label, reference) for label in own)
        made += _better(f"a smaller loss at equal steps than {reference}", measured, pairs)
    return made


def _feedback(measured: Measured) -> list[Verdict]:
    pairs = tuple(
        (f"Dion {f}", f"Dion without error feedback {f}") for f in ("1", "1/2", "1/4", "1/8", "1/16")
    )
    return _better("error feedback pays", measured, pairs)


def _narrows(measured: Measured) -> list[Verdict]:
    made = []
    core = measured.studies("batch")[:1]
    for label, reference in (("Dion 1/4", "Dion 1"), ("Dion2 1/4", "Muon"), ("Dion2 1/2", "Muon")):
        gaps = gaps_by_width(measured, [*core, *measured.studies("width")], label, reference)
        if len(gaps) < 2:
            continue
        first, last = min(gaps), max(gaps)
        verdict, change = smaller(gaps[last], gaps[first])
        made.append(
            Verdict(
                f"the gap of {label} to {reference} narrows with the width",
                f"width {first} to {last}",
                verdict,
                change.mean,
                change.low,
                change.high,
                f"{measured.unit(measured.studies('batch', 'width')[0])} of change",
            )
        )
    return made or _none("the gap of a low rank or fraction narrows with the width")


def gaps_by_width(
    measured: Measured, studies: Sequence[str], label: str, reference: str
) -> dict[int, dict[int, float]]:
    """Loss of `label` minus that of `reference`, by width and seed."""
    gaps = {}
    for study in studies:
        a, b = measured.get(study, label), measured.get(study, reference)
        if a and b:
            seeds = sorted(set(a.final) & set(b.final))
            gaps[a.task.study.spec.width] = {seed: a.final[seed] - b.final[seed] for seed in seeds}
    return gaps
