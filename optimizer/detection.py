"""Outputs that together are boxes, held against the original's as sets.

A detector ends in a threshold, a suppression of what overlaps and a cut after so many rows. Under
the least noise two rows of nearly equal score change places, and element by element that is an
error of the whole scale. So each of the original's boxes is looked for among those found, the best
score first: of one image and class, the one that overlaps most, each at most once.

What is asked is a share by band of the original's score. From a few boxes on, one may be missed in
any case (`FEW`): one of three is not a third of the truth. A box is not counted as missed where the model's own cut decides: its score is so near the lowest one kept that noise moves
it across a threshold (which no model has above `HIGHEST_THRESHOLD`), or it ties with the last of a
full list, and another one of that score stands there instead; unless all have gone, which no cut
explains.

Boxes without area still have a place: `THICKENED` of the size of the picture, as far as the boxes
tell it, is added to each side.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from optc.optimizer.compare import is_inexact, scale_of
from optc.optimizer.judgement import Judgement, badness_of_excess, badness_of_misses
from optc.specs.compile_spec import Detections, PrecisionName
from optc.specs.diagnostic import Diagnostic, InputError

Array = npt.NDArray[Any]

HIGH, MIDDLE = 0.5, 0.2
"""Scores at which the bands part."""
BANDS = ("boxes_low", "boxes_middle", "boxes_high")
"""Metrics of the bands, in the order in which they are told: low scores move first."""
FEW: Mapping[str, int] = {"high": 3, "middle": 1, "low": 1}
"""Band -> from how many boxes on one may be missed, unless all are asked for."""
ONE_IS_FEW = 0.8
"""Badness of that one: less than 1, as whoever searches keeps a margin."""
HIGHEST_THRESHOLD = 0.5
FULL = 10
"""From so many rows on, as many on both sides are taken for a list that is cut when it is full."""
TIE = 1e-3
"""Scores nearer than this tie at the end of a full list."""
THICKENED = 1e-3
MOST_UNORDERED = 1000
"""Boxes in no order of score, of a fixed number and more than this, are a raw head, not detections."""
PAIRS = 1 << 20
"""Overlaps computed at a time."""


@dataclass(frozen=True, slots=True)
class Standard:
    """What is asked of boxes.

    Attributes:
        high: Least share matched of boxes with scores above 0.5, of either side.
        middle: Of those with scores from 0.2 to 0.5.
        overlap: Least mean overlap of the matched ones with scores from 0.2 on.
        score: Most mean difference of their scores, and of what else each box has (a mask).
        cut: How near to a threshold noise may move a score across it.
    """

    high: float
    middle: float
    overlap: float
    score: float
    cut: float


STANDARDS: Mapping[PrecisionName, Standard] = {
    "fp32": Standard(high=0.99, middle=0.95, overlap=0.95, score=1e-3, cut=1e-4),
    "tf32": Standard(high=0.98, middle=0.9, overlap=0.8, score=0.02, cut=5e-3),
    "fp16": Standard(high=0.98, middle=0.9, overlap=0.8, score=0.02, cut=5e-3),
    "bf16": Standard(high=0.95, middle=0.8, overlap=0.75, score=0.05, cut=3e-2),
    "int8": Standard(high=0.9, middle=0.6, overlap=0.7, score=0.1, cut=5e-2),
    "fp8": Standard(high=0.9, middle=0.6, overlap=0.7, score=0.1, cut=5e-2),
}
"""Precision -> what is asked of boxes where the spec does not say. Boxes with scores below 0.2 are
reported only: low scores may come and go."""


class Shaped(Protocol):
    """What is known of an output beforehand."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def shape(self) -> tuple[str | int, ...] | None:
        """Extents and symbols."""
        ...


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of one output are what."""

    box: int
    score: int
    label: int | None = None
    image: int | None = None


LAYOUTS: Mapping[int, tuple[Columns, ...]] = {
    5: (Columns(0, 4),),
    6: (Columns(0, 4, 5), Columns(2, 1, 0)),
    7: (Columns(3, 2, 1, 0), Columns(1, 6, 5, 0)),
}
"""Number of columns -> how exporters lay them out: x1 y1 x2 y2, score, class, number of the image."""


@dataclass(frozen=True, slots=True)
class BoxSet:
    """Outputs that together are boxes.

    Attributes:
        boxes: Output with the corners.
        scores: Output with the scores; where it is ``boxes`` too, ``columns`` tells which they are.
        labels: Outputs of whole numbers, one a box: its class. All must be equal for a match.
        attached: Outputs with more of each box, such as its mask.
        count: Output with the number of boxes of each image; the other rows are padding.
        columns: Of ``boxes``, where it holds more than corners.
        centered: Whether the corners are a centre, a width and a height.
    """

    boxes: str
    scores: str
    labels: tuple[str, ...] = ()
    attached: tuple[str, ...] = ()
    count: str | None = None
    columns: Columns | None = None
    centered: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All outputs that belong to it."""
        more = () if self.count is None else (self.count,)
        return tuple(dict.fromkeys((self.boxes, self.scores, *self.labels, *more, *self.attached)))

    def rows(self, arrays: Mapping[str, Array]) -> Rows:
        """Return the boxes in ``arrays``, those of all images in one list."""
        table = _wide(arrays[self.boxes])
        lead = table.shape[:-1]
        images = math.prod(lead[:-1])
        table = table.reshape(math.prod(lead), table.shape[-1])
        columns = self.columns or Columns(0, 0)
        corners = table[:, columns.box : columns.box + 4]
        scores = table[:, columns.score] if self.columns else _wide(arrays[self.scores]).reshape(-1)
        keys = [np.repeat(np.arange(images), lead[-1])]
        for column in (columns.label, columns.image):
            if column is not None:
                keys.append(table[:, column])
        keys += [_wide(arrays[name]).reshape(-1) for name in self.labels]
        kept = (scores > 0) & np.isfinite(corners).all(axis=1)
        if columns.image is not None:
            kept &= table[:, columns.image] >= 0
        if self.count is not None:
            counts = np.repeat(arrays[self.count].reshape(-1), lead[-1])
            kept &= np.tile(np.arange(lead[-1]), images) < counts
        if self.centered:
            half = corners[:, 2:] / 2
            corners = np.concatenate([corners[:, :2] - half, corners[:, :2] + half], axis=1)
        pairs = corners.reshape(-1, 2, 2)
        corners = np.concatenate([pairs.min(axis=1), pairs.max(axis=1)], axis=1)
        place = np.flatnonzero(kept)
        return Rows(corners[place], scores[place], np.stack(keys, axis=1)[place], place)


