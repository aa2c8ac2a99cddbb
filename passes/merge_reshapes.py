r"""Merge chains of Reshape, Flatten, Squeeze and Unsqueeze into one.

    before                          after

    x [batch, 16, 8]                x [batch, 16, 8]
    |                               |
    Flatten                         Reshape [0, 1, 2, 64]
    |                               |
    Reshape [-1, 2, 64]             y [batch, 1, 2, 64]
    |
    Unsqueeze 1
    |
    y [batch, 1, 2, 64]

Why it holds: none of them changes the order of the elements, so that only the last shape counts. The
same is true of a Transpose that moves nothing but axes of extent 1, where it stands next to another of
them.

The one that is left is an Unsqueeze or a Squeeze where all were, else a Reshape. What it says is
written with numbers, with 0 for an extent that is copied, and -1 for at most one: beside extents that
are never zero.

Needs: sizes that shape inference knows, or a last Reshape whose own target does not depend on what
comes before it. A node that is read by others as well goes only if all of them take its work over.
Keeps: the branches of an If as they are, where sizes would have to be written out: the extents at hand
may belong to the other branch.
Skips, with the reason in the report: more than one size that only the run knows.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import argument, become, names_of
from optc.passes.movement import (
    RESHAPING,
    axes_of,
    integers,
    perm_of,
    readers_of,
    reads_axes,
    reshape_target,
    sizes,
)
from optc.passes.shape import Shapes

RESHAPE_READS_SHAPE = 5
"""The first opset in which Reshape reads its target."""


class MergeReshapes(Pass):
    """Merge chains of Reshape, Flatten, Squeeze and Unsqueeze into one."""

    name = "merge-reshapes"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Merge what follows on one another in ``graph``."""
        report = Report()
        here = {id(node) for node in graph.nodes}
        for first in facts.nodes(*RESHAPING, "Transpose"):
            readers = readers_of(first.outputs[0], facts, here)
            chain = (first, *readers)
            if not readers or not all(_may_keep_order(node, first) for node in readers):
                continue
            if all(node.op == "Transpose" for node in chain):
                continue
            if not all(_keeps_order(node, facts.shapes) for node in chain):
                continue
            plans = [_merged(first, node, facts) for node in readers]
            if None in plans:
                report.skipped[first.name] = "only the run knows what the merged one has to say"
                continue
            for node, plan in zip(readers, plans, strict=True):
                assert plan is not None, "looked for above"
                _write(node, first.inputs[0], *plan, facts)
                report.merged[node.name] = names_of(first, node)
        return report


Plan = tuple[str, list[int]]
"""An operator, and the axes or the shape that it is given."""


def _may_keep_order(node: gs.Node, first: gs.Node) -> bool:
    """Whether ``node`` reshapes what ``first`` makes, rather than reads a shape from it."""
    source = first.outputs[0]
    return (
        (node.op in RESHAPING or node.op == "Transpose")
        and not node.domain
        and node.inputs[0] is source
        and all(tensor is not source for tensor in node.inputs[1:])
    )


def _keeps_order(node: gs.Node, shapes: Shapes) -> bool:
    if node.op != "Transpose":
        return True
    dims, perm = shapes.dims(node.inputs[0].name), perm_of(node, shapes)
    if dims is None or perm is None:
        return False
    moved = [axis for axis in perm if dims[axis] != 1]
    return moved == sorted(moved)


def _merged(first: gs.Node, second: gs.Node, facts: Facts) -> Plan | None:
    """Return what ``second`` has to be to do what ``first`` does too."""
    source = facts.shapes.dims(first.inputs[0].name)
    goal = facts.shapes.dims(second.outputs[0].name)
    if source is not None and goal is not None and first.op == second.op:
        if second.op == "Unsqueeze":
            inner = _left(axes_of(first, facts), len(goal) - len(axes_of(second, facts) or ()))
            outer = _left(axes_of(second, facts), len(goal))
            if inner is not None and outer is not None:
                old = [outer[axis] for axis in inner]
                return "Unsqueeze", [axis for axis in range(len(goal)) if axis not in old]
        if second.op == "Squeeze":
            inner = _left(axes_of(first, facts), len(source))
            outer = None if inner is None else _left(axes_of(second, facts), len(inner))
            if inner is not None and outer is not None:
                old = [inner[axis] for axis in outer]
                return "Squeeze", [axis for axis in range(len(source)) if axis not in old]
    if second.op == "Reshape":
        target = integers(argument(second, 1))
        if target is not None and 0 not in target:
            return "Reshape", target
    if source is None or goal is None or facts.conditional or facts.opset < RESHAPE_READS_SHAPE:
        return None
    written = reshape_target(source, goal, facts.shapes)
    return None if written is None else ("Reshape", written)


def _left(axes: list[int] | None, rank: int) -> list[int] | None:
    """Return the axes from 0 to ``rank`` that are not among ``axes``."""
    if axes is None:
        return None
    gone = {axis % rank for axis in axes}
    return [axis for axis in range(rank) if axis not in gone]


def _write(node: gs.Node, source: gs.Tensor, op: str, numbers: list[int], facts: Facts) -> None:
    if op != "Reshape" and not reads_axes(op, facts.opset):
        become(node, op, [source], {"axes": numbers})
        return
    noun = "target" if op == "Reshape" else "axes"
    become(node, op, [source, sizes(facts, f"{node.name}_{noun}", numbers)])
