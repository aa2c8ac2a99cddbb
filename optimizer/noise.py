"""The noise floor: how far a model moves from itself when nothing that matters has changed.

The numbers of a float model are one of many equally right answers. The floor is measured as the
difference between the original and itself (a) under ONNX Runtime's own optimisations, (b) with
inputs and float weights moved by one unit in the last place, over several seeds, and, where that
does not settle it, (c) by `FACTOR` units. A package whose difference is within `FACTOR` times that
floor computes what the original does, as well as that is defined at all.

Why 4: a rewrite rounds in another order, and the floor is the largest of a few samples. On thirteen
models of many kinds what optimisers of repute do (onnxsim, ONNX Runtime's own) came to at most 2.0
times the floor of three seeds alone, 2.3 times in the mean; 0.7 is usual.

What the floor is not: one number for a whole output. Boxes in pixels and scores in [0, 1] may
share one, and the noise of the former would hide any error of the latter. So elements are held
against the noise of elements of like magnitude. Nor does a swapped row (two detections of nearly
equal score) make a floor of hundreds of pixels: rows that change places, come or go are paired
again and counted, and they are noise only where the original's own rows do the same. And a rounding
that flips in one place of a quantised model makes a large floor that says nothing of the others: so
the mean difference, too, is held against that of the noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from optc.optimizer.compare import (
    Tolerance,
    allowed,
    compare,
    errors,
    is_inexact,
    is_text,
    wide,
)
from optc.optimizer.made_up import is_float
from optc.optimizer.reference import Model, Rejected, Runner, flattened

Array = npt.NDArray[Any]

FACTOR = 4
SEEDS = 3
MORE_SEEDS = 5
"""Rows that change places do so in some samples only, so that a few more are worth their time
before anything is called a failure."""

KEPT_BYTES = 256 << 20
"""Moved weights are kept for the next case, or the next tensors to look at, up to this much."""

EXACT_STEP = 1 / 16
"""A value that is a multiple of this is left as it is. Trained weights seldom are; exponents,
scales of a Resize, masks, pixels and lengths are, and moving these changes what is computed:
a scale of 2 moved down makes 639 columns of 640, a square of a negative number becomes NaN."""

PIECE = 1 << 16
"""Weights moved at a time: what the steps on the way need stays in the cache, and stays small."""

BANDS = 32
BAND_ELEMENTS = 64
PAIRED_ROWS = 2048
PAIRING_WORK = 1 << 26
"""More rows than this that do not agree in place, or more comparisons of elements to pair them, and
they are not paired: hundreds of detections are, the thousands of columns of a feature map are not."""


def moved(array: Array, random: np.random.Generator, ulps: int) -> Array:
    """Return ``array`` with each element ``ulps`` units in the last place up or down.

    Left as they are: multiples of `EXACT_STEP`, NaN and infinities, and whatever is not float16,
    bfloat16, float32 or float64 (a float8 is a code, as an int8 is).
    """
    if not (ulps and array.size and is_float(array.dtype) and array.dtype.itemsize > 1):
        return array
    flat = array.reshape(-1)
    result = np.empty_like(flat)
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        drawn = np.frombuffer(random.bytes(-(-piece.size // 8)), np.uint8)
        up = np.unpackbits(drawn, count=piece.size).view(np.int8) * np.int8(2) - np.int8(1)
        bits = piece.view(f"i{array.dtype.itemsize}") + up * np.int8(ulps)
        other = bits.astype(f"i{array.dtype.itemsize}", copy=False).view(array.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            steps = piece / array.dtype.type(EXACT_STEP)
            keep = (np.trunc(steps) == steps) | ~np.isfinite(piece) | ~np.isfinite(other)
        result[start : start + PIECE] = np.where(keep, piece, other)
    return result.reshape(array.shape)


class Noise:
    """Runs the original as its noise would have it. Nothing is made before it is asked for.

    Args:
        model: The original.
        more: Whether to go on to `MORE_SEEDS` where the first samples do not settle it.
    """

    def __init__(self, model: Model, *, more: bool = True) -> None:
        self._model = model
        self._more = more
        self._runners: dict[tuple[int, int], Runner] = {}
        self._moved: dict[tuple[int, int, str], Array] = {}
        self._moved_bytes = 0

    def samples(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield what the original gives under noise, with the ulps it was moved by.

        A sample that the model rejects is left out.

        Args:
            feeds: The inputs that are moved.
            outputs: Tensors to give in place of the model's outputs. An exposed tensor is one that
                ONNX Runtime cannot optimise away, so that only seeds make sense here.
        """
        plans = [(seed, 1) for seed in range(SEEDS)]
        if outputs is None:
            plans.insert(0, (0, 0))
            plans += [(SEEDS + seed, FACTOR) for seed in range(MORE_SEEDS if self._more else 0)]
        for seed, ulps in plans:
            try:
                runner = self._runner(seed, ulps, outputs)
                if runner is not None:
                    yield max(ulps, 1), flattened(runner.run(self._moved_feeds(feeds, seed, ulps)))
            except Rejected:
                continue

    def _moved_feeds(self, feeds: Mapping[str, Array], seed: int, ulps: int) -> dict[str, Array]:
        return {name: moved(a, _random(seed, name), ulps) for name, a in feeds.items()}

    def _runner(self, seed: int, ulps: int, outputs: Sequence[str] | None) -> Runner | None:
        if outputs is None and (seed, ulps) in self._runners:
            return self._runners[seed, ulps]
        all_kept = True

        def change(name: str, array: Array) -> Array:
            nonlocal all_kept
            if (seed, ulps, name) not in self._moved:
                other = moved(array, _random(seed, name), ulps)
                if self._moved_bytes + other.nbytes > KEPT_BYTES:
                    all_kept = False
                    return other
                self._moved[seed, ulps, name] = other
                self._moved_bytes += other.nbytes
            return self._moved[seed, ulps, name]

        runner = self._model.variant(outputs, change) if ulps else self._model.optimised()
        if outputs is None and runner is not None and all_kept:
            self._runners[seed, ulps] = runner
        return runner


