"""One array against its reference: how far off, how often, and where it is worst.

An element agrees when ``|found - expected|`` is at most ``atol + rtol * |expected|``, and at most the
share of the array's scale that is asked for. NaN agrees with NaN and an infinity with the same
infinity; integers, bools and strings agree when they are equal. All sums are made in float64, piece
by piece, so that a large output costs no second copy of itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from optc.optimizer.made_up import is_float

Array = npt.NDArray[Any]
PIECE = 1 << 20
"""Elements compared at a time: 8 MiB in float64."""

SCORE_EDGES = (0.0, 0.05, 0.25, 0.5, 1.0)
"""Bands in which an output within [0, 1] is looked at on its own. Errors of low scores drown in
the figures of the whole, and a low score is where a threshold flips a hard case."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a float may be off: ``atol + rtol * |expected|`` and no more than ``most``.

    Attributes:
        atol: Infinite where no element is held against a tolerance of its own.
        rtol: Relative to the element.
        of_scale: Relative to the scale of the array (`scale_of`): what `on` makes ``most`` of.
        most: Of any element of the array at hand.
    """

    atol: float = math.inf
    rtol: float = 0.0
    of_scale: float = math.inf
    most: float = math.inf

    def on(self, expected: Array) -> Tolerance:
        """Return the tolerance for ``expected``, in which ``of_scale`` has become a number."""
        if math.isinf(self.of_scale) or not is_inexact(expected):
            return self
        most = min(self.most, self.of_scale * scale_of(expected))
        return replace(self, of_scale=math.inf, most=most)

    def of(self, value: complex) -> float:
        """Return how far an element that should be ``value`` may be off; call it on what `on` gave."""
        return min(self.atol + self.rtol * abs(value), self.most)


@dataclass(frozen=True, slots=True)
class Band:
    """The error of the elements whose reference lies in ``[low, high]``."""

    low: float
    high: float
    elements: int
    max_abs: float
    mean_abs: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How an array differs from its reference.

    Attributes:
        expected_shape: Shape of the reference.
        found_shape: Shape of what was compared with it. Where the shapes differ nothing else is
            filled in, and every element of the reference counts as outside.
        elements: Elements of the reference.
        outside: Elements that do not agree.
        special: Those of them where exactly one side is NaN or infinite, or the infinities differ;
            they are left out of the figures below.
        max_abs: Largest absolute difference. For strings 1 where any differs.
        mean_abs: Mean absolute difference.
        max_rel: Largest difference relative to the reference, where that is not 0.
        worst: Index of the element furthest outside its tolerance; None where all are equal.
        expected: The reference at ``worst``.
        found: The value at ``worst``.
        allowed: How far off the element at ``worst`` may be, for floats held against a tolerance.
        bands: For a float output within [0, 1]: the error by score, lowest scores first.
        dtypes: The two dtypes where they differ, else None; then every element is outside.
    """

    expected_shape: tuple[int, ...]
    found_shape: tuple[int, ...]
    elements: int
    outside: int
    special: int = 0
    max_abs: float = 0.0
    mean_abs: float = 0.0
    max_rel: float = 0.0
    worst: tuple[int, ...] | None = None
    expected: Any = None
    found: Any = None
    allowed: float | None = None
    bands: tuple[Band, ...] = ()
    dtypes: tuple[str, str] | None = None

    @property
    def agrees(self) -> bool:
        """Whether shape, dtype and every element agree."""
        return self.same_shape and self.dtypes is None and self.outside == 0

    @property
    def same_shape(self) -> bool:
        """Whether the shapes are the same."""
        return self.expected_shape == self.found_shape

    @property
    def share_outside(self) -> float:
        """The share of elements that do not agree."""
        return self.outside / self.elements if self.elements else float(not self.agrees)

    def as_json(self) -> dict[str, object]:
        """Return the figures for programs; a NaN or infinity is written as a word."""
        return {
            "expected_shape": list(self.expected_shape),
            "found_shape": list(self.found_shape),
            "dtypes": list(self.dtypes) if self.dtypes else None,
            "elements": self.elements,
            "outside": self.outside,
            "share_outside": self.share_outside,
            "special": self.special,
            "max_abs": number(self.max_abs),
            "mean_abs": number(self.mean_abs),
            "max_rel": number(self.max_rel),
            "worst": None
            if self.worst is None
            else {
                "index": list(self.worst),
                "expected": number(self.expected),
                "found": number(self.found),
                "allowed": number(self.allowed),
            },
            "score_bands": [
                {
                    "low": band.low,
                    "high": band.high,
                    "elements": band.elements,
                    "max_abs": number(band.max_abs),
                    "mean_abs": number(band.mean_abs),
                }
                for band in self.bands
            ],
        }


