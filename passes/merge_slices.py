r"""Merge Slices that follow on one another, and Slices that share a tensor out.

    before                                      after

    x [batch, 8, 8]     u [batch, 6]            x               u
    |                   |        |              |               |
    Slice 0::2, axis 1  Slice    Slice          Slice           Split 4, 2
    |                   :4       4:             0::2, axis 1    |   |
    Slice 1:5, axis 2   |        |              1:5, axis 2
    |                   |        |              |
    y                   v        w              y               v   w

Why it holds: a slice of a slice takes, axis by axis, a range of a range. Slices of one axis that take
it all, each element once and in order, are what Split gives.

Needs: constant starts, ends, axes and steps. Along one axis, two become one where the extent is a number,
or where all four edges count from the front in steps of one; a Split is written where the extent is a
number. Opset 10, the first in which a Slice reads what it takes.
Keeps: a Slice that others read as well, unless all of them are Slices that take its work over.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import detach
from optc.passes.match import become, names_of
from optc.passes.movement import SLICE_READS_CUTS, Cut, cuts_of, readers_of, sizes, write_cuts

SPLIT_READS_SIZES = 13
"""The first opset in which Split reads its sizes."""


class MergeSlices(Pass):
    """Merge Slices that follow on one another; let Slices that share a tensor out be a Split."""

    name = "merge-slices"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Merge the Slices in ``graph``."""
        report = Report()
        if facts.opset < SLICE_READS_CUTS:
            return report
        slices = facts.nodes("Slice")
        here = {id(node) for node in graph.nodes}
        for first in slices:
            _merge_with_readers(first, readers_of(first.outputs[0], facts, here), facts, report)
        sources = {id(node.inputs[0]): node.inputs[0] for node in slices if node.inputs}
        for source in sources.values():
            _share_out(source, here, facts, report)
        return report


def _merge_with_readers(
    first: gs.Node, readers: list[gs.Node], facts: Facts, report: Report
) -> None:
    """Let each of ``readers`` take what ``first`` took too, if all of them can."""
    if not readers or any(node.op != "Slice" or node.domain for node in readers):
        return
    if any(tensor is first.outputs[0] for node in readers for tensor in node.inputs[1:]):
        return
    own = cuts_of(first, facts.shapes)
    dims = facts.shapes.dims(first.inputs[0].name)
    if own is None or dims is None:
        return
    merged = []
    for node in readers:
        later = cuts_of(node, facts.shapes)
        if later is None:
            return
        both: dict[int, Cut | None] = {**own, **later}
        for axis in own.keys() & later.keys():
            both[axis] = own[axis].then(later[axis], dims[axis])
        cuts = {axis: cut for axis, cut in both.items() if cut is not None}
        if len(cuts) < len(both):
            return
        merged.append(cuts)
    for node, cuts in zip(readers, merged, strict=True):
        node.inputs[0] = first.inputs[0]
        write_cuts(node, cuts, facts)
        report.merged[node.name] = names_of(first, node)
    detach(first)


def _share_out(source: gs.Tensor, here: set[int], facts: Facts, report: Report) -> None:
    """Replace the Slices that take all of one axis of ``source`` by a Split."""
    readers = {
        id(node): node
        for node in source.outputs
        if node.op == "Slice" and not node.domain and id(node) in here
    }
    if len(readers) < 2:
        return
    dims = facts.shapes.dims(source.name)
    if dims is None or facts.conditional:
        return
    by_axis: dict[int, dict[int, tuple[int, gs.Node]]] = {}  # axis -> start -> end and Slice
    for node in readers.values():
        cuts = cuts_of(node, facts.shapes) if node.inputs[0] is source else None
        if cuts is None or len(cuts) != 1:
            continue
        ((axis, cut),) = cuts.items()
        extent = dims[axis]
        if isinstance(extent, int) and cut.step == 1 and (taken := cut.indices(extent)):
            by_axis.setdefault(axis, {})[taken.start] = taken.stop, node
    for axis, parts in by_axis.items():
        at, nodes, extents = 0, [], []
        while at in parts:
            end, node = parts[at]
            nodes.append(node)
            extents.append(end - at)
            at = end
        if at == dims[axis] and len(nodes) > 1:
            _become_split(source, nodes, axis, extents, facts, report)
            return


def _become_split(
    source: gs.Tensor,
    nodes: list[gs.Node],
    axis: int,
    extents: list[int],
    facts: Facts,
    report: Report,
) -> None:
    first, *others = nodes
    outputs = [node.outputs[0] for node in nodes]
    report.merged[first.name] = names_of(*nodes)
    for node in others:
        detach(node)
    first.outputs.clear()
    first.outputs.extend(outputs)
    if facts.opset < SPLIT_READS_SIZES:
        become(first, "Split", [source], {"axis": axis, "split": extents})
    else:
        target = sizes(facts, f"{first.name}_sizes", extents)
        become(first, "Split", [source, target], {"axis": axis})
