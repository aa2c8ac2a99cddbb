r"""Remove Expand and Tile where the operator that reads them spreads its inputs itself.

    before                              after

    scale [1, 8]        x [batch, 8]    scale [1, 8]    x [batch, 8]
    |                   |                \             /
    Expand [batch, 8]   |                      Mul
     \                 /
            Mul

Why it holds: an operator that works on inputs of unlike shapes repeats those whose extent is 1 along an
axis, to the extent that another input has there. So nobody needs to repeat them before, if another input
has that extent.

Needs: shapes that shape inference knows, equal as expressions. Opset 7, the first in which operators
spread their inputs by themselves.
Keeps: an Expand or Tile that others read as well, unless all of them are such operators.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.layout import SPREADING
from optc.passes.match import names_of
from optc.passes.movement import readers_of

MATRIX = ("MatMul",)
"""Operators that spread all axes of their inputs but the last two."""

ALL_SPREAD = 8
"""Add and its like spread their inputs since opset 7, Max, Min, Mean and Sum since this one."""


class RemoveExpands(Pass):
    """Remove Expand and Tile where the operator that reads them spreads its inputs itself."""

    name = "remove-expands"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Remove what repeats in vain in ``graph``."""
        report = Report()
        expands = facts.nodes("Expand", "Tile") if facts.opset >= ALL_SPREAD else []
        here = {id(node) for node in graph.nodes} if expands else set()
        for expand in expands:
            readers = readers_of(expand.outputs[0], facts, here)
            if not readers or not all(_spreads(node, expand, facts) for node in readers):
                continue
            for node in readers:
                _read(node, expand.outputs[0], expand.inputs[0])
                report.merged[node.name] = names_of(expand, node)
        return report


def _spreads(node: gs.Node, expand: gs.Node, facts: Facts) -> bool:
    """Whether ``node`` gives the same if it reads what ``expand`` reads."""
    fixed = 2 if node.op in MATRIX else 0
    if node.domain or node.op not in (*SPREADING, *MATRIX):
        return False
    if node.op == "PRelu" and node.inputs[0] is expand.outputs[0]:
        return False  # only the slope is spread
    small, large = (facts.shapes.dims(t.name) for t in (expand.inputs[0], expand.outputs[0]))
    others = [facts.dims(t) for t in node.inputs if t is not expand.outputs[0]]
    if small is None or large is None or any(dims is None for dims in others):
        return False
    if len(small) < fixed or len(small) > len(large):
        return False
    for place in range(1, len(large) + 1):  # from the last axis
        own = small[-place] if place <= len(small) else 1
        if own == large[-place]:
            if place > len(small) and all(len(dims or ()) < place for dims in others):
                return False  # an axis of extent 1 that nobody else has
            continue
        if place <= fixed or own != 1:
            return False
        if all(len(dims or ()) < place or (dims or ())[-place] != large[-place] for dims in others):
            return False
    return True


def _read(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new