def number(value: Any) -> object:
    """Return ``value`` as JSON can hold it: NaN, infinities and complex numbers as text."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


LEAST_SCORE = 0.01
"""The least scale of an array of scores. Where a detector finds nothing its scores are a millionth, and
nothing is not to be found to many digits."""


def scale_of(array: Array) -> float:
    """Return the largest finite magnitude in ``array``; 1 where there is none, or only zeros.

    Of values that all lie in [0, 1] at least `LEAST_SCORE`: they may be scores.
    """
    largest, are_scores = 0.0, array.dtype.kind != "c"
    for _, (piece,) in _pieces(array):
        size = np.abs(piece)
        most = float(size.max(initial=0.0))
        if not math.isfinite(most):
            most = float(size[np.isfinite(size)].max(initial=0.0))
        largest = max(largest, most)
        are_scores = are_scores and most <= 1 and bool((piece >= 0).all())
    return least_scale(largest, are_scores=are_scores)


def least_scale(largest: float, *, are_scores: bool) -> float:
    """Return the scale of an array whose largest magnitude is ``largest``."""
    return max(largest, LEAST_SCORE) if largest and are_scores else largest or 1.0


def compare(expected: Array, found: Array, tolerance: Tolerance) -> Difference:
    """Return how ``found`` differs from ``expected``."""
    shapes = (tuple(expected.shape), tuple(found.shape))
    if expected.dtype != found.dtype and not (is_text(expected) and is_text(found)):
        names = (str(expected.dtype), str(found.dtype))
        return Difference(*shapes, expected.size, expected.size, dtypes=names)
    if shapes[0] != shapes[1]:
        return Difference(*shapes, expected.size, expected.size)
    if is_inexact(expected):
        return _compare_numbers(expected, found, tolerance)
    return _compare_exactly(expected, found)


def is_text(array: Array) -> bool:
    """Whether ``array`` holds strings."""
    return array.dtype.kind in "OSUT"


def is_inexact(array: Array) -> bool:
    """Whether a tolerance applies to ``array``: floats and complex numbers."""
    return array.dtype.kind == "c" or is_float(array.dtype)


def wide(array: Array) -> Array:
    """Return ``array`` in a type in which differences of its elements are exact enough."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def errors(expected: Array, found: Array) -> Array:
    """Return ``|found - expected|``: 0 for equal NaNs and infinities, inf where one side only is.

    Takes what `wide` returns. The shapes must be the same.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(found - expected)
    unlike = ~np.isfinite(error)
    if unlike.any():
        equal = (expected == found) | (np.isnan(expected) & np.isnan(found))
        error = np.where(unlike, np.where(equal, 0.0, np.inf), error)
    return np.asarray(error, dtype=np.float64)


def allowed(expected: Array, tolerance: Tolerance) -> Array:
    """Return how far each element may be off; takes what `wide` returns, and `Tolerance.on`."""
    size = np.abs(expected)
    limit = tolerance.atol + tolerance.rtol * np.where(np.isfinite(size), size, 0.0)
    return np.minimum(limit, tolerance.most)


def _pieces(*arrays: Array) -> Iterator[tuple[int, tuple[Array, ...]]]:
    """Yield the same stretch of all ``arrays``, flat and wide, with the index it starts at."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, PIECE):
        yield start, tuple(wide(array[start : start + PIECE]) for array in flat)


