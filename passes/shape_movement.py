"""Rules of operators that move elements about: what happens to the axes happens to the elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper

from optc.passes.dimension import Dim, Expression, ceil_division, total
from optc.passes.shape_fact import (
    BOOL,
    FLOAT32,
    INT64,
    Array,
    DType,
    Fact,
    Symbols,
    followed,
    objects,
    settled,
)
from optc.passes.shape_rule import Call, Unknown, is_known, rule, volume
from optc.specs.compile_spec import LARGEST_DIM

BEYOND = LARGEST_DIM
"""No axis is longer: an index from here on means its end, or backwards its beginning."""


def _array(elements: Sequence[Any], shape: tuple[int, ...]) -> Array:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def _settled(elements: Array, dtype: DType | None) -> Array | None:
    if elements.dtype != object or dtype is None:
        return elements
    return settled(elements, dtype)


def _taken(value: Array, taken: Any, dtype: DType | None) -> Array | None:
    """Return what was taken from ``value`` as an array: numpy unwraps a single element."""
    if not isinstance(taken, np.ndarray):
        taken = np.full((), taken, value.dtype)
    return _settled(taken, dtype)


@rule("Identity")
def _identity(call: Call) -> Fact:
    fact = call.fact(0)
    return Fact(fact.dtype, fact.dims, fact.value, is_sequence=fact.is_sequence)


@rule("Shape")
def _shape(call: Call) -> Fact:
    dims = call.shape(0)
    rank = len(dims)
    ends = [call.attr("start", 0), call.attr("end", rank)]
    start, end = (min(max(e + rank if e < 0 else e, 0), rank) for e in ends)
    part = dims[start:end]
    return Fact(INT64, (len(part),), settled(_array(part, (len(part),)), INT64))


@rule("Size")
def _size(call: Call) -> Fact:
    return Fact(INT64, (), settled(_array([volume(call.shape(0))], ()), INT64))


@rule("Reshape")
def _reshape(call: Call) -> Fact:
    source = call.shape(0)
    target = call.numbers(1)
    if target is None:
        raise Unknown
    allow_zero = bool(call.attr("allowzero", 0))
    dims = _reshaped(call, source, target, allow_zero)
    return _rearranged(call, dims)


def _rearranged(call: Call, dims: tuple[Dim, ...]) -> Fact:
    """Return the fact of the input's elements, in their order, in another shape."""
    value = call.value(0)
    shape = followed(dims, call.dtype(0))
    if value is None or shape is None or math.prod(shape) != value.size:
        return Fact(call.dtype(0), dims)
    return Fact(call.dtype(0), dims, value.reshape(shape))


def _reshaped(
    call: Call, source: tuple[Dim, ...], target: Sequence[Dim | None], allow_zero: bool
) -> tuple[Dim, ...]:
    dims: list[Dim | None] = []
    for axis, extent in enumerate(target):
        if extent == 0 and not allow_zero:
            if axis >= len(source):
                raise Unknown
            extent = source[axis]
        elif extent is not None and call.symbols.low(extent) < 0:
            extent = None  # -1, or an element that might be
        dims.append(extent)
    open_axes = [axis for axis, extent in enumerate(dims) if extent is None]
    if len(open_axes) == 1:
        # The count of elements is the same before and after, whatever the element says.
        others = [extent for extent in dims if extent is not None]
        dims[open_axes[0]] = _quotient_of_volumes(call, source, others, open_axes[0])
    elif open_axes:
        count = volume(source)
        bound = count if call.symbols.low(count) >= 1 else None  # of none, any extent may be one
        for axis in open_axes:
            dims[axis] = call.fresh(axis, bound)
    return tuple(extent for extent in dims if extent is not None)


def _quotient_of_volumes(call: Call, above: Sequence[Dim], below: Sequence[Dim], axis: int) -> Dim:
    rest = list(below)
    kept = []
    for extent in above:  # equal extents cancel, also where one of them may be zero
        if extent in rest:
            rest.remove(extent)
        else:
            kept.append(extent)
    divisor = volume(rest)
    if divisor == 0:
        return 0 if 0 in kept else call.fresh(axis)
    return volume(kept) // divisor


