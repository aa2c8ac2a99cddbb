"""What is asked of the outputs, and how outputs measure up to it.

What a spec says in ``verify:`` is looked up for each output, from the particular to the general:
what its group says of the output, what its group says, what ``verify`` says of the output, what
``verify`` says; the first that says something for outputs of that kind holds, and all that it says.
Where nobody says anything, the default of the precision does (`DEFAULTS`).

Floats are held against ``atol`` and ``rtol``, ``of_scale``, ``sqnr_db``, ``cosine`` and ``top_k``;
integers, bools and texts against ``agreement``, and integers that are called by name against any of
them. Shape and dtype are always the same, and what is finite stays finite.

Outputs that together are boxes are compared as sets (`optc.optimizer.detection`): where the spec
names them, and in any precision below fp32 where their shapes and values show it and the spec asks
nothing of them by name.

Where a detector gives coordinates in pixels and scores in one output, its scale is that of the
pixels, and would let any error of a score pass: the scores are held against `SCORES` as well.

A judgement carries its badness: the share that is used up of what is allowed, above 1 where it is
not met. It is what a search minimises, so it grows with the error, and nothing here costs more than
a few passes over an output, piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from optc.optimizer import detection
from optc.optimizer.compare import (
    LEAST_SCORE,
    Tolerance,
    allowed,
    errors,
    is_inexact,
    is_text,
    least_scale,
    wide,
)
from optc.optimizer.detection import BoxSet
from optc.optimizer.judgement import Judgement, badness_of_excess, badness_of_misses
from optc.specs.compile_spec import Demands, Detections, Exactness, PrecisionName, TopK, Verify

Array = npt.NDArray[Any]

DEFAULTS: Mapping[PrecisionName, Exactness] = {
    "fp32": Exactness(of_scale=1e-4, agreement=1.0),
    "tf32": Exactness(of_scale=5e-3, agreement=0.99),
    "fp16": Exactness(of_scale=5e-3, agreement=0.99),
    "bf16": Exactness(of_scale=3e-2, agreement=0.98),
    "int8": Exactness(sqnr_db=20.0, agreement=0.95),
    "fp8": Exactness(sqnr_db=20.0, agreement=0.95),
}
"""Precision -> what is asked of an output where the spec asks nothing of it."""

OTHER_TOLERANCE = 1e-4
"""What ``atol`` or ``rtol`` is where a spec gives only the other of them."""

SCORES: Mapping[PrecisionName, float] = {
    "fp32": 1e-4,
    "tf32": 5e-3,
    "fp16": 5e-3,
    "bf16": 3e-2,
    "int8": 0.1,
    "fp8": 0.1,
}
"""Precision -> the most that scores may be off by that stand beside coordinates in one output, where
the spec asks nothing of it. Of the scale of pixels any error of a score is small."""
COORDINATES = 4

PIECE = 1 << 16
"""Elements measured at a time: what the steps on the way need stays in the cache."""

INDEX_COLUMNS = 3
"""Of what NonMaxSuppression gives: image, class, box."""

_FOR_FLOATS = ("atol", "rtol", "of_scale", "sqnr_db", "cosine", "top_k")
_FOR_OTHERS = ("agreement",)


class Output(Protocol):
    """What is known of an output beforehand: as a manifest has it."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def dtype(self) -> str:
        """Name of its dtype."""
        ...

    @property
    def shape(self) -> tuple[str | int, ...] | None:
        """Extents and symbols."""
        ...