def _compare_numbers(expected: Array, found: Array, tolerance: Tolerance) -> Difference:
    outside = special = counted = 0
    total = max_abs = max_rel = 0.0
    worst, worst_by = None, 0.0
    scores = _Scores()
    tolerance = tolerance.on(expected)
    for start, (want, got) in _pieces(expected, found):
        error = errors(want, got)
        limit = allowed(want, tolerance)
        off = (error > limit) | np.isinf(error)
        outside += int(off.sum())
        finite = np.isfinite(error)
        special += int((~finite).sum())
        counted += int(finite.sum())
        total += float(error[finite].sum())
        max_abs = max(max_abs, float(error[finite].max(initial=0.0)))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            relative = error / np.abs(want)
            # Limit 0: any error is infinitely far. No limit: the largest error is the worst.
            by = np.where(error == 0, 0.0, np.where(np.isinf(limit), error, error / limit))
        usable = np.isfinite(relative)
        max_rel = max(max_rel, float(relative[usable].max(initial=0.0)))
        if by.size and by.max() > worst_by:
            worst, worst_by = start + int(by.argmax()), float(by.max())
        scores.add(want, error)
    index = (
        None if worst is None else tuple(int(i) for i in np.unravel_index(worst, expected.shape))
    )
    return Difference(
        tuple(expected.shape),
        tuple(found.shape),
        expected.size,
        outside,
        special,
        max_abs,
        total / counted if counted else 0.0,
        max_rel,
        index,
        None if index is None else _shortest(expected[index]),
        None if index is None else _shortest(found[index]),
        None if index is None else _allowed_at(expected[index], tolerance),
        scores.bands(),
    )


def _allowed_at(expected: Any, tolerance: Tolerance) -> float | None:
    limit = tolerance.of(complex(expected)) if np.isfinite(expected) else math.inf
    return limit if math.isfinite(limit) else None


def _shortest(value: Any) -> Any:
    """Return a float of whatever type as the shortest decimal that stands for it: 0.1, not 0.1000…01."""
    if value.dtype.kind == "c":
        return complex(value)
    return float(str(value)) if value.dtype.kind == "f" else float(value)


def _compare_exactly(expected: Array, found: Array) -> Difference:
    """Compare integers, bools and strings; a bool counts as 0 or 1, a string as equal or not."""
    shape = tuple(expected.shape)
    unequal = np.asarray(expected != found, dtype=bool)
    outside = int(unequal.sum())
    if not outside:
        return Difference(shape, shape, expected.size, 0)
    if is_text(expected):
        error = unequal.astype(np.float64)
        relative = np.zeros(1)
    else:
        want = expected.astype(np.float64)
        error = np.abs(found.astype(np.float64) - want)
        relative = error[want != 0] / np.abs(want[want != 0])
    # Two large int64 may be unequal and yet the same float64.
    by = np.where(unequal, np.maximum(error, np.finfo(np.float64).tiny), 0.0)
    index = tuple(int(i) for i in np.unravel_index(int(by.argmax()), shape))
    return Difference(
        shape,
        shape,
        expected.size,
        outside,
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        max_rel=float(relative.max(initial=0.0)),
        worst=index,
        expected=_plain(expected[index]),
        found=_plain(found[index]),
    )


def _plain(value: Any) -> Any:
    """Return a numpy scalar as Python's own int, bool or str."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, bool | int | str) else int(value)


class _Scores:
    """Gathers the error by score band, as long as all there was is a score."""

    def __init__(self) -> None:
        self._sums = [(0, 0.0, 0.0)] * (len(SCORE_EDGES) - 1)
        self._are_scores = True

    def add(self, expected: Array, error: Array) -> None:
        self._are_scores = (
            self._are_scores
            and expected.dtype.kind == "f"
            and bool(((expected >= 0) & (expected <= 1)).all())
        )
        if not self._are_scores:
            return
        band = np.searchsorted(SCORE_EDGES[1:-1], expected, side="right")
        for index, (count, total, largest) in enumerate(self._sums):
            here = error[(band == index) & np.isfinite(error)]
            self._sums[index] = (
                count + here.size,
                total + float(here.sum()),
                max(largest, float(here.max(initial=0.0))),
            )

    def bands(self) -> tuple[Band, ...]:
        if not self._are_scores:
            return ()
        return tuple(
            Band(low, high, count, largest, total / count)
            for low, high, (count, total, largest) in zip(
                SCORE_EDGES, SCORE_EDGES[1:], self._sums, strict=False
            )
            if count
        )
