r"""Let a Gather take from an axis that is never empty, by an element that nothing looks at.

    before              after

    x [n, 4]            x
    |                   |
    |                   Pad: one row of zeros behind
    |    i              |        i < 0 ? i + n : i
     \  /                \      /
    Gather                Gather
      |                     |
      y                     y

TensorRT refuses a Gather of something from nothing, also in a branch that is not taken where there is
nothing to take: it asks at the extents the profile calls usual.

Why it holds: an index from 0 on means the same element with more behind it. One from behind is counted
from the front first. Exact; where x is empty and there is something to take, the standard defines no
result, and the branch that returns it is not taken.

It costs a copy of x.

Needs: an axis whose extent may be 0; a known number of axes. In the main graph and in the branches of a
refused If.
Keeps: the name of y.
Skips, with the reason in the report: x of a type that Pad has not; a model that cannot be raised to
opset 11, from which on Pad takes any type.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import all_bodies, is_constant
from optc.passes.replacement import Replacement

PADDED = frozenset({"float32", "float16", "bfloat16", "int32", "int64"})
"""Types of which TensorRT pads tensors."""


class FillAxesBeforeGathers(Pass):
    """Let a Gather take from an axis that is never empty, by an element that nothing looks at."""

    name = "fill-axes-before-gathers"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fill the axes that may be empty before the Gathers in ``graph`` and its branches."""
        report = Report()
        for here, node in list(_gathers(graph, facts)):
            x, indices = node.inputs
            dims, dtype = facts.shapes.dims(x.name), facts.shapes.dtype(x.name)
            if is_constant(x) or not dims or facts.shapes.dims(indices.name) is None:
                continue
            axis = int(node.attrs.get("axis", 0)) % len(dims)
            if facts.shapes.interval(dims[axis])[0] > 0:
                continue
            if dtype is None or dtype.name not in PADDED:
                report.skipped[node.name] = f"`{x.name}` is {dtype}, which Pad has not"
            elif not facts.reach_opset(11):
                report.skipped[node.name] = "the model cannot be raised to opset 11"
            else:
                _fill(Replacement(here, facts, node), axis, len(dims), report)
        return report


def _gathers(graph: gs.Graph, facts: Facts) -> Iterator[tuple[gs.Graph, gs.Node]]:
    """Yield each Gather that may be refused, with the graph that it is in."""
    for node in facts.nodes("Gather"):
        yield graph, node
    for node in facts.nodes("If"):
        for branch in (node.attrs["then_branch"], node.attrs["else_branch"]):
            for body in (*all_bodies(branch), branch):
                for inner in body.nodes:
                    if inner.op == "Gather" and not inner.domain and inner.outputs:
                        yield body, inner


def _fill(new: Replacement, axis: int, rank: int, report: Report) -> None:
    """Write the nodes, and put them in the place of the Gather."""
    x, indices = new.node.inputs
    behind = np.zeros(2 * rank, np.int64)
    behind[rank + axis] = 1
    filled = new.add("Pad", x, behind)
    if not isinstance(indices, gs.Constant) or np.any(np.asarray(indices.values) < 0):
        dtype = new.facts.shapes.dtype(indices.name)
        extent = new.add("Gather", new.add("Shape", x), np.array(axis, np.int64), axis=0)
        if dtype != np.int64:
            extent = new.cast(extent, np.int32)
        is_behind = new.add("Less", indices, np.array(0, dtype))
        indices = new.add("Where", is_behind, new.add("Add", indices, extent), indices)
    new.finish(report, new.add("Gather", filled, indices, axis=axis))