@dataclass(frozen=True, slots=True)
class Criteria:
    """What is asked of the outputs of one model.

    Attributes:
        asked: What the spec says.
        precision: Whose defaults hold.
        outputs: What is known of the outputs, in the model's order.
    """

    asked: Verify
    precision: PrecisionName
    outputs: tuple[Output, ...]

    @classmethod
    def of(
        cls, verify: Verify | None, precision: PrecisionName, outputs: Sequence[Output]
    ) -> Criteria:
        """Return what ``verify`` asks; where it is None, the defaults of ``precision``."""
        return cls(verify or Verify(), precision, tuple(outputs))

    def judge(
        self,
        expected: Mapping[str, Array],
        found: Mapping[str, Array],
        group: str | None = None,
    ) -> list[Judgement]:
        """Return how ``found`` measures up to ``expected``, the worst judgement first.

        Args:
            expected: What the original gives: name of an output -> its array.
            found: What is to be judged.
            group: Name of the group that the input belongs to; None for no group of the spec's.
        """
        judgements: list[Judgement] = []
        by_element = dict.fromkeys(expected)
        for boxes, asked in self._boxes(expected, found, group):
            standard = detection.STANDARDS[self.precision]
            judgements += detection.judge(boxes, expected, found, standard, asked)
            for name in boxes.names:
                if name not in self._by_name(group):
                    by_element.pop(name, None)
        for name in by_element:
            judgements += self._judged(name, expected[name], found.get(name), group)
        return sorted(judgements, key=lambda judgement: -judgement.badness)

    def badness(
        self,
        expected: Mapping[str, Array],
        found: Mapping[str, Array],
        group: str | None = None,
    ) -> float:
        """Return the badness of the worst judgement; 0 where there is nothing to judge."""
        return max((each.badness for each in self.judge(expected, found, group)), default=0.0)

    def __str__(self) -> str:
        """Return what is asked of floats in general, and whether more is asked of some."""
        asked = self.asked
        told = {
            name: getattr(asked, name) for name in _FOR_FLOATS if getattr(asked, name) is not None
        }
        if told:
            text = in_words(Exactness.model_construct(**told))
        else:
            text = f"{in_words(DEFAULTS[self.precision])}, the default of {self.precision}"
        special = asked.outputs or any(
            _says_something(group) or group.outputs for group in asked.groups.values()
        )
        return f"within {text}" + (", or what is asked of single ones" if special else "")

    def exactness(self, output: str, array: Array, group: str | None = None) -> Exactness:
        """Return what is asked of an output, of which ``array`` is an example."""
        return self._said(output, array, group) or self._default(array)

    def _said(self, output: str, array: Array, group: str | None) -> Exactness | None:
        """Return what the spec asks of an output, if anything."""
        for said, by_name in self._layers(output, group):
            kept = _applying(said, array, by_name=by_name)
            if kept.model_fields_set:
                return kept
        return None

    def _default(self, array: Array) -> Exactness:
        return _applying(DEFAULTS[self.precision], array, by_name=False)

    def tolerance(self, output: str, array: Array, group: str | None = None) -> Tolerance:
        """Return what each element of an output may be off by; without end where that is not asked."""
        return tolerance_of(self.exactness(output, array, group))

    def _layers(self, output: str, group: str | None) -> Iterator[tuple[Exactness, bool]]:
        """Yield what the spec says, the particular first, and whether it calls ``output`` by name."""
        for level in self._levels(group):
            if output in level.outputs:
                yield level.outputs[output], True
            yield level, False

    def _boxes(
        self, expected: Mapping[str, Array], found: Mapping[str, Array], group: str | None
    ) -> list[tuple[BoxSet, Detections | None]]:
        """Return the outputs that together are boxes, and what the spec asks of them."""
        told = next((level.detections for level in self._levels(group) if level.detections), ())
        among = [name for name in expected if name not in self._by_name(group)]
        if told:
            return [*detection.named(told, expected, among)]
        if self.precision == "fp32":
            return []
        return [
            (boxes, None) for boxes in detection.recognised(self.outputs, expected, found, among)
        ]

    def _by_name(self, group: str | None) -> set[str]:
        """Return the outputs that something is asked of by name."""
        return {name for level in self._levels(group) for name in level.outputs}

    def _levels(self, group: str | None) -> list[Demands]:
        """Return where the spec may say something, the particular first."""
        if group is not None and group in self.asked.groups:
            return [self.asked.groups[group], self.asked]
        return [self.asked]

    def _judged(
        self, name: str, expected: Array, found: Array | None, group: str | None
    ) -> list[Judgement]:
        said = self._said(name, expected, group)
        asked = said or self._default(expected)
        least = asked.agreement
        if (
            least is not None
            and found is not None
            and self._rows_come_and_go(name, expected, found)
        ):
            return [_rows_in_common(name, expected, found, least)]
        if fault := _why_not_measured(name, expected, found):
            return [fault]
        assert found is not None, "that is a fault"
        judgements = list(_measured(name, expected, found, asked))
        if said is None and (scores := score_columns(expected)) is not None:
            judgements.append(_scores(name, expected, found, scores, SCORES[self.precision]))
        return judgements

    def _rows_come_and_go(self, name: str, expected: Array, found: Array) -> bool:
        """Whether an output is a list of rows of indices, such as NonMaxSuppression gives.

        In fp32 such a list is held against the original's, row by row, and against its noise.
        """
        if (
            self.precision == "fp32"
            or expected.dtype != found.dtype
            or expected.dtype.kind not in "iu"
        ):
            return False
        shape = next((each.shape for each in self.outputs if each.name == name), None)
        if expected.ndim != 2 or found.ndim != 2 or shape is None or len(shape) != 2:
            return False
        differ = [axis for axis in (0, 1) if expected.shape[axis] != found.shape[axis]]
        if not differ:
            return isinstance(shape[0], str) and expected.shape[1] == INDEX_COLUMNS
        return len(differ) == 1 and isinstance(shape[differ[0]], str)


