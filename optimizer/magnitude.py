"""How often the values of a tensor have which magnitude, counted as they come by.

The bins are those of the number format: a magnitude falls into the bin that the exponent and the
first bits of the mantissa of its float32 name. So a bin is at most a `RESOLUTION`th as wide as its
values are large, wherever the largest may lie, and no bin depends on what was seen before: values
are read once, and their order does not matter.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

RESOLUTION: Final = 1 << 10
"""Bins from a power of two to the next."""

_SHIFT: Final = np.uint32(23 - 10)
_SIGNLESS: Final = np.uint32(0x7FFFFFFF)
_INFINITY: Final = 0x7F800000
_PIECE: Final = 1 << 18
"""Elements that are counted at a time: what that needs on the way stays small."""


class NotFinite(ValueError):
    """A tensor holds NaN or an infinity."""


class Magnitudes:
    """The magnitudes of all values of one tensor, those of either sign by themselves.

    Args:
        counted: Whether they are counted; without it only the largest is known. The counts take
            at most 4 MiB, as a rule a tenth of it: bins that nothing falls into take no memory.

    Attributes:
        size: How many values there were.
        zeros: How many of them were zero.
    """

    def __init__(self, *, counted: bool = True) -> None:
        self.size = 0
        self.zeros = 0
        self._largest = 0
        self._counts = np.zeros((_INFINITY >> int(_SHIFT), 2), np.int64) if counted else None

    def add(self, array: Array) -> None:
        """Take in the values of ``array``, as float32.

        Raises:
            NotFinite: If one of them is NaN or infinite.
        """
        flat = array.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            with np.errstate(over="ignore"):
                piece = np.ascontiguousarray(flat[start : start + _PIECE], np.float32)
            bits = piece.view(np.uint32)
            largest = int((bits & _SIGNLESS).max())
            if largest >= _INFINITY:
                raise NotFinite("NaN" if bool(np.isnan(piece).any()) else "an infinity")
            self._largest = max(self._largest, largest)
            self.size += piece.size
            if self._counts is not None:
                self._count(bits, self._counts)

    def _count(self, bits: npt.NDArray[np.uint32], counts: npt.NDArray[np.int64]) -> None:
        filled = (bits & _SIGNLESS) != 0
        many = int(np.count_nonzero(filled))
        self.zeros += bits.size - many
        if many:
            bits = bits if many == bits.size else bits[filled]
            bins = (bits & _SIGNLESS) >> _SHIFT
            lowest = int(bins.min())
            places = (bins - np.uint32(lowest)) * np.uint32(2) + (bits >> np.uint32(31))
            found = np.bincount(places, minlength=2 * (int(bins.max()) - lowest + 1))
            counts[lowest : lowest + found.size // 2] += found.reshape(-1, 2)

    @property
    def largest(self) -> float:
        """The largest magnitude; 0 where there was none."""
        return float(np.array(self._largest, np.uint32).view(np.float32))

    def bins(self) -> tuple[Floats, Floats, Floats]:
        """Return the lower and upper ends of the bins that hold anything but zero, and how many.

        In ascending order. The upper end of the last is the largest magnitude.
        """
        low, counts = self.sides()
        next_bits = low.astype(np.float32).view(np.uint32) + (np.uint32(1) << _SHIFT)
        high = next_bits.view(np.float32).astype(np.float64)
        return low, np.minimum(high, self.largest), counts.sum(axis=0)

    def sides(self) -> tuple[Floats, Floats]:
        """Return the lower ends of the same bins, and how many positive and negative are in each.

        The counts have a row for each sign.
        """
        assert self._counts is not None, "asked of magnitudes that were not counted"
        filled = np.flatnonzero(self._counts.any(axis=1))
        low = (filled << int(_SHIFT)).astype(np.uint32).view(np.float32)
        return low.astype(np.float64), self._counts[filled].T.astype(np.float64)

    def percentile(self, percent: float) -> float:
        """Return the magnitude that ``percent`` of all values, zeros too, are not above.

        As `numpy.percentile` interpolates; each value is known as well as its bin is narrow.
        """
        low, high, counts = self.bins()
        ends = self.zeros + np.cumsum(counts)

        def at(rank: int) -> float:
            if rank < self.zeros:
                return 0.0
            if rank == self.size - 1:
                return self.largest
            place = int(np.searchsorted(ends, rank, side="right"))
            inside = (rank - (ends[place] - counts[place]) + 0.5) / counts[place]
            return float(low[place] + inside * (high[place] - low[place]))

        rank = percent / 100 * (self.size - 1)
        below = int(rank)
        share = rank - below
        return (1 - share) * at(below) + share * at(min(below + 1, self.size - 1))
