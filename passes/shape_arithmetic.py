"""Rules of elementwise operators: shapes broadcast, and small elements are computed.

Numbers are computed by numpy in the tensor's own dtype. As soon as one operand is an expression, or
not known, the elements are computed one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper

from optc.passes.dimension import Dim, Expression
from optc.passes.shape_fact import (
    BOOL,
    Array,
    DType,
    Fact,
    Ratio,
    Symbols,
    followed,
    objects,
    ratio_of,
    settled,
)
from optc.passes.shape_rule import Call, Unknown, rule

Element = Any
"""An element as `shape_fact` describes it."""


def _is_whole(*elements: Element) -> bool:
    return all(isinstance(e, int | Expression) and not isinstance(e, bool) for e in elements)


def _on_ratios(a: Element, b: Element, compute: Callable[[Ratio, Ratio], Ratio]) -> Ratio | None:
    left, right = ratio_of(a), ratio_of(b)
    return None if left is None or right is None else compute(left, right)


def _add(a: Element, b: Element, symbols: Symbols) -> Element:
    if _is_whole(a, b):
        return a + b
    return _on_ratios(
        a,
        b,
        lambda x, y: Ratio(
            x.numerator * y.denominator + y.numerator * x.denominator,
            x.denominator * y.denominator,
        ),
    )


def _subtract(a: Element, b: Element, symbols: Symbols) -> Element:
    return _add(a, _negate(b), symbols)


def _negate(a: Element) -> Element:
    return Ratio(-a.numerator, a.denominator) if isinstance(a, Ratio) else -a


def _multiply(a: Element, b: Element, symbols: Symbols) -> Element:
    if _is_whole(a, b):
        return a * b

    def compute(x: Ratio, y: Ratio) -> Ratio:
        return Ratio(x.numerator * y.numerator, x.denominator * y.denominator)

    both = isinstance(a, Ratio) and isinstance(b, Ratio)
    return None if both else _on_ratios(a, b, compute)  # a product may leave what floats hold


def _divide(a: Element, b: Element, symbols: Symbols) -> Element:
    if _is_whole(a, b):
        return symbols.truncated_division(a, b)

    def compute(x: Ratio, y: Ratio) -> Ratio | None:
        if not isinstance(y.numerator, int) or y.numerator <= 0:
            return None
        return Ratio(x.numerator * y.denominator, x.denominator * y.numerator)

    left, right = ratio_of(a), ratio_of(b)
    return None if left is None or right is None else compute(left, right)


def _modulo(a: Element, b: Element, symbols: Symbols) -> Element:
    return a % b if _is_whole(a, b) and b != 0 else None


def _power(a: Element, b: Element, symbols: Symbols) -> Element:
    if not _is_whole(a) or not isinstance(b, int | float) or b not in (0, 1, 2, 3):
        return None
    result: Dim = 1
    for _ in range(int(b)):
        result = result * a
    return result


def _least(a: Element, b: Element, symbols: Symbols) -> Element:
    return symbols.minimum(a, b) if _is_whole(a, b) else None


def _greatest(a: Element, b: Element, symbols: Symbols) -> Element:
    return symbols.maximum(a, b) if _is_whole(a, b) else None


def _difference(a: Element, b: Element, symbols: Symbols) -> tuple[float, float]:
    if _is_whole(a, b):
        return symbols.interval(a - b)
    left, right = ratio_of(a), ratio_of(b)
    if left is None or right is None:
        return -math.inf, math.inf
    return symbols.interval(left.numerator * right.denominator - right.numerator * left.denominator)


def _equal(a: Element, b: Element, symbols: Symbols) -> bool | None:
    if isinstance(a, bool) and isinstance(b, bool):
        return a == b
    low, high = _difference(a, b, symbols)
    return True if low == high == 0 else False if low > 0 or high < 0 else None


def _less(a: Element, b: Element, symbols: Symbols) -> bool | None:
    low, high = _difference(a, b, symbols)
    return True if high < 0 else False if low >= 0 else None


def _greater(a: Element, b: Element, symbols: Symbols) -> bool | None:
    return _less(b, a, symbols)


def _less_or_equal(a: Element, b: Element, symbols: Symbols) -> bool | None:
    above = _less(b, a, symbols)
    return None if above is None else not above


def _greater_or_equal(a: Element, b: Element, symbols: Symbols) -> bool | None:
    return _less_or_equal(b, a, symbols)


def _divide_numbers(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    if not np.all(b):
        raise Unknown  # whole numbers have no quotient by zero
    quotient = np.abs(a) // np.abs(b)  # ONNX rounds towards zero
    return np.asarray(np.where((a < 0) != (b < 0), -quotient, quotient)).astype(a.dtype)


def _modulo_numbers(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f" or not np.all(b):
        raise Unknown
    return np.asarray(np.mod(a, b))


def _power_numbers(a: Array, b: Array) -> Array:
    # Other powers are not computed bit by bit alike everywhere.
    if a.dtype.kind == "f" or np.any(b < 0) or np.any(b != np.floor(b)):
        raise Unknown
    return np.asarray(np.power(a, b.astype(a.dtype)))


Numbers = Callable[[Array, Array], Array]
One = Callable[[Element, Element, Symbols], Element]

_BINARY: dict[str, tuple[Numbers, One | None]] = {
    "Add": (np.add, _add),
    "Sub": (np.subtract, _subtract),
    "Mul": (np.multiply, _multiply),
    "Div": (_divide_numbers, _divide),
    "Mod": (_modulo_numbers, _modulo),
    "Pow": (_power_numbers, _power),
    "Min": (np.minimum, _least),
    "Max": (np.maximum, _greatest),
    "Sum": (np.add, _add),
    "Equal": (np.equal, _equal),
    "Less": (np.less, _less),
    "Greater": (np.greater, _greater),
    "LessOrEqual": (np.less_equal, _less_or_equal),
    "GreaterOrEqual": (np.greater_equal, _greater_or_equal),
    "And": (np.logical_and, None),
    "Or": (np.logical_or, None),
    "Xor": (np.logical_xor, None),
}

_COMPARISONS = {
    *("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"),
    *("And", "Or", "Xor"),
}


@rule(*_BINARY, "Mean")
def _elementwise(call: Call) -> Fact:
    count = len(call.inputs)
    dims = call.broadcast([call.shape(i) for i in range(count)])
    dtype = BOOL if call.op in _COMPARISONS else call.dtype(0)
    values = [call.value(i) for i in range(count)]
    if call.op == "Mean" or all(value is None for value in values):
        return Fact(dtype, dims)
    shape = followed(dims, dtype)
    if shape is None or followed(dims, call.dtype(0)) is None:
        return Fact(dtype, dims)
    if call.op == "Mod" and call.attr("fmod", 0):
        return Fact(dtype, dims)
    assert dtype is not None, "no elements are followed without one"
    return Fact(dtype, dims, _folded(call, values, shape, dtype))


def _folded(
    call: Call, values: list[Array | None], shape: tuple[int, ...], dtype: DType
) -> Array | None:
    """Return the elements of an operator applied from left to right."""
    numbers, one = _BINARY[call.op]
    if all(value is not None and value.dtype != object for value in values):
        result = values[0]
        assert result is not None, "all values are there"
        with np.errstate(all="ignore"):
            for value in values[1:]:
                assert value is not None, "all values are there"
                result = numbers(result, value)
        return np.broadcast_to(result, shape).astype(dtype)
    grids = []
    for index in range(len(values)):
        elements = call.elements(index)
        if elements is None:
            return None
        grids.append(np.broadcast_to(elements, shape).reshape(-1))
    folded = np.empty(math.prod(shape), dtype=object)
    for at in range(folded.size):
        element = grids[0][at]
        for grid in grids[1:]:
            element = _combined(call, element, grid[at], one, at, len(shape))
        folded[at] = element
    return settled(folded.reshape(shape), dtype)


def _combined(call: Call, a: Element, b: Element, one: One | None, at: int, rank: int) -> Element:
    if one is None:
        return _logic(call.op, a, b)
    if a is not None and b is not None:
        return one(a, b, call.symbols)
    known = b if a is None else a
    if call.op in ("Min", "Max") and _is_whole(known):
        part = str(at) if rank else ""
        if call.op == "Min":
            return call.fresh(part, known, lower=-math.inf)
        return call.fresh(part, lower=call.symbols.low(known))
    if call.op == "Mul" and _is_whole(known) and known == 0:
        return 0
    return None


def _logic(op: str, a: bool | None, b: bool | None) -> bool | None:
    if op == "And" and (a is False or b is False):
        return False
    if op == "Or" and (a is True or b is True):
        return True
    if a is None or b is None:
        return None
    return (a and b) if op == "And" else (a or b) if op == "Or" else a != b


def _absolute(a: Element, symbols: Symbols) -> Element:
    if not _is_whole(a):
        return None
    low, high = symbols.interval(a)
    return a if low >= 0 else -a if high <= 0 else None


def _rounded(a: Element, part: str) -> Element:
    ratio = ratio_of(a)
    return None if ratio is None else Ratio(ratio.floor if part == "Floor" else ratio.ceil)


_UNARY_NUMBERS: dict[str, Callable[[Array], Array]] = {
    "Neg": np.negative,
    "Abs": np.abs,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": np.round,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Not": np.logical_not,
    "Sign": np.sign,
}


@rule(*_UNARY_NUMBERS)
def _unary(call: Call) -> Fact:
    fact = call.fact(0)
    value = fact.value
    if value is None:
        return Fact(fact.dtype, fact.dims)
    if value.dtype != object:
        with np.errstate(all="ignore"):
            return Fact(
                fact.dtype, fact.dims, np.asarray(_UNARY_NUMBERS[call.op](value), fact.dtype)
            )

    def one(a: Element) -> Element:
        if a is None:
            return None
        match call.op:
            case "Neg":
                return _negate(a)
            case "Abs":
                return _absolute(a, call.symbols)
            case "Floor" | "Ceil":
                return _rounded(a, call.op)
            case "Round":
                return a if isinstance(a, Ratio) and a.denominator == 1 else None
            case "Not":
                return not a
        return None

    return Fact(fact.dtype, fact.dims, _each(value, one, fact.dtype))


def _each(value: Array, one: Callable[[Element], Element], dtype: DType | None) -> Array | None:
    assert dtype is not None, "elements are followed of known dtypes only"
    result = np.empty(value.size, dtype=object)
    for at, element in enumerate(objects(value).flat):
        result[at] = one(element)
    return settled(result.reshape(value.shape), dtype)


@rule("Clip")
def _clip(call: Call) -> Fact:
    fact = call.fact(0)
    dims, dtype = fact.dims, fact.dtype
    shape = followed(dims, dtype)
    if shape is None or dtype is None or dtype.kind not in "iu" or call.opset < 11:
        return Fact(dtype, dims)
    low, high = (call.number(i) for i in (1, 2))
    elements = call.elements(0)
    if elements is None or (low is None and high is None and fact.value is None):
        return Fact(dtype, dims)
    is_open = any(call.has(i) and bound is None for i, bound in ((1, low), (2, high)))
    lowest = -math.inf  # where the largest value allowed is below the smallest, it wins
    if low is not None and not is_open:
        lowest = call.symbols.low(low if high is None else call.symbols.minimum(low, high))
    clipped = np.empty(elements.size, dtype=object)
    for at, element in enumerate(elements.flat):
        if element is None or is_open:
            element = call.fresh(at if shape else "", high, lower=lowest)
        else:
            element = element if low is None else call.symbols.maximum(element, low)
            element = element if high is None else call.symbols.minimum(element, high)
        clipped[at] = element
    return Fact(dtype, dims, settled(clipped.reshape(shape), dtype))


@rule("Cast")
def _cast(call: Call) -> Fact:
    return _converted(call, helper.tensor_dtype_to_np_dtype(call.attr("to")))


@rule("CastLike")
def _cast_like(call: Call) -> Fact:
    dtype = call.dtype(1)
    return Fact(None, call.fact(0).dims) if dtype is None else _converted(call, dtype)


def _converted(call: Call, dtype: DType) -> Fact:
    fact = call.fact(0)
    value = fact.value
    if value is None or followed(fact.dims, dtype) is None:
        return Fact(dtype, fact.dims)
    if value.dtype != object:
        if value.dtype.kind == "f" and dtype.kind in "iu":
            bounds = np.iinfo(dtype)
            if not np.all((value >= bounds.min) & (value < float(bounds.max))):
                return Fact(dtype, fact.dims)  # what becomes of those is the runtime's affair
        with np.errstate(all="ignore"):
            return Fact(dtype, fact.dims, value.astype(dtype))

    def one(a: Element) -> Element:
        if isinstance(a, bool):
            return a if dtype.kind == "b" else float(a) if dtype.kind == "f" else int(a)
        if dtype.kind == "b":
            equal = None if a is None else _equal(a, 0 if _is_whole(a) else 0.0, call.symbols)
            return None if equal is None else not equal
        if dtype.kind == "f":
            if isinstance(a, int | float):
                return float(a)
            return Ratio(a) if isinstance(a, Expression) else a
        if isinstance(a, float):
            return int(a) if math.isfinite(a) else None
        if isinstance(a, Ratio):
            if a.denominator == 1 or call.symbols.low(a.numerator) >= 0:
                return a.floor
            return None
        return a

    return Fact(dtype, fact.dims, _each(value, one, dtype))


@rule("Where")
def _where(call: Call) -> Fact:
    dims = call.broadcast([call.shape(i) for i in range(3)])
    dtype = call.dtype(1) or call.dtype(2)
    shape = followed(dims, dtype)
    values = [call.value(i) for i in range(3)]
    if shape is None or dtype is None or (values[1] is None and values[2] is None):
        return Fact(dtype, dims)
    grids = [call.elements(i) for i in range(3)]
    if grids[0] is None or grids[1] is None or grids[2] is None:
        return Fact(dtype, dims)
    condition, first, second = (
        np.broadcast_to(grid, shape).reshape(-1) for grid in grids if grid is not None
    )
    chosen = np.empty(condition.size, dtype=object)
    for at, (choice, a, b) in enumerate(zip(condition, first, second, strict=True)):
        if choice is None:
            chosen[at] = either(call, at if shape else "", a, b)
        else:
            chosen[at] = a if choice else b
    return Fact(dtype, dims, settled(chosen.reshape(shape), dtype))


def either(call: Call, part: int | str, a: Element, b: Element, output: int = 0) -> Element:
    """Return an element that is one of ``a`` and ``b``, it is not known which."""
    if type(a) is type(b) and a == b:
        return a
    if not _is_whole(a, b):
        return None
    low = min(call.symbols.low(a), call.symbols.low(b))
    return call.fresh(part, call.symbols.maximum(a, b), lower=low, output=output)


@rule("Range")
def _range(call: Call) -> Fact:
    dtype = call.dtype(0)
    values = [call.value(i) for i in range(3)]
    if (
        dtype is not None
        and all(v is not None and v.dtype != object and v.size == 1 for v in values)
        and (start_limit_step := [v.item() for v in values if v is not None])[2] != 0
    ):
        start, limit, step = start_limit_step
        if not all(math.isfinite(v) for v in start_limit_step):
            raise Unknown
        count = max(0, math.ceil((limit - start) / step))
        dims: tuple[Dim, ...] = (count,)
        if followed(dims, dtype) is None:
            return Fact(dtype, dims)
        return Fact(dtype, dims, (start + np.arange(count) * step).astype(dtype))
    whole = [_whole_number(v) for v in values]
    if whole[0] is None or whole[1] is None or not isinstance(whole[2], int) or whole[2] == 0:
        return Fact(dtype, (call.fresh(0),))
    span = whole[1] - whole[0]
    if whole[2] < 0:
        span, whole[2] = -span, -whole[2]
    return Fact(dtype, (call.symbols.maximum((span + whole[2] - 1) // whole[2], 0),))


def _whole_number(value: Array | None) -> Dim | None:
    """Return the one element of an array where it is a whole number, also one in a float."""
    if value is None or value.size != 1:
        return None
    element = objects(value).reshape(-1)[0]
    ratio = ratio_of(element)
    if ratio is not None:
        element = ratio.numerator if ratio.denominator == 1 else None
    return element if _is_whole(element) else None


@rule("CumSum")
def _cumulative_sum(call: Call) -> Fact:
    fact = call.fact(0)
    value, axis = fact.value, call.number(1)
    if value is None or value.ndim != 1 or axis is None or fact.dtype is None:
        return Fact(fact.dtype, fact.dims)
    if fact.dtype.kind not in "iu":
        return Fact(fact.dtype, fact.dims)
    elements = list(objects(value))
    if any(element is None for element in elements):
        return Fact(fact.dtype, fact.dims)
    if call.attr("reverse", 0):
        elements.reverse()
    sums = []
    running: Dim = 0
    for element in elements:
        sums.append(running + element)
        running = sums[-1]
    if call.attr("exclusive", 0):
        sums = [0, *sums[:-1]] if sums else []
    if call.attr("reverse", 0):
        sums.reverse()
    result = np.empty(len(sums), dtype=object)
    result[:] = sums
    return Fact(fact.dtype, fact.dims, settled(result, fact.dtype))
