"""Rules of operators with bodies: what is known before, within and after If, Loop and Scan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.dimension import Dim, Expression
from optc.passes.shape_arithmetic import either
from optc.passes.shape_fact import BOOL, INT64, Array, Fact, objects, settled
from optc.passes.shape_rule import Call, Unknown

Walk = Callable[[gs.Graph, Sequence[Fact]], list[Fact]]
"""Infers a body whose inputs have the given facts, and returns those of its outputs."""

MAX_ROUNDS = 16
"""A body is walked until what is carried round settles; each round forgets something, so few are
needed, and after this many everything carried is taken as unknown."""


def infer_bodies(call: Call, walk: Walk) -> Sequence[Fact]:
    """Return the facts of the outputs of a node with bodies."""
    match call.op:
        case "If":
            return _if(call, walk)
        case "Loop":
            return _loop(call, walk)
        case "Scan" if call.opset >= 9:
            return _scan(call, walk)
    for body in call.node.attrs.values():
        if isinstance(body, gs.Graph):
            walk(body, [Fact() for _ in body.inputs])
    raise Unknown


def _body(call: Call, name: str) -> gs.Graph:
    body = call.attr(name)
    if not isinstance(body, gs.Graph):
        raise Unknown
    return body


def _if(call: Call, walk: Walk) -> list[Fact]:
    then = walk(_body(call, "then_branch"), [])
    other = walk(_body(call, "else_branch"), [])
    condition = call.value(0)
    if condition is not None and condition.dtype != object and condition.size == 1:
        return then if condition.reshape(-1)[0] else other
    return [
        _joined(call, index, a, b) for index, (a, b) in enumerate(zip(then, other, strict=False))
    ]


def _joined(call: Call, output: int, a: Fact, b: Fact) -> Fact:
    """Return what holds of an output that is one of two tensors."""
    dtype = a.dtype if a.dtype == b.dtype else None
    if a.dims is None or b.dims is None or len(a.dims) != len(b.dims):
        return Fact(dtype, is_sequence=a.is_sequence)
    dims = []
    for axis, (x, y) in enumerate(zip(a.dims, b.dims, strict=True)):
        if x == y:
            dims.append(x)
            continue
        low = max(0, min(call.symbols.low(x), call.symbols.low(y)))
        upper = call.symbols.maximum(x, y)
        dims.append(call.fresh(axis, upper, lower=low, output=output))
    value = _joined_value(call, output, a.value, b.value)
    return Fact(dtype, tuple(dims), value, is_sequence=a.is_sequence)


def _joined_value(call: Call, output: int, a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None or a.shape != b.shape:
        return None
    if a.dtype != object and b.dtype != object and np.array_equal(a, b):
        return a
    elements = np.empty(a.size, dtype=object)
    pairs = zip(objects(a).reshape(-1), objects(b).reshape(-1), strict=True)
    for at, (x, y) in enumerate(pairs):
        elements[at] = either(call, at if a.shape else "", x, y, output)
    dtype = a.dtype if a.dtype != object else b.dtype
    result = elements.reshape(a.shape)
    return result if dtype == object else settled(result, dtype)


def _loop(call: Call, walk: Walk) -> list[Fact]:
    body = _body(call, "body")
    limit = call.number(0) if call.has(0) else None
    started = call.value(1) if call.has(1) else np.array(True)
    name = str(body.inputs[0].name)
    last = None if limit is None else limit - 1
    turn = np.empty((), dtype=object)
    turn[()] = call.symbols.fresh(name, "", lower=0, upper=last)
    first = [
        Fact(INT64, (), turn),
        Fact(BOOL, ()),
    ]
    initial = [call.fact(i) for i in range(2, len(call.inputs))]
    carried, outputs = _settle(call, body, walk, initial, first, skip=1)
    count = len(carried)
    # The loop runs to its limit where the body says that it always goes on.
    goes_on = outputs[0].value if outputs else None
    is_endless = (
        (goes_on is not None and goes_on.dtype != object and bool(goes_on.all()))
        or (bool(body.outputs) and body.outputs[0].name == body.inputs[1].name)
    ) and (started is not None and started.dtype != object and bool(started.all()))
    trips: Dim
    if is_endless and limit is not None:
        trips = call.symbols.maximum(limit, 0)
    else:
        trips = call.symbols.fresh(call.node.name, "trips", upper=limit)
    facts = [_left(call, i, initial[i], carried[i]) for i in range(count)]
    for fact in outputs[1 + count :]:
        dims = None if fact.dims is None else (trips, *fact.dims)
        facts.append(Fact(fact.dtype, dims))
    return facts


def _scan(call: Call, walk: Walk) -> list[Fact]:
    body = _body(call, "body")
    scans = int(call.attr("num_scan_inputs", 0))
    states = len(call.inputs) - scans
    axes = call.attr("scan_input_axes") or [0] * scans
    length: Dim | None = None
    rows = []
    for index, axis in zip(range(states, len(call.inputs)), axes, strict=True):
        dims = call.shape(index)
        at = call.axis(axis, len(dims))
        if length is None or isinstance(dims[at], int):
            length = dims[at]
        rows.append(Fact(call.dtype(index), (*dims[:at], *dims[at + 1 :])))
    if length is None:
        raise Unknown
    initial = [call.fact(i) for i in range(states)]
    carried, outputs = _settle(call, body, walk, initial, rows, skip=0, rows_last=True)
    facts = [_left(call, i, initial[i], carried[i]) for i in range(states)]
    stacked = outputs[states:]
    out_axes = call.attr("scan_output_axes") or [0] * len(stacked)
    for fact, axis in zip(stacked, out_axes, strict=True):
        if fact.dims is None:
            facts.append(Fact(fact.dtype))
            continue
        at = call.axis(axis, len(fact.dims) + 1)
        facts.append(Fact(fact.dtype, (*fact.dims[:at], length, *fact.dims[at:])))
    return facts


def _settle(
    call: Call,
    body: gs.Graph,
    walk: Walk,
    initial: Sequence[Fact],
    others: Sequence[Fact],
    *,
    skip: int,
    rows_last: bool = False,
) -> tuple[list[Fact], list[Fact]]:
    """Walk the body until what it carries round no longer changes.

    Args:
        call: The Loop or Scan.
        body: Its body.
        walk: Infers the body.
        initial: Facts of what is carried, before the first round.
        others: Facts of the body's other inputs.
        skip: How many outputs of the body stand before those that are carried.
        rows_last: Whether the other inputs stand behind the carried ones.

    Returns:
        What holds of the carried values at the start of every round and at the end, and the facts
        of the body's outputs.
    """
    carried = [Fact(f.dtype, f.dims, f.value, is_sequence=f.is_sequence) for f in initial]
    names = [str(t.name) for t in (body.inputs if rows_last else body.inputs[len(others) :])]
    outputs: list[Fact] = []
    for _ in range(MAX_ROUNDS):
        outputs = walk(body, [*carried, *others] if rows_last else [*others, *carried])
        if len(outputs) < skip + len(carried) or len(names) < len(carried):
            raise Unknown
        changed = False
        for index, name in enumerate(names[: len(carried)]):
            changed |= _generalise(call, name, carried[index], outputs[skip + index])
        if not changed:
            return carried, outputs
    carried = [Fact(f.dtype, is_sequence=f.is_sequence) for f in initial]
    return carried, walk(body, [*carried, *others] if rows_last else [*others, *carried])


def _generalise(call: Call, name: str, fact: Fact, after: Fact) -> bool:
    """Forget of ``fact`` what does not hold of ``after`` too; return whether there was any."""
    changed = False
    if fact.dims is not None and (after.dims is None or len(after.dims) != len(fact.dims)):
        fact.dims, fact.known, changed = None, None, True
    if fact.dims is not None and after.dims is not None:
        dims = list(fact.dims)
        for axis, (before, now) in enumerate(zip(fact.dims, after.dims, strict=True)):
            if before == now:
                continue
            upper = call.symbols.maximum(before, now)
            dims[axis] = call.symbols.fresh(name, str(axis), upper=upper)
        changed |= tuple(dims) != fact.dims
        fact.dims = tuple(dims)
    if fact.known is not None and not _is_same(fact.known, after.value):
        fact.known, changed = None, True
    return changed


def _is_same(a: Array, b: Array | None) -> bool:
    return (
        b is not None
        and a.shape == b.shape
        and all(x is not None and x == y for x, y in zip(a.flat, b.flat, strict=True))
    )


def _left(call: Call, output: int, before: Fact, carried: Fact) -> Fact:
    """Return what holds of a carried value after the last round."""
    if before.dims is None or carried.dims is None:
        return Fact(carried.dtype, is_sequence=carried.is_sequence)
    dims: list[Dim] = []
    for axis, (first, now) in enumerate(zip(before.dims, carried.dims, strict=True)):
        if first == now:
            dims.append(first)
            continue
        assert isinstance(now, Expression), "what changes is a symbol"
        name = now.bare_symbol
        upper = call.symbols.upper.get(name) if name is not None else None
        low = call.symbols.low(now)
        lower = 0 if math.isinf(low) else max(0, low)
        dims.append(call.fresh(axis, upper, lower=lower, output=output))
    return Fact(carried.dtype, tuple(dims), carried.known, is_sequence=carried.is_sequence)
