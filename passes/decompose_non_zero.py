r"""Spell NonZero out as a running count and an extent made of Ifs.

    before         after

    x              x != 0, flat
    |                |      \
    NonZero        CumSum   count
    |                |         \
    i              ScatterElements: where in the list each index goes
                     |           \
                     |          Concat (If: 2**k elements, else none; a bit of the count each)
                     |         /
                   Slice: the first count of them
                     |
                   Div and Mod by the extents of x: i

Why it holds: the n-th element that is not zero goes to place n-1 of the list; the others go behind
them, in no place twice. What the Ifs return is as long as the count, whatever it is.

Exact. It costs one If for each bit of the number of elements of x.

Needs: the main graph, as an If in a body may not change its extent; a bound on the elements of x, of
at most 1,048,576.
Keeps: names of the NonZero, which becomes the last node, and of i.
Skips, with the reason in the report: a NonZero in a body; of a scalar; of elements that nothing bounds
or that are too many; of strings.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.data_extent import MOST_ELEMENTS, OPSET, first, partition, total
from optc.passes.dimension import Dim
from optc.passes.replacement import Operand, Replacement


class DecomposeNonZero(Pass):
    """Spell NonZero out as a running count and an extent made of Ifs."""

    name = "decompose-non-zero"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every NonZero of ``graph``."""
        report = Report()
        for node in facts.nodes("NonZero"):
            most = _most(node, facts)
            if isinstance(most, str):
                report.skipped[node.name] = most
                continue
            new = Replacement(graph, facts, node)
            new.finish(report, _spelt_out(new, node.inputs[0], most))
        return report


def _most(node: gs.Node, facts: Facts) -> int | str:
    """Return how many elements ``node`` looks at, at most, or why it stays."""
    if facts.in_body:
        return "it is in a body, where TensorRT lets no data decide an extent"
    x = node.inputs[0].name
    dims, dtype = facts.shapes.dims(x), facts.shapes.dtype(x)
    if dims is None or dtype is None or dtype == object:
        return "its input has no known rank, or holds no numbers"
    if not dims:
        return "its input is a scalar: no axis that an index could be along"
    most = math.prod(facts.shapes.interval(dim)[1] for dim in dims)
    if not most <= MOST_ELEMENTS:
        return f"it looks at {'any number of' if math.isinf(most) else int(most)} elements"
    if not facts.reach_opset(OPSET):
        return f"the model cannot be raised to opset {OPSET}"
    return max(1, int(most))


def _spelt_out(new: Replacement, x: gs.Tensor, most: int) -> gs.Tensor:
    dims, dtype = new.facts.shapes.dims(x.name), new.facts.shapes.dtype(x.name)
    assert dims is not None, "_most() lets no other input through"
    assert dtype is not None
    flat = x if len(dims) == 1 else new.add("Reshape", x, np.array([-1], np.int64))
    if dtype != np.bool_:
        flat = new.add("Not", new.add("Equal", flat, np.zeros((), dtype)))
    count = total(new, new.cast(flat, np.int64))
    found = first(new, partition(new, flat), count, most)
    row = np.array([1, -1], np.int64)
    rows = [new.add("Reshape", each, row) for each in _coordinates(new, found, x, dims)]
    return new.add("Concat", *rows, axis=0) if len(rows) > 1 else rows[0]


def _coordinates(
    new: Replacement, flat: gs.Tensor, x: gs.Tensor, dims: tuple[Dim, ...]
) -> list[gs.Tensor]:
    """Return, axis by axis, the coordinates of indices into the flat ``x``."""
    found, rest = [], flat
    for axis in reversed(range(1, len(dims))):
        extent = _extent(new, x, axis, dims[axis])
        found.append(new.add("Mod", rest, extent))
        rest = new.add("Div", rest, extent)
    return [rest, *reversed(found)]


def _extent(new: Replacement, x: gs.Tensor, axis: int, dim: Dim) -> Operand:
    """Return an extent to divide by; 1 where it is 0, as there is nothing to divide then."""
    if isinstance(dim, int):
        return np.array(max(dim, 1), np.int64)
    extent = new.add("Gather", new.add("Shape", x), np.array(axis, np.int64), axis=0)
    if new.facts.shapes.interval(dim)[0] > 0:
        return extent
    return new.add("Max", extent, np.array(1, np.int64))