def tolerance_of(asked: Exactness) -> Tolerance:
    """Return the tolerance of single elements that ``asked`` comes to.

    Example:
        >>> tolerance_of(Exactness(atol=0.5))
        Tolerance(atol=0.5, rtol=0.0001, of_scale=inf, most=inf)
        >>> tolerance_of(Exactness(of_scale=0.01)).on(np.array([1.0, -200.0])).of(3.0)
        2.0
    """
    of_scale = math.inf if asked.of_scale is None else asked.of_scale
    if asked.atol is None and asked.rtol is None:
        return Tolerance(of_scale=of_scale)
    atol = OTHER_TOLERANCE if asked.atol is None else asked.atol
    rtol = OTHER_TOLERANCE if asked.rtol is None else asked.rtol
    return Tolerance(atol, rtol, of_scale)


def in_words(asked: Exactness) -> str:
    """Return what ``asked`` comes to, for people.

    Example:
        >>> in_words(Exactness(of_scale=5e-3, cosine=0.999))
        '0.005 of the scale, cosine 0.999'
    """
    parts = []
    if asked.atol is not None or asked.rtol is not None:
        limit = tolerance_of(asked)
        parts.append(f"atol {limit.atol:g}, rtol {limit.rtol:g}")
    if asked.of_scale is not None:
        parts.append(f"{asked.of_scale:g} of the scale")
    if asked.sqnr_db is not None:
        parts.append(f"SQNR {asked.sqnr_db:g} dB")
    if asked.cosine is not None:
        parts.append(f"cosine {_near_one(asked.cosine)}")
    if asked.top_k is not None:
        parts.append(f"top {asked.top_k.k} the same in {asked.top_k.agreement:.4g}")
    if asked.agreement is not None and not parts:
        parts.append(f"{asked.agreement:.4g} equal")
    return ", ".join(parts)


def _applying(said: Exactness, array: Array, *, by_name: bool) -> Exactness:
    """Return of what is said what applies to an output such as ``array``."""
    fields = set(_FOR_FLOATS if is_inexact(array) else _FOR_OTHERS)
    if by_name and array.dtype.kind in "iu":
        fields |= set(_FOR_FLOATS)
    told = {name: getattr(said, name) for name in fields if getattr(said, name) is not None}
    if (best := told.get("top_k")) is not None and not _has_axis(array, best.axis):
        del told["top_k"]
    return Exactness.model_construct(_fields_set=set(told), **told)


