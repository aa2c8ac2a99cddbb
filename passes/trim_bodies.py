r"""Take out of a Loop or Scan what it carries round for nothing.

    before                              after

    n   c   a   s                       n   c   s
     \  |   |  /                         \  |  /
    Loop, body: (i, c, a, s) ->         Loop, body: (i, c, s) -> (c, s + a)
                (c, a, s + a)             |
        |   |                             s'       readers of a' read a
        a'  s'

Why it holds: a value that each turn hands on as it got it is the same in all turns and behind the
last one. The body reads it from outside, and so does who read it behind. And a value that nothing
needs but its own next turn, read nowhere behind, is not worth computing. Exact.

Keeps: at least one output of each node. What is collected is left to `remove-dead`.
Skips, with the reason in the report: a value that never changes and whose last one the caller reads.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import reads, redirect
from optc.passes.match import made_by


class TrimBodies(Pass):
    """Take values out of a Loop or Scan that never change, or that nothing needs."""

    name = "trim-bodies"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Trim the bodies of the nodes of ``graph``."""
        report = Report()
        for node in facts.nodes("Loop", "Scan"):
            if node.op == "Scan" and facts.opset < 9:
                continue  # it has another form, with a batch
            trimmed = False
            body: gs.Graph = node.attrs["body"]
            for index in reversed(range(_carried(node, body))):
                if len(node.outputs) == 1:
                    break
                if _is_invariant(node, body, index):
                    if facts.is_kept(node.outputs[index]):
                        report.skipped[node.name] = "the caller reads a value that never changes"
                        continue
                    source = node.inputs[index + _before_state(node)]
                    redirect(node.outputs[index], source)
                    redirect(body.inputs[index + _before_state(node)], source)
                elif not _is_idle(node, body, index, facts):
                    continue
                _drop(node, body, index)
                trimmed = True
            if trimmed:
                report.merged[node.name] = (node.name,)
        return report


def _before_state(node: gs.Node) -> int:
    """Return how many inputs, of node and body, come before the values that are carried round."""
    return 2 if node.op == "Loop" else 0


def _ahead(node: gs.Node) -> int:
    """Return by how much outputs of the body are ahead of the node's: by the condition."""
    return 1 if node.op == "Loop" else 0


def _carried(node: gs.Node, body: gs.Graph) -> int:
    if node.op == "Loop":
        return len(body.inputs) - 2
    return len(body.inputs) - int(node.attrs["num_scan_inputs"])


def _is_invariant(node: gs.Node, body: gs.Graph, index: int) -> bool:
    """Whether the body hands a value on as it got it, and for nothing else."""
    value, own = body.inputs[index + _before_state(node)], index + _ahead(node)
    handed_on = body.outputs[own]
    while (identity := made_by(handed_on, "Identity")) is not None:
        handed_on = identity.inputs[0]
    return handed_on is value and not any(
        tensor is value for place, tensor in enumerate(body.outputs) if place != own
    )


def _is_idle(node: gs.Node, body: gs.Graph, index: int, facts: Facts) -> bool:
    """Whether a value serves only to compute itself."""
    output = node.outputs[index]
    if output.outputs or facts.is_kept(output):
        return False
    own = index + _ahead(node)
    needed = {id(tensor) for place, tensor in enumerate(body.outputs) if place != own}
    for inner in reversed(body.nodes):
        if any(id(tensor) in needed for tensor in inner.outputs):
            needed.update(id(tensor) for tensor in reads(inner))
    return id(body.inputs[index + _before_state(node)]) not in needed


def _drop(node: gs.Node, body: gs.Graph, index: int) -> None:
    """Take a carried value away from the node and its body."""
    node.inputs.pop(index + _before_state(node))
    body.inputs.pop(index + _before_state(node))
    body.outputs.pop(index + _ahead(node))
    node.outputs.pop(index)