@dataclass(frozen=True, slots=True)
class Rows:
    """Boxes in one list.

    Attributes:
        corners: [n, 4].
        scores: [n].
        keys: [n, k]: number of the image, class; boxes of unlike keys never match.
        place: [n]: row of the outputs.
    """

    corners: Array
    scores: Array
    keys: Array
    place: Array


# --- finding out which outputs are boxes ---------------------------------------------------------


def named(
    asked: Sequence[Detections], expected: Mapping[str, Array], among: Collection[str]
) -> list[tuple[BoxSet, Detections]]:
    """Return the sets that a spec names, with what else of ``among`` belongs to them.

    Raises:
        InputError: If outputs of these shapes are no boxes (``not-boxes``).
    """
    sets: list[tuple[BoxSet, Detections]] = []
    taken = {name for each in asked for name in (each.boxes, each.scores, each.labels)}
    for each in asked:
        known = _named(each, expected)
        boxes = expected[known.boxes]
        others = [name for name in among if name not in taken and _same_rows(expected[name], boxes)]
        sets.append((_with_the_rest(known, others, expected), each))
        taken |= set(sets[-1][0].names)
    return sets


def _named(asked: Detections, expected: Mapping[str, Array]) -> BoxSet:
    names = [asked.boxes, asked.scores, *([asked.labels] if asked.labels else [])]
    missing = [name for name in names if name not in expected]
    if missing:
        raise _not_boxes(asked, f"there is no output `{missing[0]}`")
    boxes = expected[asked.boxes]
    labels = (asked.labels,) if asked.labels else ()
    columns = None
    if boxes.ndim < 2 or not (is_inexact(boxes) or boxes.dtype.kind in "iu"):
        raise _not_boxes(asked, f"`{asked.boxes}` is {boxes.dtype} {list(boxes.shape)}")
    if asked.boxes == asked.scores:
        columns = _columns_of(boxes)
        if columns is None:
            raise _not_boxes(
                asked, f"in `{asked.boxes}`, {list(boxes.shape)}, no column is known to be a score"
            )
    elif boxes.shape[-1] != 4:
        raise _not_boxes(asked, f"the last axis of `{asked.boxes}` has {boxes.shape[-1]} entries")
    for name in (*(() if columns else (asked.scores,)), *labels):
        if not _is_one_a_box(expected[name], boxes.shape[:-1]):
            raise _not_boxes(
                asked,
                f"`{asked.boxes}` is {list(boxes.shape)} and `{name}` is "
                f"{list(expected[name].shape)}, which is not one a box",
            )
    return BoxSet(
        asked.boxes,
        asked.scores,
        labels,
        columns=columns,
        centered=asked.format == "center",
    )


