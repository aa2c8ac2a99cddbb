"""How outputs measure up to one thing that is asked of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optc.optimizer.compare import number


@dataclass(frozen=True, slots=True)
class Judgement:
    """How outputs measure up to one thing that is asked of them.

    Attributes:
        outputs: Their names; several where they are boxes together.
        metric: What was measured: ``tolerance``, ``of_scale``, ``sqnr_db``, ``cosine``, ``top_k``,
            ``agreement``, ``scores``; of boxes `optc.optimizer.detection` says more; ``output``, ``dtype``,
            ``shape``, ``finite`` where nothing could be measured.
        value: What came out.
        limit: What is asked: the most for a difference, the least for what should be large.
        badness: The share used up of what is allowed; infinite where nothing can be measured.
        words: For people.
        counts: For a share: how many are as they should be, and of how many.
    """

    outputs: tuple[str, ...]
    metric: str
    value: float
    limit: float
    badness: float
    words: str
    counts: tuple[int, int] | None = None

    @property
    def met(self) -> bool:
        """Whether it is as asked."""
        return self.badness <= 1

    def as_json(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "outputs": list(self.outputs),
            "metric": self.metric,
            "value": number(self.value),
            "limit": number(self.limit),
            "badness": number(self.badness),
            "words": self.words,
            "counts": None if self.counts is None else list(self.counts),
        }


def badness_of_misses(missed: int, total: int, least: float) -> float:
    """Return the badness where ``missed`` of ``total`` are not as they should be.

    Args:
        missed: How many are not.
        total: Of how many.
        least: The share that must be: with 0.99, one of 100 may be missed, and none of 99.

    Example:
        >>> round(badness_of_misses(1, 100, 0.99), 6), badness_of_misses(0, 1, 1.0)
        (1.0, 0.0)
        >>> badness_of_misses(1, 10, 0.99) > 1
        True
    """
    if not missed:
        return 0.0
    most = (1 - least) * total
    # 0.1 is a little less than a tenth; that must not make of one in ten one too many.
    return missed / (most * (1 + 1e-9)) if most > 0 else 1.0 + missed


def badness_of_excess(value: float, most: float) -> float:
    """Return the badness of a difference of ``value`` where ``most`` is allowed."""
    if most > 0:
        return value / most
    return math.inf if value > 0 else 0.0
