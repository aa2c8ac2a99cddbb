"""What shape inference knows of one tensor, and the symbols it knows it in.

A *fact* is the dtype of a tensor, its extents, and, where the tensor is small and part of shape
arithmetic, its elements. An element is

- of an integer tensor: an ``int`` or an `Expression`,
- of a boolean tensor: a ``bool``,
- of a floating-point tensor: a ``float`` or a `Ratio`,
- ``None`` where it is not known.

Elements that are all known numbers are kept in an array of the tensor's own dtype, so that numpy
computes with them as the runtime does; else in an array of dtype object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from optc.passes.dimension import (
    Dim,
    Expression,
    Interval,
    interval,
    maximum,
    minimum,
    substitute,
    symbol,
    symbols,
)

Array = npt.NDArray[Any]
DType = np.dtype[Any]

MAX_ELEMENTS = 1024
"""Elements of a larger tensor are not followed."""

MAX_READ = 4096
"""Integer and boolean constants of up to this many elements are read."""

MAX_FLOATS = 64
"""Floating-point tensors beyond this are weights and data, not shape arithmetic."""

BOOL = np.dtype(np.bool_)
INT64 = np.dtype(np.int64)
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A number of floating-point shape arithmetic: an extent divided by a number above zero.

    Only made where floating-point arithmetic gives exactly this, for extents below 2**24 over the
    denominator: halves and quarters are exact, and rounding a quotient never reaches the next
    whole number.
    """

    numerator: Dim
    denominator: int = 1

    @property
    def floor(self) -> Dim:
        """The next whole number below."""
        return self.numerator // self.denominator

    @property
    def ceil(self) -> Dim:
        """The next whole number above."""
        return -(-self.numerator // self.denominator)


def ratio_of(number: object) -> Ratio | None:
    """Return a number of a float tensor as a `Ratio` where arithmetic with it stays exact."""
    if isinstance(number, Ratio):
        return number
    if not isinstance(number, float) or not math.isfinite(number):
        return None
    fraction = Fraction(number)
    if abs(fraction.numerator) > 4096 or fraction.denominator > 4096:
        return None
    return Ratio(fraction.numerator, fraction.denominator)


@dataclass(slots=True, eq=False)
class Fact:
    """What is known of one tensor.

    Attributes:
        dtype: Element type; None where it is not known.
        dims: Extents, outermost first; None where the rank is not known.
        known: Elements, see above; None where none is known. Read `value` instead.
        constant: The constant this is a fact of; its elements are read when asked for.
        is_sequence: The tensor is a sequence of tensors, and this is what they have in common.
        source: What holds the elements of a constant; another one may hold others.
    """

    dtype: DType | None = None
    dims: tuple[Dim, ...] | None = None
    known: Array | None = None
    constant: gs.Constant | None = None
    is_sequence: bool = False
    source: object = None

    @property
    def value(self) -> Array | None:
        """The elements as far as they are known, or None."""
        if self.constant is not None:
            constant, self.constant = self.constant, None
            self.known = np.asarray(constant.values)
        return self.known

    def says_the_same(self, other: Fact) -> bool:
        """Whether no rule could tell ``other`` from this one."""
        if (self.dtype, self.dims, self.is_sequence) != (
            other.dtype,
            other.dims,
            other.is_sequence,
        ):
            return False
        if self.constant is None and other.constant is None and self.known is other.known:
            return True
        one, two = self.value, other.value
        if one is None or two is None or one.dtype != two.dtype or one.shape != two.shape:
            return one is two
        return bool(np.array_equal(one, two, equal_nan=one.dtype.kind == "f"))


def fact_of_constant(constant: gs.Constant) -> Fact:
    """Return the fact of a constant, without reading its values."""
    shape = tuple(int(extent) for extent in constant.shape)
    dtype = np.dtype(constant.dtype)
    limit = MAX_FLOATS if dtype.kind == "f" else MAX_READ if dtype.kind in "biu" else 0
    is_small = math.prod(shape) <= limit
    return Fact(dtype, shape, constant=constant if is_small else None)


def followed(dims: Iterable[Dim] | None, dtype: DType | None) -> tuple[int, ...] | None:
    """Return the shape of a tensor whose elements are worth following, else None."""
    if dims is None or dtype is None or dtype.kind not in "biuf":
        return None
    shape = []
    for dim in dims:
        if isinstance(dim, Expression):
            return None
        shape.append(dim)
    count = math.prod(shape)
    return tuple(shape) if count <= (MAX_FLOATS if dtype.kind == "f" else MAX_ELEMENTS) else None


def objects(value: Array) -> Array:
    """Return elements as Python objects."""
    return value if value.dtype == object else value.astype(object)


def settled(elements: Array, dtype: DType) -> Array | None:
    """Return elements in their own dtype where all are numbers; None where none is known."""
    kinds = {type(element) for element in elements.flat}
    if kinds <= {int, bool, float}:
        with np.errstate(all="ignore"):
            try:
                return elements.astype(dtype)
            except OverflowError:  # beyond the dtype: the runtime wraps around or fails
                return None
    return elements if kinds != {type(None)} else None


class Symbols:
    """The symbols in use, what bounds them, and what follows for expressions over them."""

    def __init__(self, inputs: Mapping[str, Interval]) -> None:
        """Begin with the symbols of the graph's inputs and the ranges they have."""
        self.inputs = frozenset(inputs)
        self.upper: dict[str, Dim | None] = {}
        self.lower: dict[str, float] = {}
        self.ranges: dict[str, Interval] = dict(inputs)
        self.first_count: dict[str, str] = {}
        """Tensor whose nonzero elements are counted -> the output of the first node to do so."""
        self._names: dict[tuple[str, str], str] = {}
        self._intervals: dict[Expression, Interval] = {}

    def fresh(
        self, tensor: str, part: str, *, lower: float = 0, upper: Dim | None = None
    ) -> Expression:
        """Return the symbol of one axis or element of ``tensor``: the same each time, so that a
        body walked twice keeps its names. What bounds it is what was said last.
        """
        key = (tensor, part)
        if key not in self._names:
            stem = name = f"{tensor}_{part}" if part else tensor
            count = 1
            while name in self.ranges:
                count += 1
                name = f"{stem}_{count}"
            self._names[key] = name
        name = self._names[key]
        self.bind(name, lower, upper)
        return symbol(name)

    def bind(self, name: str, lower: float, upper: Dim | None) -> None:
        """Say what bounds the inner symbol ``name``."""
        if upper is not None and self._rests_on(upper, name):
            upper = None  # what a loop carries round bounds nothing
        high = math.inf if upper is None else self.interval(upper)[1]
        bounds = (min(lower, high), high)
        if self.ranges.get(name, bounds) != bounds:
            self._intervals.clear()
        self.ranges[name] = bounds
        self.lower[name], self.upper[name] = lower, upper

    def rename(self, names: Mapping[str, Dim]) -> None:
        """Replace inner symbols by others, which must be new."""
        for old, new in names.items():
            assert isinstance(new, Expression), "a symbol"
            name = new.bare_symbol
            assert name is not None, "a symbol"
            self.lower[name] = self.lower.pop(old)
            self.upper[name] = self.upper.pop(old)
            self.ranges[name] = self.ranges.pop(old)
        self.upper = {
            name: None if upper is None else substitute(upper, names)
            for name, upper in self.upper.items()
        }
        self._intervals.clear()

    def _rests_on(self, dim: Dim, name: str) -> bool:
        """Whether the bounds of ``dim`` follow from those of the symbol ``name``."""
        seen: set[str] = set()
        pending = set(symbols(dim))
        while pending:
            seen |= pending
            uppers = (self.upper.get(inner) for inner in pending)
            pending = {s for upper in uppers if upper is not None for s in symbols(upper)} - seen
        return name in seen

    def interval(self, dim: Dim) -> Interval:
        """Return bounds of ``dim``."""
        if not isinstance(dim, Expression):
            return dim, dim
        found = self._intervals.get(dim)
        if found is None:
            found = self._intervals[dim] = interval(dim, self.ranges)
        return found

    def low(self, dim: Dim) -> float:
        """Return the lowest value of ``dim``."""
        return self.interval(dim)[0]

    def high(self, dim: Dim) -> float:
        """Return the highest value of ``dim``."""
        return self.interval(dim)[1]

    def minimum(self, *dims: Dim) -> Dim:
        """Return the smallest of ``dims``, less those that another is never above."""
        return minimum(*self._undominated(dims, 1))

    def maximum(self, *dims: Dim) -> Dim:
        """Return the largest of ``dims``, less those that another is never below."""
        return maximum(*self._undominated(dims, -1))

    def _undominated(self, dims: Iterable[Dim], sign: int) -> list[Dim]:
        left = list(dict.fromkeys(dims))
        index = 0
        while index < len(left) and len(left) > 1:
            one = left[index]
            if any(other is not one and self.low(sign * (one - other)) >= 0 for other in left):
                left.pop(index)
            else:
                index += 1
        return left

    def truncated_division(self, dividend: Dim, divisor: Dim) -> Dim | None:
        """Return ``dividend / divisor`` rounded towards zero, or None where the sign decides."""
        if self.low(divisor) < 0:
            if self.high(divisor) >= 0:
                return None
            dividend, divisor = -dividend, -divisor
        if divisor == 0:
            return None
        low, high = self.interval(dividend)
        if low >= 0:
            return dividend // divisor
        return -(-dividend // divisor) if high <= 0 else None

    def is_inner(self, dim: Dim) -> bool:
        """Whether ``dim`` depends on more than the graph's inputs' extents."""
        return not symbols(dim) <= self.inputs
