r"""Remove nodes that nothing reads, and outputs of nodes that nothing reads.

    before                          after

        x                               x
       / \                              |
    Relu  MaxPool                    MaxPool
     |     |    \                       |
     a     y   indices                  y

Why it holds: nodes have no effect but their outputs.

An output is dropped where the operator may go without it: an optional one (the mask of a Dropout,
the indices of a MaxPool), an output of an If, a collected output of a Loop or Scan. The body ends
without it too, and what only it needed goes in the next round.

Keeps: the first output of every node, and the outputs of BatchNormalization: before opset 14 their
number says whether it is training.
"""

from __future__ import annotations

from functools import cache

import onnx
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import bodies_of, remove_dead


class RemoveDead(Pass):
    """Remove nodes that nothing reads, and optional outputs that nothing reads."""

    name = "remove-dead"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Remove what nothing reads from ``graph``."""
        report = Report()
        for node in remove_dead(graph, facts.kept):
            report.removed[node.name] = "nothing reads what it computes"
        for node in graph.nodes:
            if _drop_outputs(node, facts):
                report.merged[node.name] = (node.name,)
        return report


def _drop_outputs(node: gs.Node, facts: Facts) -> bool:
    """Drop the outputs of ``node`` that nothing reads and that it may go without."""
    unread = [
        index
        for index, tensor in enumerate(node.outputs)
        if tensor.name and not tensor.outputs and not facts.is_kept(tensor)
    ]
    if not unread:
        return False
    if bodies_of(node):
        return _drop_body_outputs(node, unread)
    optional = _optional_outputs(node.op, node.domain or "", facts.opset)
    droppable = [index for index in unread if index in optional]
    for index in droppable:
        node.outputs[index] = gs.Variable.empty()
    while droppable and not node.outputs[-1].name:
        node.outputs.pop()
    return bool(droppable)


def _drop_body_outputs(node: gs.Node, unread: list[int]) -> bool:
    bodies = bodies_of(node)
    first, skew = _first_droppable(node, bodies[0])
    droppable = [index for index in unread if index >= first]
    for index in reversed(droppable):
        node.outputs.pop(index)
        for body in bodies:
            body.outputs.pop(index + skew)
        _forget_scan_output(node, index - first)
    return bool(droppable)


def _first_droppable(node: gs.Node, body: gs.Graph) -> tuple[int, int]:
    """Return the index of the first output that carries no state, and how body outputs are ahead."""
    match node.op:
        case "If":
            return 0, 0
        case "Loop":  # body: iteration, condition, carried -> condition, carried, collected
            return len(body.inputs) - 2, 1
        case "Scan":  # body: carried, scanned -> carried, collected
            return len(body.inputs) - node.attrs["num_scan_inputs"], 0
        case _:
            return len(node.outputs), 0


def _forget_scan_output(node: gs.Node, index: int) -> None:
    """Drop one collected output's entry from the attributes of a Scan that list one for each."""
    for name in ("scan_output_axes", "scan_output_directions"):
        if node.op == "Scan" and name in node.attrs:
            entries = list(node.attrs[name])
            del entries[index]
            if entries:
                node.attrs[name] = entries
            else:
                del node.attrs[name]


_MICROSOFT = {
    "Attention": 2,
    "EmbedLayerNormalization": 3,
    "MultiHeadAttention": 3,
    "SkipLayerNormalization": 4,
    "SkipSimplifiedLayerNormalization": 4,
}
"""Operator of com.microsoft, of which onnx has no schema -> its outputs. All but the first are optional."""


@cache
def _optional_outputs(op: str, domain: str, opset: int) -> frozenset[int]:
    """Return the indices of the outputs that an operator may go without."""
    if domain == "com.microsoft":
        return frozenset(range(1, _MICROSOFT.get(op, 1)))
    if op == "BatchNormalization" or domain or not onnx.defs.has(op, opset, domain):
        return frozenset()
    schema = onnx.defs.get_schema(op, opset, domain)
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return frozenset(
        index for index, output in enumerate(schema.outputs) if index and output.option == optional
    )