def _random(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """How the rows of one array are found in another, wherever they stand.

    Attributes:
        axis: The axis whose entries the rows are.
        moved: Rows of the reference that are found in another place: (their place, the new one).
        lost: Rows of the reference that are found nowhere.
        new: Rows that the reference has nowhere.
    """

    axis: int
    moved: tuple[tuple[int, int], ...]
    lost: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def unpaired(self) -> int:
        """The number of rows without a partner."""
        return max(len(self.lost), len(self.new))

    @property
    def explains(self) -> bool:
        """Whether rows that moved, came or went are what makes the arrays differ."""
        return bool(self.moved) or len(self.lost) != len(self.new)

    def __str__(self) -> str:
        parts = []
        if self.moved:
            places = ", ".join(f"{a} to {b}" for a, b in self.moved[:3])
            more = ", …" if len(self.moved) > 3 else ""
            parts.append(f"{_count(self.moved)} in another place ({places}{more})")
        if self.lost:
            parts.append(f"{_count(self.lost)} only in the original ({_first(self.lost)})")
        if self.new:
            parts.append(f"{_count(self.new)} only in the package ({_first(self.new)})")
        return "; ".join(parts) or "the same rows"


def _count(rows: Sequence[object]) -> str:
    return "1 row" if len(rows) == 1 else f"{len(rows)} rows"


def _first(rows: Sequence[int]) -> str:
    return ", ".join(str(row) for row in rows[:3]) + (", …" if len(rows) > 3 else "")


def paired_rows(expected: Array, found: Array, tolerance: Tolerance) -> Rows | None:
    """Return how the rows of ``expected`` are found in ``found``, each at most once.

    Along the one axis whose extents differ; where none does, along the axis that leaves the fewest
    rows without a partner. None where rows say nothing: unlike ranks, several axes that differ, too
    many rows.
    """
    if expected.ndim != found.ndim or not expected.ndim:
        return None
    unlike = [a for a in range(expected.ndim) if expected.shape[a] != found.shape[a]]
    if len(unlike) > 1:
        return None
    tolerance = tolerance.on(expected)
    axes = unlike or [axis for axis in range(expected.ndim) if expected.shape[axis] > 1]
    every = [_paired_along(axis, expected, found, tolerance) for axis in axes]
    return min((rows for rows in every if rows), key=lambda rows: rows.unpaired, default=None)


def _paired_along(axis: int, expected: Array, found: Array, tolerance: Tolerance) -> Rows | None:
    """Pair along ``axis``, each entry of the axes before it on its own."""
    groups = int(np.prod(expected.shape[:axis], dtype=np.int64))
    want = expected.reshape(groups, expected.shape[axis], -1)
    got = found.reshape(groups, found.shape[axis], -1)
    common = min(want.shape[1], got.shape[1])
    unlike = ~_agree(want[:, :common], got[:, :common], tolerance)
    lefts = [[*np.flatnonzero(row), *range(common, want.shape[1])] for row in unlike]
    rights = [[*np.flatnonzero(row), *range(common, got.shape[1])] for row in unlike]
    work = sum(len(left) * len(right) for left, right in zip(lefts, rights, strict=True))
    rows = sum(map(len, lefts)) + sum(map(len, rights))
    if rows > PAIRED_ROWS or work * want.shape[2] > PAIRING_WORK:
        return None
    moved_: list[tuple[int, int]] = []
    lost: list[int] = []
    new: list[int] = []
    for group, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        for row in left:
            agree = _agree(want[group, row], got[group, right], tolerance)
            if agree.any():
                moved_.append((int(row), int(right.pop(int(agree.argmax())))))
            else:
                lost.append(int(row))
        new += map(int, right)
    return Rows(axis, tuple(moved_), tuple(lost), tuple(new))


def _agree(expected: Array, found: Array, tolerance: Tolerance) -> npt.NDArray[np.bool_]:
    """Return for each row of ``found`` whether it agrees with its row, or the row, ``expected``."""
    if not is_inexact(expected):
        return np.asarray((expected == found).all(axis=-1), dtype=bool)
    want = wide(expected)
    close = errors(want, wide(found)) <= allowed(want, tolerance)
    return np.asarray(close.all(axis=-1), dtype=bool)


# --- the floor -----------------------------------------------------------------------------------


class Floor:
    """The noise floor of one tensor on one input.

    Attributes:
        samples: How many samples it rests on.
        max_abs: Largest absolute difference of the original from itself, per unit in the last
            place; rows that changed places apart.
        mean_abs: The largest mean of the absolute differences, likewise.
        unequal: For integers, bools and strings: most elements that changed.
        rows_move: Whether rows changed places, came or went.
        unpaired: Most rows that came or went.
    """

    def __init__(self, expected: Array, tolerance: Tolerance) -> None:
        self.samples = 0
        self.max_abs = 0.0
        self.mean_abs = 0.0
        self.unequal = 0
        self.rows_move = False
        self.unpaired = 0
        self._special = 0
        self._expected = expected
        self._tolerance = tolerance.on(expected)
        if is_inexact(expected):
            self._wide = wide(expected).reshape(-1)
            size = np.abs(self._wide)
            self._order = np.argsort(np.where(np.isnan(size), np.inf, size), kind="stable")
            bands = max(1, min(BANDS, expected.size // BAND_ELEMENTS))
            self._starts = np.linspace(0, expected.size, bands, endpoint=False).astype(np.int64)
            self._floor = np.zeros(bands)

    def add(self, found: Array, ulps: int) -> None:
        """Take in what the original gives when moved by ``ulps``."""
        if found.dtype != self._expected.dtype and not is_text(found):
            return
        self.samples += 1
        difference = compare(self._expected, found, self._tolerance)
        if not difference.agrees:
            rows = paired_rows(self._expected, found, self._tolerance)
            if not difference.same_shape or (rows is not None and rows.moved):
                self.rows_move = True
                if rows is not None:
                    self.unpaired = max(self.unpaired, rows.unpaired)
                return
        if not is_inexact(self._expected):
            self.unequal = max(self.unequal, difference.outside)
            return
        self._special = max(self._special, difference.special)
        if self._expected.size:
            error = errors(self._wide, wide(found).reshape(-1))[self._order]
            error = np.where(np.isfinite(error), error, 0.0) / ulps
            self._floor = np.maximum(self._floor, np.maximum.reduceat(error, self._starts))
            self.max_abs = float(self._floor.max())
            self.mean_abs = max(self.mean_abs, float(error.mean()))

    def covers(self, found: Array, *, rows_move: bool = False, unpaired: int = 0) -> bool:
        """Whether the difference of ``found`` is within `FACTOR` times the floor.

        Args:
            found: What is to be judged.
            rows_move: Whether rows move in any output of the model: if the boxes change places
                under noise, so may the labels, even if those that did bore the same one.
            unpaired: Most rows that came or went in any output.
        """
        if found.dtype != self._expected.dtype and not is_text(found):
            return False
        if found.shape == self._expected.shape and self._covers_in_place(found):
            return True
        if not (self.rows_move or rows_move):
            return False
        rows = paired_rows(self._expected, found, self._tolerance)
        most = FACTOR * max(self.unpaired, unpaired)
        return rows is not None and rows.unpaired <= most

    def _covers_in_place(self, found: Array) -> bool:
        if not is_inexact(self._expected):
            return int(np.sum(self._expected != found)) <= FACTOR * self.unequal
        error = errors(self._wide, wide(found).reshape(-1))[self._order]
        finite = np.isfinite(error)
        if int((~finite).sum()) > FACTOR * self._special:
            return False
        limit = allowed(self._wide[self._order], self._tolerance)
        lengths = np.diff(self._starts, append=error.size)
        mean = max(float(limit[finite].mean()) if finite.any() else 0.0, FACTOR * self.mean_abs)
        limit = np.maximum(limit, FACTOR * np.repeat(self._floor, lengths))
        kept = error[finite]
        return bool((kept <= limit[finite]).all()) and float(kept.sum()) <= mean * kept.size

    def as_json(self) -> dict[str, object]:
        """Return the figures for programs."""
        return {
            "samples": self.samples,
            "max_abs": self.max_abs,
            "mean_abs": self.mean_abs,
            "unequal": self.unequal,
            "rows_move": self.rows_move,
            "unpaired_rows": self.unpaired,
            "factor": FACTOR,
        }


def floors_covering(
    noise: Noise,
    feeds: Mapping[str, Array],
    expected: Mapping[str, Array],
    found: Mapping[str, Array],
    tolerance: Tolerance | Mapping[str, Tolerance],
    outputs: Sequence[str] | None = None,
) -> tuple[dict[str, Floor], set[str]]:
    """Return the floor of each tensor of ``expected``, and which of ``found`` are within it.

    Samples are taken until all are, or until there are no more.
    """
    floors = {
        name: Floor(array, tolerance if isinstance(tolerance, Tolerance) else tolerance[name])
        for name, array in expected.items()
    }
    covered: set[str] = set()
    for ulps, sample in noise.samples(feeds, outputs):
        for name, floor in floors.items():
            if name in sample:
                floor.add(sample[name], ulps)
        rows_move = any(floor.rows_move for floor in floors.values())
        unpaired = max((floor.unpaired for floor in floors.values()), default=0)
        covered |= {
            name
            for name, floor in floors.items()
            if name in found
            and name not in covered
            and floor.covers(found[name], rows_move=rows_move, unpaired=unpaired)
        }
        if covered >= set(found):
            break
    return floors, covered
