"""What judgements come to over the cases of a group: the worst, the mean, the counts in all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optc.optimizer.compare import number
from optc.optimizer.detection import BANDS
from optc.optimizer.judgement import Judgement


@dataclass(frozen=True, slots=True)
class Measure:
    """What came of one thing that is asked, over the cases of a group.

    Attributes:
        outputs: Names of the outputs, several where they are boxes together.
        metric: As in `Judgement`.
        limit: What is asked.
        worst: The value of the worst case.
        mean: The mean over the cases.
        badness: Of the worst case.
        counts: For a share: how many are as they should be, and of how many, in all cases.
        cases: In how many it was measured.
    """

    outputs: tuple[str, ...]
    metric: str
    limit: float
    worst: float
    mean: float
    badness: float
    counts: tuple[int, int] | None
    cases: int

    @classmethod
    def of(cls, judged: Sequence[Judgement]) -> Measure:
        """Return what judgements of the same thing come to."""
        worst = max(judged, key=lambda each: (each.badness, -each.value))
        values = [each.value for each in judged]
        counts = [each.counts for each in judged if each.counts is not None]
        return cls(
            worst.outputs,
            worst.metric,
            worst.limit,
            worst.value,
            float(np.mean(values)) if np.isfinite(values).all() else worst.value,
            worst.badness,
            (sum(good for good, _ in counts), sum(of for _, of in counts)) if counts else None,
            len(judged),
        )

    def as_json(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "outputs": list(self.outputs),
            "metric": self.metric,
            "limit": number(self.limit),
            "worst": number(self.worst),
            "mean": number(self.mean),
            "badness": number(self.badness),
            "counts": None if self.counts is None else list(self.counts),
            "cases": self.cases,
        }


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """What came of a group of inputs.

    Attributes:
        group: Its name; None for made-up input and what is in no group.
        cases: How many of its inputs were compared.
        not_met: How many findings of it are not met.
        measures: What was measured, the worst first; of boxes the low scores before the high.
    """

    group: str | None
    cases: int
    not_met: int
    measures: tuple[Measure, ...]

    @property
    def badness(self) -> float:
        """Of the worst measure."""
        return max((measure.badness for measure in self.measures), default=0.0)

    def as_json(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "group": self.group,
            "cases": self.cases,
            "not_met": self.not_met,
            "measures": [measure.as_json() for measure in self.measures],
        }


def figures_of(
    judged: Iterable[tuple[str | None, str, Judgement]], not_met: Mapping[str | None, int]
) -> list[GroupFigures]:
    """Return the figures of each group, the worst group first.

    Args:
        judged: Group, case and judgement.
        not_met: Group -> how many findings of it are not met.
    """
    by_group: dict[str | None, dict[tuple[tuple[str, ...], str], list[Judgement]]] = {}
    cases: dict[str | None, set[str]] = {}
    for group, case, judgement in judged:
        key = (judgement.outputs, judgement.metric)
        by_group.setdefault(group, {}).setdefault(key, []).append(judgement)
        cases.setdefault(group, set()).add(case)
    figures = [
        GroupFigures(
            group,
            len(cases[group]),
            not_met.get(group, 0),
            tuple(sorted(map(Measure.of, same.values()), key=_worst_first)),
        )
        for group, same in by_group.items()
    ]
    return sorted(figures, key=lambda each: (-each.badness, each.group is None))


def _worst_first(measure: Measure) -> tuple[int, float]:
    """What measures are sorted by; the bands of boxes before all, low scores before high ones."""
    place = BANDS.index(measure.metric) if measure.metric in BANDS else len(BANDS)
    return (place, -measure.badness)