def _says_something(asked: Exactness) -> bool:
    return any(getattr(asked, name) is not None for name in (*_FOR_FLOATS, *_FOR_OTHERS))


def _numeric(asked: Exactness) -> bool:
    told = (asked.atol, asked.rtol, asked.of_scale, asked.sqnr_db, asked.cosine)
    return any(each is not None for each in told)


def _has_axis(array: Array, axis: int) -> bool:
    return array.dtype.kind != "c" and -array.ndim <= axis < array.ndim


# --- measuring -----------------------------------------------------------------------------------


def _why_not_measured(name: str, expected: Array, found: Array | None) -> Judgement | None:
    """Return the judgement of what cannot be measured at all."""

    def fault(metric: str, words: str) -> Judgement:
        return Judgement((name,), metric, math.inf, 0.0, math.inf, words)

    if found is None:
        return fault("output", "it is missing")
    if expected.dtype != found.dtype and not (is_text(expected) and is_text(found)):
        return fault("dtype", f"it is {found.dtype}, not {expected.dtype}")
    if expected.shape != found.shape:
        return fault("shape", f"its shape is {list(found.shape)}, not {list(expected.shape)}")
    return None


def _rows_in_common(name: str, expected: Array, found: Array, least: float) -> Judgement:
    """Return the judgement of lists of rows, wherever in them a row stands."""
    if expected.shape[1] != found.shape[1]:
        expected, found = expected.T, found.T
    most = max(len(expected), len(found))
    same = 0
    if len(expected) and len(found):
        _, rows = np.unique(np.concatenate([expected, found]), axis=0, return_inverse=True)
        rows = rows.reshape(-1)
        mine = np.bincount(rows[: len(expected)], minlength=rows.max() + 1)
        theirs = np.bincount(rows[len(expected) :], minlength=rows.max() + 1)
        same = int(np.minimum(mine, theirs).sum())
    return Judgement(
        (name,),
        "agreement",
        same / most if most else 1.0,
        least,
        badness_of_misses(most - same, most, least),
        f"{same} of {most} rows are in both, asked {least:.4g}",
        (same, most),
    )


def _measured(name: str, expected: Array, found: Array, asked: Exactness) -> Iterator[Judgement]:
    """Yield a judgement for each thing that is asked; arrays of one shape and dtype."""

    def judgement(
        metric: str,
        value: float,
        limit: float,
        badness: float,
        words: str,
        counts: tuple[int, int] | None = None,
    ) -> Judgement:
        return Judgement((name,), metric, value, limit, badness, words, counts)

    limit = tolerance_of(asked)
    if asked.agreement is not None:
        equal = int(np.sum(np.asarray(expected == found, dtype=bool)))
        share = equal / expected.size if expected.size else 1.0
        yield judgement(
            "agreement",
            share,
            asked.agreement,
            badness_of_misses(expected.size - equal, expected.size, asked.agreement),
            f"{equal} of {expected.size} equal, asked {asked.agreement:.4g}",
            (equal, expected.size),
        )
    if asked.top_k is not None:
        same, places = _best_the_same(expected, found, asked.top_k)
        yield judgement(
            "top_k",
            same / places if places else 1.0,
            asked.top_k.agreement,
            badness_of_misses(places - same, places, asked.top_k.agreement),
            f"top {asked.top_k.k} the same in {same} of {places}, asked "
            f"{asked.top_k.agreement:.4g}",
            (same, places),
        )
    if not is_inexact(expected) and not _numeric(asked):
        return
    elementwise = math.isfinite(limit.atol)
    figures = _Figures.of(
        expected,
        found,
        Tolerance(limit.atol, limit.rtol) if elementwise else None,
        powers=asked.sqnr_db is not None or asked.cosine is not None,
    )
    if figures.special:
        words = f"{figures.special} elements are NaN or infinite on one side only"
        yield judgement("finite", float(figures.special), 0.0, math.inf, words)
    if elementwise:
        words = f"{figures.used:.2g} of what atol {limit.atol:g}, rtol {limit.rtol:g} allow"
        yield judgement("tolerance", figures.used, 1.0, figures.used, words)
    if asked.of_scale is not None:
        value = figures.max_abs / figures.scale
        yield judgement(
            "of_scale",
            value,
            asked.of_scale,
            badness_of_excess(value, asked.of_scale),
            f"{value:.2g} of the scale, allowed {asked.of_scale:g}",
        )
    if asked.sqnr_db is not None:
        value = figures.sqnr_db
        yield judgement(
            "sqnr_db",
            value,
            asked.sqnr_db,
            10 ** ((asked.sqnr_db - value) / 20),
            f"SQNR {value:.1f} dB, asked {asked.sqnr_db:g} dB",
        )
    if asked.cosine is not None:
        value = figures.cosine
        yield judgement(
            "cosine",
            value,
            asked.cosine,
            # Of two equal arrays it is not always 1 to the last bit.
            badness_of_excess(max(0.0, 1 - value - 1e-12), 1 - asked.cosine),
            f"cosine {_near_one(value)}, asked {_near_one(asked.cosine)}",
        )