def _not_boxes(asked: Detections, reason: str) -> InputError:
    return InputError(
        Diagnostic(
            "not-boxes",
            f"what `detections` calls boxes (`{asked.boxes}`) cannot be matched: {reason}",
            "name an output [..., n, 4], and scores and labels [..., n]; or leave `detections` out",
        )
    )


def recognised(
    outputs: Sequence[Shaped],
    expected: Mapping[str, Array],
    found: Mapping[str, Array],
    among: Collection[str],
) -> list[BoxSet]:
    """Return which of ``among`` together are boxes, as far as shapes and values leave no doubt.

    Args:
        outputs: What is known beforehand: an axis without a number is one that rows come and go on.
        expected: What the original gives. Where it gives no rows, those found are looked at.
        found: What is held against it.
        among: Names of outputs.
    """
    symbolic = {
        output.name
        for output in outputs
        if output.shape is not None and any(isinstance(dim, str) for dim in output.shape[-2:-1])
    }
    left = [name for name in expected if name in among and name in found]
    sets: list[BoxSet] = []
    for name in list(left):
        arrays = expected if expected[name].size else found
        boxes = arrays[name]
        if name not in left or boxes.ndim < 2 or boxes.dtype.kind == "c" or not is_inexact(boxes):
            continue
        others = [other for other in left if other != name and _same_rows(arrays[other], boxes)]
        known = _separate(name, others, arrays) or _in_columns(name, others, arrays)
        if known is None or not _rows_move(known, arrays, symbolic=name in symbolic):
            continue
        sets.append(known)
        left = [other for other in left if other not in known.names]
    return sets


def _same_rows(other: Array, boxes: Array) -> bool:
    lead = boxes.shape[:-1]
    return other.shape[: len(lead)] == lead or other.size == math.prod(lead[:-1])


def _separate(name: str, others: Sequence[str], arrays: Mapping[str, Array]) -> BoxSet | None:
    """Return the set where corners, scores and labels are outputs of their own."""
    boxes = arrays[name]
    lead = boxes.shape[:-1]
    if boxes.shape[-1] != 4:
        return None
    if any(arrays[other].shape == boxes.shape and is_inexact(arrays[other]) for other in others):
        return None  # two outputs could be the boxes
    single = [other for other in others if _is_one_a_box(arrays[other], lead)]
    labels = [other for other in single if _is_whole(arrays[other])]
    scores = [other for other in single if _is_score(arrays[other]) and other not in labels]
    if not scores:  # saturated scores are whole numbers as well
        scores = [other for other in labels if _is_score(arrays[other])]
        if len(scores) > 1:
            scores = [other for other in scores if _sounds_like(other, "score", "conf", "prob")]
    if len(scores) != 1:
        return None
    rest = [other for other in others if other != scores[0]]
    labels = [other for other in labels if other != scores[0]]
    return _with_the_rest(BoxSet(name, scores[0], tuple(labels)), rest, arrays)


def _in_columns(name: str, others: Sequence[str], arrays: Mapping[str, Array]) -> BoxSet | None:
    """Return the set where one output holds corners and scores."""
    columns = _columns_of(arrays[name])
    if columns is None:
        return None
    lead = arrays[name].shape[:-1]
    labels = [
        other for other in others if _is_one_a_box(arrays[other], lead) and _is_whole(arrays[other])
    ]
    return _with_the_rest(BoxSet(name, name, tuple(labels), columns=columns), list(others), arrays)


