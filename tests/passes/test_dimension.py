from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_check import value_at

from optc.passes.dimension import (
    Dim,
    Expression,
    ceil_division,
    interval,
    maximum,
    minimum,
    substitute,
    symbol,
    symbols,
    total,
)

X, Y = symbol("x"), symbol("y")
NAMES = ("x", "y", "z")


@st.composite
def computed(draw: st.DrawFn, depth: int = 3) -> tuple[Dim, dict[str, int]]:
    """An expression with values of its symbols; it has just been compared with plain integers."""
    values = {name: draw(st.integers(0, 12)) for name in NAMES}
    dim, number = draw(_pair(values, depth))
    assert value_at(dim, values) == number
    return dim, values


def _pair(values: dict[str, int], depth: int) -> st.SearchStrategy[tuple[Dim, int]]:
    leaf: st.SearchStrategy[tuple[Dim, int]] = st.one_of(
        st.integers(-6, 6).map(lambda n: (n, n)),
        st.sampled_from(NAMES).map(lambda name: (symbol(name), values[name])),
    )
    if depth == 0:
        return leaf

    def combine(args: tuple[str, tuple[Dim, int], tuple[Dim, int], int]) -> tuple[Dim, int]:
        op, (a, x), (b, y), n = args
        match op:
            case "+":
                return a + b, x + y
            case "-":
                return a - b, x - y
            case "*":
                return a * b, x * y
            case "//n":
                return a // n, x // n
            case "%n":
                return a % n, x % n
            case "//":
                return (a // b, x // y) if y else (a, x)
            case "%":
                return (a % b, x % y) if y else (a, x)
            case "min":
                return minimum(a, b), min(x, y)
            case _:
                return maximum(a, b), max(x, y)

    inner = _pair(values, depth - 1)
    ops = st.sampled_from(("+", "-", "*", "//n", "%n", "//", "%", "min", "max"))
    numbers = st.integers(-7, 7).filter(bool)
    return st.one_of(leaf, st.tuples(ops, inner, inner, numbers).map(combine))


@settings(deadline=None)  # a busy machine is no failure
@given(computed())
def test_an_expression_computes_what_integers_compute(pair: tuple[Dim, dict[str, int]]) -> None:
    dim, values = pair  # compared with Python's arithmetic where it is drawn
    assert symbols(dim) <= set(values)


@settings(deadline=None)  # a busy machine is no failure
@given(computed(), st.data())
def test_no_value_lies_outside_the_interval(
    pair: tuple[Dim, dict[str, int]], data: st.DataObject
) -> None:
    dim, values = pair
    ranges = {
        name: (
            value - data.draw(st.integers(0, 4)),
            data.draw(st.sampled_from([value, value + 3, math.inf])),
        )
        for name, value in values.items()
    }
    low, high = interval(dim, ranges)
    assert low <= value_at(dim, values) <= high


@settings(deadline=None)  # a busy machine is no failure
@given(computed())
def test_a_constant_expression_is_an_int(pair: tuple[Dim, dict[str, int]]) -> None:
    dim, values = pair
    assert isinstance(dim, int) == (not symbols(dim))
    assert isinstance(substitute(dim, values), int)


@pytest.mark.parametrize(
    ("computed", "expected"),
    [
        (X * 4 // 4, X),
        ((2 * X + 2) // 2, X + 1),
        (X * Y // Y, X),
        ((X + 1) * (Y + 2) // (Y + 2), X + 1),
        ((X * X - 1) // (X - 1), X + 1),
        (4 * X * Y // (2 * Y), 2 * X),
        (X // 2 // 2, X // 4),
        (((X - 1) // 2 + 1 - 1) // 2 + 1, (X + 3) // 4),
        ((X - 1) // 2 + 1, (X + 1) // 2),
        (-(-X // 7), ceil_division(X, 7)),
        (X + (7 - X % 7) % 7, ceil_division(X, 7) * 7),
        ((X + (7 - X % 7) % 7) // 7, ceil_division(X, 7)),
        (X % 5 + X // 5 * 5, X),
        (6 * X // 4, 3 * X // 2),
        (minimum(X, Y, X), minimum(Y, X)),
        (minimum(X + 1, X), X),
        (maximum(X, maximum(Y, 3), 5), maximum(Y, X, 5)),
        (minimum(3, 5), 3),
        (minimum(X, maximum(X, Y)), X),
        (maximum(minimum(X, 9), X), X),
        (X - X, 0),
        (0 * X, 0),
        (total([X, 2, Y, -X]), Y + 2),
        (0 // X, 0),
    ],
)
def test_equal_extents_become_the_same_expression(computed: Dim, expected: Dim) -> None:
    assert computed == expected
    assert hash(computed) == hash(expected)
    assert str(computed) == str(expected)


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (symbol("batch") * 4, "batch*4"),
        ((symbol("height") + 1) // 2, "floor((height + 1)/2)"),
        (minimum(1000, symbol("n")), "min(1000, n)"),
        (X * X - 3, "x^2 - 3"),
        (2 - X, "-x + 2"),
        (X // Y, "floor(x/y)"),
        (X // (Y + 1), "floor(x/(y + 1))"),
        (symbol("p2o.DynamicDimension.0"), "p2o.DynamicDimension.0"),
    ],
)
def test_an_expression_reads_well(dim: Dim, text: str) -> None:
    assert str(dim) == text


@pytest.mark.parametrize(
    ("dim", "bounds"),
    [
        (X * Y + 3, (3 + 2 * 1, 3 + 10 * 5)),
        (X - X // 2, (1, 5)),
        (ceil_division(X, 7) * 7 - X, (0, 6)),
        (X * X - X, (2, 90)),
        (minimum(X, 4), (2, 4)),
        (maximum(X - 5, 0), (0, 5)),
        (X % 4, (0, 3)),
        (X - Y, (-3, 9)),
    ],
)
def test_bounds_are_tight_where_a_symbol_occurs_more_than_once(
    dim: Dim, bounds: tuple[int, int]
) -> None:
    assert interval(dim, {"x": (2, 10), "y": (1, 5)}) == bounds


def test_a_symbol_without_a_range_counts_from_zero() -> None:
    assert interval(X + 1, {}) == (1, math.inf)
    assert interval(minimum(X, 7), {}) == (0, 7)


def test_a_bare_symbol_tells_its_name() -> None:
    assert symbol("n").bare_symbol == "n"
    doubled = symbol("n") * 2
    assert isinstance(doubled, Expression)
    assert doubled.bare_symbol is None