def _near_one(value: float) -> str:
    """Return a cosine so that how far from 1 it is can be told."""
    return f"{value:.6g}" if value == 1 or abs(1 - value) > 1e-5 else f"1 - {1 - value:.1e}"


def score_columns(array: Array) -> tuple[slice, ...] | None:
    """Return where scores stand in the raw output of a detector, or None where it is none.

    Such an output has three axes; along the shorter of the last two there are four coordinates
    (in pixels, or nothing would be lost), then scores from 0 to 1, then whatever else.
    """
    if array.ndim != 3 or not array.size or not is_inexact(array) or array.dtype.kind == "c":
        return None
    axis = 1 if array.shape[1] < array.shape[2] else 2
    if array.shape[axis] <= COORDINATES:
        return None
    other = tuple(each for each in range(3) if each != axis)

    def columns(start: int, stop: int) -> tuple[slice, ...]:
        return tuple(slice(start, stop) if each == axis else slice(None) for each in range(3))

    def are_scores(start: int, stop: int) -> Array:
        part = array[columns(start, stop)]
        return np.asarray((part.min(axis=other) >= 0) & (part.max(axis=other) <= 1))

    with np.errstate(invalid="ignore"):  # a NaN is no coordinate, and no score
        first = array[columns(0, COORDINATES)].max(axis=other)
        if not (first > 2).all() or not are_scores(COORDINATES, COORDINATES + 1).all():
            return None
        run = are_scores(COORDINATES, array.shape[axis])
    stop = COORDINATES + (int(run.argmin()) if not run.all() else run.size)
    known = columns(COORDINATES, stop)
    return known if bool((array[known] > 0).any()) else None


def _scores(
    name: str, expected: Array, found: Array, where: tuple[slice, ...], most: float
) -> Judgement:
    want, got = wide(expected[where]), wide(found[where])
    value = float(errors(want, got).max())
    return Judgement(
        (name,),
        "scores",
        value,
        most,
        badness_of_excess(value, most),
        f"scores beside coordinates are off by {value:.2g}, allowed {most:g}",
    )


