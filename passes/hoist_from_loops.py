r"""Take out of a Loop or Scan what is the same in every round.

    before                              after

    e   n   h                           e
    :   |   |                           |
    :  Loop, body: (i, go, h) ->      MatMul K   n   h
    :..[e -> MatMul K -> k]             |        |   |
       [h, k -> MatMul -> h']           k       Loop, body: (i, go, h) ->
        |                               :.......[h, k -> MatMul -> h']
        h'                                       |
                                                 h'

Why it holds: a node of the body that reads constants and tensors from outside only gives the same in
each round, so it is computed once, in front. Exact. That is what a decoder does with the keys and values
of what it attends to; and what stands in front may run in an engine where the Loop itself may not.

Where nobody knows whether there is a round at all, only nodes move that cannot fail: a Loop of no
rounds must not stop at one. That nothing reads their results then is no harm.

Keeps: the order of what a run can observe: nodes that draw random numbers, or that nobody knows, stay.
Skips, with the reason in the report: what the body hands on or gives out unchanged; what may fail.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.determinism import is_deterministic
from optc.passes.dimension import Dim
from optc.passes.graph import reads
from optc.passes.match import argument
from optc.passes.totality import is_total


class HoistFromLoops(Pass):
    """Take out of a Loop or Scan what is the same in every round."""

    name = "hoist-from-loops"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Hoist from the bodies of the nodes of ``graph``."""
        report = Report()
        hoisted: dict[int, list[gs.Node]] = {}
        for node in facts.nodes("Loop", "Scan"):
            body: gs.Graph = node.attrs["body"]
            moved = _without_lone_weights(list(_same_each_round(node, body, facts, report)))
            if not moved:
                continue
            gone = {id(inner) for inner in moved}
            body.nodes = [inner for inner in body.nodes if id(inner) not in gone]
            hoisted[id(node)] = moved
            report.merged.update({inner.name: (inner.name,) for inner in moved})
        if hoisted:
            graph.nodes = [each for n in graph.nodes for each in (*hoisted.get(id(n), ()), n)]
        return report


def _same_each_round(
    node: gs.Node, body: gs.Graph, facts: Facts, report: Report
) -> Iterator[gs.Node]:
    """Yield the nodes of ``body`` that may be computed in front of ``node``, in their order."""
    own = {id(tensor) for tensor in body.inputs}
    given = {id(tensor) for tensor in body.outputs}
    runs = _surely_runs(node, body, facts)
    for inner in body.nodes:
        if any(id(tensor) in own for tensor in reads(inner)):
            pass
        elif any(id(tensor) in given for tensor in inner.outputs):
            report.skipped[inner.name] = "the body gives its result out"
        elif not is_deterministic(inner):
            report.skipped[inner.name] = "it may give another result in each round"
        elif not runs and not is_total(inner, facts.shapes):
            report.skipped[inner.name] = "it may fail, and there may be no round"
        else:
            yield inner
            continue
        own.update(id(tensor) for tensor in inner.outputs)


def _surely_runs(node: gs.Node, body: gs.Graph, facts: Facts) -> bool:
    """Whether there is a first round, whatever the values."""
    if node.op == "Scan":
        dims = facts.dims(node.inputs[-1])
        axes = node.attrs.get("scan_input_axes") or [0]
        return facts.opset >= 9 and dims is not None and _is_positive(dims[axes[-1]], facts)
    start = facts.constant(argument(node, 1))
    if argument(node, 1) is not None and (start is None or not start.all()):
        return False
    trips = argument(node, 0)
    if trips is None:
        return True
    if (number := facts.constant(trips)) is not None:
        return bool(number.all() and (number > 0).all())
    value = facts.shapes.value(trips.name)
    first: Dim | None = None if value is None or value.size != 1 else value.reshape(-1)[0]
    return first is not None and _is_positive(first, facts)


def _is_positive(dim: Dim, facts: Facts) -> bool:
    return facts.shapes.interval(dim)[0] >= 1


def _without_lone_weights(moved: list[gs.Node]) -> list[gs.Node]:
    """Return ``moved`` without a DequantizeLinear whose product stays: the two are one operation."""
    inside = {id(node) for node in moved}
    return [
        node
        for node in moved
        if node.op != "DequantizeLinear"
        or any(id(reader) in inside for tensor in node.outputs for reader in tensor.outputs)
    ]
