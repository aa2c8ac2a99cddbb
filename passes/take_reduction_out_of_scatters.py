r"""Take the reduction out of a scatter whose places are all different.

    before                           after

    data  indices  updates           data  indices
      \      |      /                  |  \   |
      ScatterND reduction=add          |  GatherND   updates
             |                         |       \      /
             y                         |         Add
                                       |          |
                                     ScatterND (indices, no reduction)
                                            |
                                            y

Why it holds: where no two updates go to one place, each is combined with what stands there, once. That
is to read what stands there, combine, and write. Exact. ScatterElements and GatherElements are the same
for single elements.

Needs: constant indices, no two of them of one place, and data of static extents along what they index.
Keeps: the name of y.
Skips, with the reason in the report: indices that are not constant, as two may then be equal; equal
indices; more than a million.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim
from optc.passes.graph import Array
from optc.passes.replacement import Replacement

COMBINED = {"add": "Add", "mul": "Mul", "max": "Max", "min": "Min"}
GATHERING = {"ScatterElements": "GatherElements", "ScatterND": "GatherND"}

MOST_INDICES = 1 << 20


class TakeReductionOutOfScatters(Pass):
    """Take the reduction out of ScatterND and ScatterElements whose places are all different."""

    name = "take-reduction-out-of-scatters"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Rewrite every scatter of ``graph`` that reduces."""
        report = Report()
        for node in facts.nodes(*GATHERING):
            reduction = node.attrs.get("reduction", "none")
            if reduction not in COMBINED:
                continue
            data, indices, updates = node.inputs
            if reason := _why_not(node, facts):
                report.skipped[node.name] = reason
                continue
            along = {"axis": node.attrs.get("axis", 0)} if node.op == "ScatterElements" else {}
            new = Replacement(graph, facts, node)
            there = new.add(GATHERING[node.op], data, indices, **along)
            combined = new.add(COMBINED[reduction], there, updates)
            new.finish(report, new.add(node.op, data, indices, combined, **along))
        return report


def _why_not(node: gs.Node, facts: Facts) -> str | None:
    """Return why two updates may go to one place, or None."""
    data, indices, _ = node.inputs
    if not isinstance(indices, gs.Constant):
        return "its indices are no constant: two of them may be equal"
    dims = facts.shapes.dims(data.name)
    if dims is None or np.prod(indices.shape) > MOST_INDICES:
        return "its data has no known rank, or its indices are too many to look at"
    places = _places(node, np.asarray(indices.values), dims)
    if places is None:
        return "the extents that it indexes are not static"
    return None if len(np.unique(places, axis=0)) == len(places) else "two of its indices are equal"


def _places(node: gs.Node, indices: Array, dims: tuple[Dim, ...]) -> Array | None:
    """Return one row of coordinates for each place that is written to."""
    if node.op == "ScatterND":
        rows = indices.reshape(-1, indices.shape[-1])
        extents = dims[: rows.shape[1]]
    else:
        axis = int(node.attrs.get("axis", 0)) % len(dims)
        rows = np.stack([grid.reshape(-1) for grid in np.indices(indices.shape)], axis=1)
        rows[:, axis] = indices.reshape(-1)
        extents = tuple(dim if at == axis else 1 << 62 for at, dim in enumerate(dims))
    known = [extent for extent in extents if isinstance(extent, int)]
    if len(known) != len(extents):
        return None if (rows < 0).any() else rows
    places: Array = np.where(rows < 0, rows + np.array(known, np.int64), rows)
    return places