@rule("Flatten")
def _flatten(call: Call) -> Fact:
    dims = call.shape(0)
    axis = call.attr("axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    return _rearranged(call, (volume(dims[:axis]), volume(dims[axis:])))


@rule("Squeeze")
def _squeeze(call: Call) -> Fact:
    dims = call.shape(0)
    axes = call.fixed(1, "axes")
    if axes is None:
        if any(isinstance(d, Expression) and call.symbols.low(d) <= 1 for d in dims):
            raise Unknown  # whether the axis is there at all is decided at run time
        drop = {axis for axis, extent in enumerate(dims) if extent == 1}
    else:
        drop = {call.axis(axis, len(dims)) for axis in axes}
    return _rearranged(call, tuple(d for axis, d in enumerate(dims) if axis not in drop))


@rule("Unsqueeze")
def _unsqueeze(call: Call) -> Fact:
    dims = list(call.shape(0))
    axes = call.fixed(1, "axes") or []
    rank = len(dims) + len(axes)
    for axis in sorted(call.axis(axis, rank) for axis in axes):
        dims.insert(axis, 1)
    return _rearranged(call, tuple(dims))


@rule("Transpose")
def _transpose(call: Call) -> Fact:
    dims = call.shape(0)
    order = call.attr("perm") or list(range(len(dims)))[::-1]
    if sorted(order) != list(range(len(dims))):
        raise Unknown
    value = call.value(0)
    return Fact(
        call.dtype(0),
        tuple(dims[axis] for axis in order),
        None if value is None else value.transpose(order),
    )


@rule("Concat")
def _concat(call: Call) -> Fact:
    shapes = [call.shape(i) for i in range(len(call.inputs))]
    rank = len(shapes[0])
    if any(len(shape) != rank for shape in shapes):
        raise Unknown
    axis = call.axis(call.attr("axis", 1), rank)
    dims = []
    for at in range(rank):
        extents = [shape[at] for shape in shapes]
        dims.append(total(extents) if at == axis else _same(extents))
    dtype = call.dtype(0)
    shape = followed(dims, dtype)
    if shape is None or all(call.value(i) is None for i in range(len(shapes))):
        return Fact(dtype, tuple(dims))
    values = [call.value(i) for i in range(len(shapes))]
    if any(value is None or value.dtype == object for value in values):
        values = [call.elements(i) for i in range(len(shapes))]
    parts = [value for value in values if value is not None]
    if len(parts) != len(values):
        return Fact(dtype, tuple(dims))
    return Fact(dtype, tuple(dims), _settled(np.concatenate(parts, axis), dtype))


def _same(extents: Sequence[Dim]) -> Dim:
    """Return the extent of an axis on which all operands agree: the one that says most."""
    return next((extent for extent in extents if isinstance(extent, int)), extents[0])


@rule("Slice")
def _slice(call: Call) -> Fact:
    dims = list(call.shape(0))
    if call.opset < 10:
        starts = list(call.attr("starts", []))
        ends, axes = list(call.attr("ends", [])), call.attr("axes")
        steps: list[Dim | None] = [1] * len(starts)
    else:
        axes = call.fixed(3) if call.has(3) else None
        found = [call.numbers(i) if call.has(i) else None for i in (1, 2, 4)]
        count = next((len(f) for f in found if f is not None), None if axes is None else len(axes))
        if count is None:
            return Fact(call.dtype(0), tuple(call.fresh(i, d) for i, d in enumerate(dims)))
        starts, ends = ([None] * count if f is None else f for f in found[:2])
        steps = found[2] or ([None] * count if call.has(4) else [1] * count)
    axes = list(range(len(starts))) if axes is None else axes
    cuts: list[slice | None] = [slice(None)] * len(dims)
    for start, end, step, at in zip(starts, ends, steps, axes, strict=True):
        axis = call.axis(int(at), len(dims))
        extent = dims[axis]
        dims[axis] = _sliced(call, axis, extent, start, end, step)
        numbers = (start, end, step)
        if all(isinstance(n, int) for n in numbers) and step != 0:
            cuts[axis] = _cut(*numbers)  # type: ignore[arg-type]
        else:
            cuts[axis] = None
    value = call.value(0)
    if value is None or any(cut is None for cut in cuts):
        return Fact(call.dtype(0), tuple(dims))
    return Fact(call.dtype(0), tuple(dims), _settled(value[tuple(cuts)], call.dtype(0)))


def _cut(start: int, end: int, step: int) -> slice:
    # Below the first element is None to Python where it counts backwards; ONNX writes a number
    # so low that counting from the back does not reach.
    return slice(start, None if step < 0 and end <= -BEYOND else end, step)


def _sliced(
    call: Call, axis: int, extent: Dim, start: Dim | None, end: Dim | None, step: Dim | None
) -> Dim:
    symbols = call.symbols
    if not isinstance(step, int) or step == 0:
        return call.fresh(axis, extent)
    if isinstance(extent, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(extent)[_cut(start, end, step)])
    if step < 0:
        # The usual ones: all of the axis from the back, and what an end at or below -extent gives.
        if (
            start is not None
            and end is not None
            and _position(symbols, extent - 1, start, extent) == extent - 1
            and (symbols.high(end + extent) < 0 or symbols.high(end) <= -BEYOND)
        ):
            return ceil_division(extent, -step)
        return call.fresh(axis, ceil_division(extent, -step))
    first = None if start is None else _position(symbols, extent, start, extent)
    last = None if end is None else _position(symbols, extent, end, extent)
    if first is None or last is None:
        upper = extent
        if last is not None:
            upper = symbols.minimum(upper, last)
        if first is not None:
            upper = symbols.maximum(upper - first, 0)
        return call.fresh(axis, ceil_division(upper, step))
    return ceil_division(symbols.maximum(last - first, 0), step)


def _position(symbols: Symbols, limit: Dim, index: Dim, extent: Dim) -> Dim | None:
    """Return ``index`` counted from the front and clamped to 0 .. ``limit``.

    None where its sign, which says from where it counts, is not known.
    """
    low, high = symbols.interval(index)
    if low >= BEYOND:
        return limit
    if low >= 0:
        return symbols.minimum(index, limit)
    if high < 0:
        return symbols.maximum(index + extent, 0)
    # Like ``extent - 7``: from the back only where the axis is shorter than that; then clamped.
    return None


@rule("Split")
def _split(call: Call) -> list[Fact]:
    dims = call.shape(0)
    axis = call.axis(call.attr("axis", 0), len(dims))
    count = len(call.node.outputs)
    sizes: list[Dim | None]
    if call.attr("split") is not None:
        sizes = list(call.attr("split"))
    elif call.has(1):
        sizes = call.numbers(1) or [None] * count
    else:
        chunk = ceil_division(dims[axis], call.attr("num_outputs", count))
        sizes = [chunk] * (count - 1)
        sizes.append(dims[axis] - chunk * (count - 1))
    if len(sizes) != count:
        raise Unknown
    if sizes.count(None) == 1:
        rest = dims[axis] - total(size for size in sizes if size is not None)
        sizes[sizes.index(None)] = rest
    value = call.value(0)
    facts = []
    at = 0
    for output, size in enumerate(sizes):
        if size is None:
            size = call.fresh(axis, dims[axis], output=output)
        part = None
        if value is not None and isinstance(size, int) and at >= 0:
            part = _settled(np.take(value, range(at, at + size), axis), call.dtype(0))
            at += size
        else:
            at = -1
        facts.append(Fact(call.dtype(0), (*dims[:axis], size, *dims[axis + 1 :]), part))
    return facts


@rule("Gather")
def _gather(call: Call) -> Fact:
    dims, where = call.shape(0), call.shape(1)
    axis = call.axis(call.attr("axis", 0), len(dims))
    result = (*dims[:axis], *where, *dims[axis + 1 :])
    value = call.value(0)
    if value is None or followed(result, call.dtype(0)) is None:
        return Fact(call.dtype(0), result)
    indices = call.value(1)
    if indices is None or indices.dtype == object:
        return Fact(call.dtype(0), result)
    if np.any((indices < -value.shape[axis]) | (indices >= value.shape[axis])):
        raise Unknown
    taken = np.take(value, indices, axis)
    return Fact(call.dtype(0), result, _taken(value, taken, call.dtype(0)))


@rule("GatherElements")
def _gather_elements(call: Call) -> Fact:
    value, indices = call.value(0), call.value(1)
    axis = call.axis(call.attr("axis", 0), len(call.shape(0)))
    taken = None
    if value is not None and indices is not None and indices.dtype != object:
        taken = np.take_along_axis(
            value, np.where(indices < 0, indices + value.shape[axis], indices), axis
        )
        taken = _settled(taken, call.dtype(0))
    return Fact(call.dtype(0), call.shape(1), taken)


@rule("GatherND")
def _gather_nd(call: Call) -> Fact:
    dims, where = call.shape(0), call.shape(1)
    batch = call.attr("batch_dims", 0)
    depth = where[-1]
    if not isinstance(depth, int) or batch + depth > len(dims):
        raise Unknown
    result = (*where[:-1], *dims[batch + depth :])
    value, indices = call.value(0), call.value(1)
    if batch or value is None or indices is None or indices.dtype == object:
        return Fact(call.dtype(0), result)
    taken = value[tuple(np.moveaxis(indices, -1, 0))]
    return Fact(call.dtype(0), result, _taken(value, taken, call.dtype(0)))


@rule("ScatterND")
def _scatter_nd(call: Call) -> Fact:
    dims, dtype = call.shape(0), call.dtype(0)
    values = [call.value(i) for i in range(3)]
    indices = values[1]
    if (values[0] is None and values[2] is None) or followed(dims, dtype) is None:
        return Fact(dtype, dims)
    data, updates = call.elements(0), call.elements(2)
    if (
        indices is None
        or indices.dtype == object
        or data is None
        or updates is None
        or call.attr("reduction", "none") != "none"
    ):
        return Fact(dtype, dims)
    result = data.copy()
    result[tuple(np.moveaxis(indices, -1, 0))] = updates
    return Fact(dtype, dims, _settled(result, dtype))


@rule("ScatterElements", "Scatter")
def _scatter_elements(call: Call) -> Fact:
    dims, dtype = call.shape(0), call.dtype(0)
    values = [call.value(i) for i in range(3)]
    indices = values[1]
    if (values[0] is None and values[2] is None) or followed(dims, dtype) is None:
        return Fact(dtype, dims)
    data, updates = call.elements(0), call.elements(2)
    axis = call.axis(call.attr("axis", 0), len(dims))
    if (
        indices is None
        or indices.dtype == object
        or data is None
        or updates is None
        or call.attr("reduction", "none") != "none"
    ):
        return Fact(dtype, dims)
    result = data.copy()
    for place in np.ndindex(*indices.shape):
        at = list(place)
        at[axis] = int(indices[place])
        result[tuple(at)] = updates[place]
    return Fact(dtype, dims, _settled(result, dtype))


@rule("Expand")
def _expand(call: Call) -> Fact:
    dims = call.shape(0)
    target = call.numbers(1)
    if target is None:
        raise Unknown
    known = [call.fresh(axis) if extent is None else extent for axis, extent in enumerate(target)]
    result = call.broadcast([dims, tuple(known)])
    shape = followed(result, call.dtype(0))
    value = call.value(0)
    if value is None or shape is None:
        return Fact(call.dtype(0), result)
    return Fact(call.dtype(0), result, np.broadcast_to(value, shape))


@rule("Tile")
def _tile(call: Call) -> Fact:
    dims = call.shape(0)
    repeats = call.numbers(1)
    if repeats is None:
        raise Unknown
    if len(repeats) != len(dims):
        raise Unknown
    result = tuple(
        call.fresh(axis) if n is None else extent * n
        for axis, (extent, n) in enumerate(zip(dims, repeats, strict=True))
    )
    value = call.value(0)
    if value is None or followed(result, call.dtype(0)) is None:
        return Fact(call.dtype(0), result)
    if not all(isinstance(n, int) for n in repeats):
        return Fact(call.dtype(0), result)
    return Fact(call.dtype(0), result, np.tile(value, [int(str(n)) for n in repeats]))


@rule("ConstantOfShape")
def _constant_of_shape(call: Call) -> Fact:
    filler = call.attr("value")
    dtype = FLOAT32 if filler is None else np.dtype(filler.dtype)
    target = call.numbers(0)
    if target is None:
        return Fact(dtype)
    dims = tuple(call.fresh(i) if extent is None else extent for i, extent in enumerate(target))
    shape = followed(dims, dtype)
    if shape is None:
        return Fact(dtype, dims)
    number = 0 if filler is None else np.asarray(filler.values).reshape(-1)[0]
    return Fact(dtype, dims, np.full(shape, number, dtype))


@rule("Pad")
def _pad(call: Call) -> Fact:
    dims = list(call.shape(0))
    pads: list[Dim | None] | None
    pads = list(call.attr("pads")) if call.attr("pads") is not None else call.numbers(1)
    axes = call.fixed(3) if call.has(3) else None
    axes = list(range(len(dims))) if axes is None else [call.axis(a, len(dims)) for a in axes]
    if pads is None:
        return Fact(call.dtype(0), call.fresh_dims(len(dims)))
    if len(pads) != 2 * len(axes):
        raise Unknown
    for at, axis in enumerate(axes):
        before, after = pads[at], pads[at + len(axes)]
        if before is None or after is None:
            dims[axis] = call.fresh(axis)
        else:
            dims[axis] = total((dims[axis], before, after))
    value = call.value(0)
    if value is None or value.ndim != 1 or call.attr("mode", "constant") != "constant":
        return Fact(call.dtype(0), tuple(dims))
    filler = call.elements(2) if call.has(2) else _array([0], ())
    before, after = pads if len(pads) == 2 else (0, 0)
    if (
        followed(dims, call.dtype(0)) is None
        or not isinstance(before, int)
        or not isinstance(after, int)
        or filler is None
        or call.attr("value")
        or min(before, after) < 0
        or call.dtype(0) not in (INT64, np.dtype(np.int32))
    ):
        return Fact(call.dtype(0), tuple(dims))
    number = filler.reshape(-1)[0]
    padded = [*[number] * before, *objects(value), *[number] * after]
    return Fact(call.dtype(0), tuple(dims), _settled(_array(padded, (len(padded),)), call.dtype(0)))


@rule("OneHot")
def _one_hot(call: Call) -> Fact:
    dims = list(call.shape(0))
    axis = call.axis(call.attr("axis", -1), len(dims) + 1)
    depth = call.number(1)
    dims.insert(axis, call.fresh(axis) if depth is None else depth)
    return Fact(call.dtype(2), tuple(dims))


@rule("NonZero")
def _non_zero(call: Call) -> Fact:
    dims = call.shape(0)
    if not dims:  # no row by the definition, one by onnxruntime
        return Fact(INT64, (call.fresh(0, 1), call.fresh(1, 1)))
    value = call.value(0)
    if value is not None and value.dtype != object:
        found = np.array(np.nonzero(value), dtype=np.int64)
        return Fact(INT64, found.shape, found)
    # Two NonZero of one tensor count the same.
    first = call.symbols.first_count.setdefault(call.node.inputs[0].name, call.output_name())
    count = call.symbols.fresh(first, "1", upper=volume(dims))
    return Fact(INT64, (len(dims), count))


@rule("Compress")
def _compress(call: Call) -> Fact:
    dims = call.shape(0)
    length = call.fact(1).dims
    axis = call.attr("axis")
    upper = volume(dims) if axis is None else dims[call.axis(axis, len(dims))]
    if length is not None and len(length) == 1:
        upper = call.symbols.minimum(upper, length[0])
    chosen = call.value(1)
    at = 0 if axis is None else call.axis(axis, len(dims))
    count: Dim
    if chosen is not None and chosen.dtype != object:
        count = int(np.count_nonzero(chosen))
    else:
        count = call.fresh(at, upper)
    if axis is None:
        return Fact(call.dtype(0), (count,))
    return Fact(call.dtype(0), (*dims[:at], count, *dims[at + 1 :]))


@rule("Unique")
def _unique(call: Call) -> list[Fact]:
    dims = call.shape(0)
    axis = call.attr("axis")
    at = 0 if axis is None else call.axis(axis, len(dims))
    extent = volume(dims) if axis is None else dims[at]
    count = call.fresh(at, extent, lower=min(1, call.symbols.low(extent)))
    values = (count,) if axis is None else (*dims[:at], count, *dims[at + 1 :])
    return [
        Fact(call.dtype(0), values),
        Fact(INT64, (count,)),
        Fact(INT64, (extent,)),
        Fact(INT64, (count,)),
    ]


@rule("Trilu")
def _trilu(call: Call) -> Fact:
    fact = call.fact(0)
    value = fact.value
    offset = call.number(1) if call.has(1) else 0
    if value is None or not isinstance(offset, int) or value.dtype == object or value.ndim < 2:
        return Fact(fact.dtype, fact.dims)
    keep = np.triu if call.attr("upper", 1) else np.tril
    return Fact(fact.dtype, fact.dims, keep(value, offset))


@rule("EyeLike")
def _eye_like(call: Call) -> Fact:
    to = call.attr("dtype")
    dtype = call.dtype(0) if to is None else helper.tensor_dtype_to_np_dtype(to)
    return Fact(dtype, call.fact(0).dims)


@rule("IsNaN", "IsInf")
def _is(call: Call) -> Fact:
    return Fact(BOOL, call.fact(0).dims)


@rule("DepthToSpace", "SpaceToDepth")
def _blocks(call: Call) -> Fact:
    batch, channels, height, width = call.shape(0, rank=4)
    size = call.attr("blocksize")
    if call.op == "DepthToSpace":
        dims = (batch, channels // (size * size), height * size, width * size)
    else:
        dims = (batch, channels * (size * size), height // size, width // size)
    return Fact(call.dtype(0), dims)


@rule("SequenceConstruct")
def _sequence(call: Call) -> Fact:
    shapes = [call.fact(i).dims for i in range(len(call.inputs))]
    first = shapes[0] if shapes else None
    same = first is not None and all(shape == first for shape in shapes)
    return Fact(call.dtype(0), first if same else None, is_sequence=True)


@rule("SequenceAt")
def _sequence_at(call: Call) -> Fact:
    fact = call.fact(0)
    return Fact(fact.dtype, fact.dims)


_EXACT_REDUCTIONS: dict[str, Any] = {"ReduceMax": np.max, "ReduceMin": np.min}
_REDUCED = ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd")


def _reduced_somewhere(call: Call, dims: Sequence[Dim], keep: bool) -> tuple[Dim, ...]:
    """Return the extents of a reduction over axes that only the run knows."""
    if keep:
        bounds = [call.symbols.maximum(extent, 1) for extent in dims]
    else:
        removed = len(call.numbers(1) or ())
        bounds = [call.symbols.maximum(*dims)] * (len(dims) - removed)
    return tuple(call.fresh(axis, bound) for axis, bound in enumerate(bounds))


def _reduced_axes(call: Call, rank: int) -> list[int]:
    """Return the axes a reduction removes."""
    axes = call.fixed(1, "axes")
    if not axes:
        return [] if call.attr("noop_with_empty_axes", 0) else list(range(rank))
    return [call.axis(axis, rank) for axis in axes]


@rule(
    *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
)
def _reduce(call: Call) -> Fact:
    dims, dtype = call.shape(0), call.dtype(0)
    keep = bool(call.attr("keepdims", 1))
    if call.has(1) and call.numbers(1) and call.fact(1).value is None:
        return Fact(dtype, _reduced_somewhere(call, dims, keep))
    axes = _reduced_axes(call, len(dims))
    result = tuple(
        1 if axis in axes else extent
        for axis, extent in enumerate(dims)
        if keep or axis not in axes
    )
    value = call.value(0)
    shape = followed(result, dtype)
    if value is None or shape is None or dtype is None or not axes or 0 in value.shape:
        return Fact(dtype, result)
    exact = _EXACT_REDUCTIONS.get(call.op)
    if exact is not None and value.dtype != object:
        return Fact(dtype, result, np.asarray(exact(value, axis=tuple(axes), keepdims=keep), dtype))
    if call.op not in _REDUCED or dtype.kind not in "iu":
        return Fact(dtype, result)
    others = [axis for axis in range(len(dims)) if axis not in axes]
    rows = objects(value).transpose([*others, *axes])
    rows = rows.reshape(math.prod(rows.shape[: len(others)]), -1)
    reduced = [_reduction(call, row, index if shape else "") for index, row in enumerate(rows)]
    return Fact(dtype, result, settled(_array(reduced, shape), dtype))


def _reduction(call: Call, row: Array, part: int | str) -> Dim | None:
    elements = list(row)
    known = [element for element in elements if element is not None]
    if is_known(elements):
        match call.op:
            case "ReduceSum":
                return total(known)
            case "ReduceProd":
                return volume(known)
            case "ReduceMax":
                return call.symbols.maximum(*known)
            case _:
                return call.symbols.minimum(*known)
    if known and call.op == "ReduceMin":
        return call.fresh(part, call.symbols.minimum(*known), lower=-math.inf)
    if known and call.op == "ReduceMax":
        return call.fresh(part, lower=call.symbols.low(call.symbols.maximum(*known)))
    return None


@rule("ArgMax", "ArgMin")
def _arg(call: Call) -> Fact:
    dims = call.shape(0)
    axis = call.axis(call.attr("axis", 0), len(dims))
    middle = (1,) if call.attr("keepdims", 1) else ()
    return Fact(INT64, (*dims[:axis], *middle, *dims[axis + 1 :]))


@rule("TopK")
def _top_k(call: Call) -> list[Fact]:
    dims = list(call.shape(0))
    axis = call.axis(call.attr("axis", -1), len(dims))
    k: Dim | None = call.attr("k") if call.attr("k") is not None else call.number(1)
    if k is None:
        k = call.fresh(axis, dims[axis])
    elif isinstance(k, Expression):
        k = call.symbols.minimum(k, dims[axis])  # a larger one is an error at run time
    dims[axis] = k
    return [Fact(call.dtype(0), tuple(dims)), Fact(INT64, tuple(dims))]