def _best_the_same(expected: Array, found: Array, asked: TopK) -> tuple[int, int]:
    """Return in how many places the best entries are the same, and how many places there are.

    Entries that are equal in what is expected stand for each other.
    """
    want = np.moveaxis(expected, asked.axis, -1)
    got = np.moveaxis(found, asked.axis, -1)
    extent = want.shape[-1]
    places = want.size // extent if extent else 0
    k = min(asked.k, extent)
    if not places:
        return 0, 0
    want, got = want.reshape(places, extent), got.reshape(places, extent)
    same = 0
    step = max(1, (1 << 20) // extent)
    for start in range(0, places, step):
        # A NaN is never among the best.
        w, g = (
            np.where(np.isnan(part), -np.inf, part)
            for part in (wide(want[start : start + step]), wide(got[start : start + step]))
        )
        best = g.argmax(axis=1)[:, None] if k == 1 else np.argpartition(-g, k - 1, axis=1)[:, :k]
        chosen = np.sort(np.take_along_axis(w, best, axis=1), axis=1)
        largest = np.sort(np.partition(w, extent - k, axis=1)[:, extent - k :], axis=1)
        same += int((chosen == largest).all(axis=1).sum())
    return same, places


@dataclass(slots=True)
class _Figures:
    """Sums and maxima over two arrays of one shape.

    Attributes:
        max_abs: Largest difference, where both are finite.
        largest: Largest finite magnitude expected.
        used: Largest share of the tolerance that an element uses up.
        special: Elements where one side only is finite, or the infinities differ.
        signal: Sum of the squares of what is expected.
        noise: Sum of the squares of the differences.
        other: Sum of the squares of what is found.
        product: Sum of the products of both.
        elements: How many there are.
    """

    max_abs: float = 0.0
    largest: float = 0.0
    used: float = 0.0
    special: int = 0
    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0
    elements: int = 0
    are_scores: bool = True

    @classmethod
    def of(
        cls, expected: Array, found: Array, tolerance: Tolerance | None, *, powers: bool
    ) -> _Figures:
        """Measure ``found``; what is to be held against a tolerance, and powers, on demand only."""
        figures = cls(elements=expected.size)
        flat, other = expected.reshape(-1), found.reshape(-1)
        for start in range(0, flat.size, PIECE):
            want, got = wide(flat[start : start + PIECE]), wide(other[start : start + PIECE])
            figures._add(want, got, tolerance, powers=powers)
        return figures

    def _add(self, want: Array, got: Array, tolerance: Tolerance | None, *, powers: bool) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(got - want)
        size = np.abs(want)
        most = float(error.max())
        if not math.isfinite(most):
            error = errors(want, got)
            self.special += int(np.isinf(error).sum())
            usable = np.isfinite(error) & np.isfinite(size)
            error, size, want, got = error[usable], size[usable], want[usable], got[usable]
            most = float(error.max(initial=0.0))
        self.max_abs = max(self.max_abs, most)
        self.largest = max(self.largest, float(size.max(initial=0.0)))
        self.are_scores = (
            self.are_scores and want.dtype.kind != "c" and bool(((want >= 0) & (want <= 1)).all())
        )
        if tolerance is not None and most:
            with np.errstate(divide="ignore", invalid="ignore"):
                used = np.where(error == 0, 0.0, error / allowed(want, tolerance))
            self.used = max(self.used, float(used.max(initial=0.0)))
        if powers:
            self.signal += _product(size, size)
            self.noise += _product(error, error)
            self.other += _product(got, got)
            self.product += _product(want, got)

    @property
    def scale(self) -> float:
        """The largest magnitude expected: see `optc.optimizer.compare.scale_of`."""
        return least_scale(self.largest, are_scores=self.are_scores)

    @property
    def sqnr_db(self) -> float:
        """Signal to noise; a signal of nothing but zeros counts as ones, scores as one at least."""
        if not self.noise:
            return math.inf
        signal = self.signal or self.elements
        if self.signal and self.are_scores:
            signal = max(signal, LEAST_SCORE**2)
        return 10 * math.log10(signal / self.noise)

    @property
    def cosine(self) -> float:
        """1 of two arrays of zeros, 0 where only one is."""
        if not self.signal or not self.other:
            return float(self.signal == self.other)
        return self.product / math.sqrt(self.signal) / math.sqrt(self.other)


def _product(left: Array, right: Array) -> float:
    # Not a BLAS dot product: on pieces of this size its threads wait for each other.
    return float(np.einsum("i,i->", left, right.conj()).real)