def _with_the_rest(known: BoxSet, others: Sequence[str], arrays: Mapping[str, Array]) -> BoxSet:
    """Return ``known`` with the number of boxes of each image, and with what else boxes have."""
    lead = arrays[known.boxes].shape[:-1]
    others = [other for other in others if other not in known.names]
    rows = BoxSet(known.boxes, known.scores, known.labels, columns=known.columns).rows(arrays)
    counts = np.bincount(rows.keys[:, 0].astype(np.int64), minlength=math.prod(lead[:-1]))
    count = next(
        (
            other
            for other in others
            if len(lead) > 1
            and arrays[other].dtype.kind in "iu"
            and arrays[other].size == counts.size
            and (arrays[other].reshape(-1) == counts).all()
        ),
        None,
    )
    attached = tuple(
        other
        for other in others
        if other != count
        and is_inexact(arrays[other])
        and arrays[other].ndim > len(lead)
        and arrays[other].shape[: len(lead)] == lead
    )
    return BoxSet(
        known.boxes, known.scores, known.labels, attached, count, known.columns, known.centered
    )


def _columns_of(array: Array) -> Columns | None:
    """Return the only layout that the values of ``array`` allow."""
    if array.ndim < 2 or not array.size:
        return None
    table = _wide(array).reshape(-1, array.shape[-1])
    fitting = [
        columns
        for columns in LAYOUTS.get(array.shape[-1], ())
        if _is_score(table[:, columns.score])
        and _are_corners(table[:, columns.box : columns.box + 4], table[:, columns.score])
        and all(
            _is_whole(table[:, column])
            for column in (columns.label, columns.image)
            if column is not None
        )
    ]
    return fitting[0] if len(fitting) == 1 else None


def _rows_move(known: BoxSet, arrays: Mapping[str, Array], *, symbolic: bool) -> bool:
    """Whether rows of the set may come, go and change places, as after a cut by score."""
    rows = known.rows(arrays)
    boxes = arrays[known.boxes]
    if not known.columns and not _sounds_like(known.boxes, "box"):
        lead = math.prod(boxes.shape[:-1])
        if not _are_corners(_wide(boxes).reshape(lead, 4)[rows.place], rows.scores):
            return False
    if symbolic:
        return True
    keys, scores = rows.keys[:, 0], rows.scores
    falling = bool(((np.diff(scores) <= 0) | (np.diff(keys) != 0)).all())
    in_classes = bool(known.labels) or (
        known.columns is not None and known.columns.label is not None
    )
    return (falling and scores.size > 1) or (in_classes and boxes.shape[-2] <= MOST_UNORDERED)


def _is_one_a_box(array: Array, lead: tuple[int, ...]) -> bool:
    return array.shape in (lead, (*lead, 1)) and array.dtype.kind not in "OSUTc"


def _is_whole(array: Array) -> bool:
    if array.dtype.kind in "iu":
        return True
    if not is_inexact(array) or array.dtype.kind == "c":
        return False
    values = _wide(array)
    return bool((np.trunc(values) == values).all()) and bool((values >= -1).all())


def _is_score(array: Array) -> bool:
    if not is_inexact(array) or array.dtype.kind == "c":
        return False
    values = _wide(array)
    return bool(((values >= -1e-6) & (values <= 1 + 1e-6) | (values == -1)).all())


def _are_corners(corners: Array, scores: Array) -> bool:
    kept = corners[scores > 0]
    return bool((kept[:, 2:] >= kept[:, :2]).all()) and not bool((kept == 0).all() and kept.size)


def _sounds_like(name: str, *words: str) -> bool:
    return any(word in name.lower() for word in words)


def _wide(array: Array) -> Array:
    return np.asarray(array, dtype=np.float64)


# --- matching ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Match:
    """Which box is which.

    Attributes:
        expected: The original's boxes.
        found: Those held against it.
        partner: For each of ``expected`` the index of its partner in ``found``, or -1.
        overlap: For each of ``expected`` the overlap with its partner.
        excused: For each of ``expected`` whether the model's own cut explains that it is gone.
        extra: For each of ``found`` whether it is nobody's partner.
        excused_extra: For each of ``found`` whether the cut explains that it has come.
    """

    expected: Rows
    found: Rows
    partner: npt.NDArray[np.int64]
    overlap: npt.NDArray[np.float64]
    excused: npt.NDArray[np.bool_]
    extra: npt.NDArray[np.bool_]
    excused_extra: npt.NDArray[np.bool_]


def match(expected: Rows, found: Rows, *, iou: float, cut: float) -> Match:
    """Return the partners of ``expected`` in ``found``: greedily, the best score first.

    Args:
        expected: The original's boxes.
        found: Those held against them.
        iou: Least intersection over union of partners.
        cut: How near to a threshold noise may move a score across it.
    """
    partner = np.full(expected.scores.size, -1, np.int64)
    overlap = np.zeros(expected.scores.size)
    thick = THICKENED * _extent(np.concatenate([expected.corners, found.corners]))
    for mine, theirs in _alike(expected.keys, found.keys):
        order = mine[np.argsort(-expected.scores[mine], kind="stable")]
        free = np.ones(theirs.size, dtype=bool)
        step = max(1, PAIRS // theirs.size)
        for start in range(0, order.size, step):
            block = order[start : start + step]
            near = overlaps(expected.corners[block], found.corners[theirs], thick)
            for row, candidates in zip(block, near, strict=True):
                best = int(np.argmax(np.where(free, candidates, -1.0)))
                if free[best] and candidates[best] >= iou:
                    free[best] = False
                    partner[row], overlap[row] = theirs[best], candidates[best]
    extra = np.ones(found.scores.size, dtype=bool)
    extra[partner[partner >= 0]] = False
    excused, excused_extra = _excused(expected, found, partner < 0, extra, cut)
    return Match(expected, found, partner, overlap, excused, extra, excused_extra)


def _extent(corners: Array) -> float:
    """Return about how large the picture is: an outlier must not make all other boxes one."""
    largest = np.abs(corners).max(axis=1, initial=0.0)
    largest = largest[np.isfinite(largest) & (largest > 0)]
    return float(np.median(largest)) if largest.size else 1.0


def overlaps(expected: Array, found: Array, thick: float = 0.0) -> Array:
    """Return intersection over union of each of [n, 4] with each of [m, 4]; NaN counts as none.

    Example:
        >>> overlaps(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2], [5, 5, 6, 6]])).round(3)
        array([[0.333, 0.   ]])
    """
    low = np.maximum(expected[:, None, :2], found[None, :, :2])
    high = np.minimum(expected[:, None, 2:], found[None, :, 2:])
    shared = np.maximum(high - low + thick, 0.0).prod(axis=-1)
    areas = [
        np.maximum(rows[:, 2:] - rows[:, :2] + thick, 0.0).prod(axis=-1)
        for rows in (expected, found)
    ]
    union = areas[0][:, None] + areas[1][None] - shared
    with np.errstate(divide="ignore", invalid="ignore"):
        share = shared / union
    return np.where(np.isfinite(share), share, 0.0)


def _alike(
    left: Array, right: Array
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield the rows of ``left`` and of ``right`` that have one key, for each key that both have."""
    if not len(left) or not len(right):
        return
    _, keys = np.unique(np.concatenate([left, right]), axis=0, return_inverse=True)
    keys = keys.reshape(-1)
    mine, theirs = keys[: len(left)], keys[len(left) :]
    for key in np.intersect1d(mine, theirs):
        yield np.flatnonzero(mine == key), np.flatnonzero(theirs == key)


def _excused(
    expected: Rows, found: Rows, lost: Array, extra: Array, cut: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which of the lost, and of the extra boxes the model's own cut explains."""
    excused = np.zeros(lost.size, dtype=bool)
    excused_extra = np.zeros(extra.size, dtype=bool)
    for image in np.unique(np.concatenate([expected.keys[:, 0], found.keys[:, 0]])):
        mine = np.flatnonzero(expected.keys[:, 0] == image)
        theirs = np.flatnonzero(found.keys[:, 0] == image)
        scores = np.concatenate([expected.scores[mine], found.scores[theirs]])
        lowest = float(scores.min())
        gone, come = mine[lost[mine]], theirs[extra[theirs]]
        if gone.size == mine.size >= FULL:
            continue
        if lowest <= HIGHEST_THRESHOLD:
            excused[gone] = expected.scores[gone] <= lowest + cut
            excused_extra[come] = found.scores[come] <= lowest + cut
        if mine.size == theirs.size >= FULL:
            last = max(float(expected.scores[mine].min()), float(found.scores[theirs].min()))
            gone = gone[np.abs(expected.scores[gone] - last) <= TIE]
            come = come[np.abs(found.scores[come] - last) <= TIE]
            pairs = min(gone.size, come.size)
            excused[gone[:pairs]] = True
            excused_extra[come[:pairs]] = True
    return excused, excused_extra


# --- judging -------------------------------------------------------------------------------------


def judge(
    boxes: BoxSet,
    expected: Mapping[str, Array],
    found: Mapping[str, Array],
    standard: Standard,
    asked: Detections | None = None,
) -> list[Judgement]:
    """Return how the boxes in ``found`` measure up to those in ``expected``.

    The metrics are ``boxes_high``, ``boxes_middle`` and ``boxes_low``: the share matched, of the
    original's and of those found, whichever is smaller; of those that are matched and score 0.2 or
    more ``boxes_overlap``, ``boxes_score`` and ``boxes_attached``.

    Args:
        boxes: Which outputs they are.
        expected: What the original gives.
        found: What is to be judged.
        standard: What is asked where ``asked`` does not say.
        asked: What the spec asks.
    """
    if faults := _why_not_measured(boxes, expected, found):
        return faults
    iou = 0.5 if asked is None else asked.iou
    matched = match(boxes.rows(expected), boxes.rows(found), iou=iou, cut=standard.cut)
    least = {
        "high": standard.high if asked is None or asked.high is None else asked.high,
        "middle": standard.middle if asked is None or asked.middle is None else asked.middle,
        "low": None if asked is None else asked.low,
    }
    own = [name for name in boxes.names if name not in boxes.attached]
    judgements = [
        judgement
        for band, share in least.items()
        if (judgement := _band(tuple(own), band, matched, share)) is not None
    ]
    judgements += _of_the_matched(tuple(own), matched, standard)
    lead = expected[boxes.boxes].ndim - 1
    judgements += [
        judgement
        for name in boxes.attached
        if (judgement := _attached(name, lead, expected, found, matched, standard.score))
    ]
    if not judgements:
        judgements.append(Judgement(tuple(own), "boxes", 1.0, 0.0, 0.0, "no boxes on either side"))
    return judgements


def _why_not_measured(
    boxes: BoxSet, expected: Mapping[str, Array], found: Mapping[str, Array]
) -> list[Judgement]:
    faults: list[Judgement] = []

    def fault(name: str, metric: str, words: str) -> None:
        faults.append(Judgement((name,), metric, math.inf, 0.0, math.inf, words))

    rows = expected[boxes.boxes].ndim - 2
    extents = set()
    for name in boxes.names:
        want, got = expected[name], found.get(name)
        if got is None:
            fault(name, "output", "it is missing")
            continue
        if want.dtype != got.dtype:
            fault(name, "dtype", f"it is {got.dtype}, not {want.dtype}")
            continue
        fixed = [
            axis
            for axis in range(want.ndim)
            if axis != rows or name == boxes.count  # there may be more or fewer rows
        ]
        if want.ndim != got.ndim or any(want.shape[axis] != got.shape[axis] for axis in fixed):
            fault(name, "shape", f"its shape is {list(got.shape)}, not {list(want.shape)}")
            continue
        if name != boxes.count:
            extents.add(got.shape[rows])
        if is_inexact(want):
            special = int((~np.isfinite(got)).sum()) - int((~np.isfinite(want)).sum())
            if special > 0:
                fault(name, "finite", f"{special} more elements than expected are NaN or infinite")
    if not faults and len(extents) > 1:
        fault(boxes.boxes, "shape", "its rows and those of the scores or labels differ in number")
    return faults


_BANDS: Mapping[str, tuple[str, float, float]] = {
    "high": (f"above {HIGH:g}", HIGH, math.inf),
    "middle": (f"{MIDDLE:g} to {HIGH:g}", MIDDLE, HIGH),
    "low": (f"below {MIDDLE:g}", -math.inf, MIDDLE),
}


def _in_band(scores: Array, band: str) -> npt.NDArray[np.bool_]:
    _, low, high = _BANDS[band]
    if band == "high":
        return np.asarray(scores > low, dtype=bool)
    below = scores <= high if band == "middle" else scores < high
    return np.asarray((scores >= low) & below, dtype=bool)


def _band(
    names: tuple[str, ...], band: str, matched: Match, least: float | None
) -> Judgement | None:
    """Return the judgement of a band; None where there is no box in it."""
    mine, theirs = _in_band(matched.expected.scores, band), _in_band(matched.found.scores, band)
    counted = int((mine & ~matched.excused).sum())
    missed = int((mine & ~matched.excused & (matched.partner < 0)).sum())
    others = int((theirs & ~matched.excused_extra).sum())
    extra = int((theirs & ~matched.excused_extra & matched.extra).sum())
    at_the_cut = int((mine & matched.excused).sum())
    if not counted + at_the_cut + extra:
        return None
    share = min(
        (total - lost) / total if total else 1.0
        for lost, total in ((missed, counted), (extra, others))
    )
    words = f"boxes {_BANDS[band][0]}: {counted - missed} of {counted} matched"
    if extra:
        words += f", {extra} more found"
    if at_the_cut:
        words += f", {at_the_cut} at the model's own cut not counted"
    words += ", reported only" if least is None else f", asked {least:.4g}"
    badness = 0.0
    if least is not None:
        badness = max(_badness(missed, counted, least, band), _badness(extra, others, least, band))
    counts = (counted - missed, counted)
    return Judgement(names, f"boxes_{band}", share, least or 0.0, badness, words, counts)


def _badness(missed: int, total: int, least: float, band: str) -> float:
    badness = badness_of_misses(missed, total, least)
    return min(badness, ONE_IS_FEW * missed) if total >= FEW[band] and least < 1 else badness


def _of_the_matched(
    names: tuple[str, ...], matched: Match, standard: Standard
) -> Iterator[Judgement]:
    """Yield how far boxes and scores of partners are apart; low ones aside."""
    expected, found = matched.expected, matched.found
    pairs = _pairs(matched)
    if pairs.size:
        overlap = float(matched.overlap[pairs].mean())
        yield Judgement(
            names,
            "boxes_overlap",
            overlap,
            standard.overlap,
            (1 - overlap) / (1 - standard.overlap),
            f"mean overlap {overlap:.3f}, asked {standard.overlap:g}",
        )
        apart = np.abs(expected.scores[pairs] - found.scores[matched.partner[pairs]])
        how = ""
    else:
        # Only low scores, and no partners that would tell: then the scores by their rank.
        common = min(expected.scores.size, found.scores.size)
        if not common:
            return
        apart = np.abs(-np.sort(-expected.scores)[:common] + np.sort(-found.scores)[:common])
        how = " by rank"
    mean, most = float(apart.mean()), float(apart.max())
    yield Judgement(
        names,
        "boxes_score",
        mean,
        standard.score,
        badness_of_excess(mean, standard.score),
        f"scores{how} differ by {mean:.2g} in the mean, {most:.2g} at most, asked "
        f"{standard.score:g}",
    )


def _pairs(matched: Match) -> npt.NDArray[np.int64]:
    """Return the original's boxes that have a partner and no low score."""
    return np.flatnonzero((matched.partner >= 0) & (matched.expected.scores >= MIDDLE))


def _attached(
    name: str,
    lead: int,
    expected: Mapping[str, Array],
    found: Mapping[str, Array],
    matched: Match,
    most: float,
) -> Judgement | None:
    """Return how far apart what partners have besides is, of its scale; None without partners.

    ``lead``: how many axes of the output count boxes.
    """
    pairs = _pairs(matched)
    if not pairs.size:
        return None
    want, got = (
        _wide(array.reshape(-1, *array.shape[lead:])[rows])
        for array, rows in (
            (expected[name], matched.expected.place[pairs]),
            (found[name], matched.found.place[matched.partner[pairs]]),
        )
    )
    value = float(np.abs(got - want).mean()) / scale_of(want)
    return Judgement(
        (name,),
        "boxes_attached",
        value,
        most,
        badness_of_excess(value, most),
        f"of matched boxes {value:.2g} of the scale in the mean, asked {most:g}",
    )
