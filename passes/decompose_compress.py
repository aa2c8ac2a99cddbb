r"""Let Compress be a Gather of the indices where its condition is true.

    before              after

    x   condition       x     indices where the condition is true
     \    /              \      /
    Compress              Gather
        |                    |
        y                    y

Why it holds: it is what Compress is. How many indices there are an extent made of Ifs says (see
`data_extent`), which is one If for each bit of the number of conditions.

Exact.

Needs: the main graph, as an If in a body may not change its extent; as many conditions, or fewer, as x
has elements along the axis, at most 1,048,576.
Keeps: names of y.
Skips, with the reason in the report: a Compress in a body; conditions that nothing bounds or that are
too many; more conditions than elements, or not known to be fewer.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.data_extent import MOST_ELEMENTS, OPSET, first, partition, total
from optc.passes.dimension import minimum, product
from optc.passes.replacement import Replacement


class DecomposeCompress(Pass):
    """Let Compress be a Gather of the indices where its condition is true."""

    name = "decompose-compress"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every Compress of ``graph``."""
        report = Report()
        for node in facts.nodes("Compress"):
            most = _most(node, facts)
            if isinstance(most, str):
                report.skipped[node.name] = most
                continue
            new = Replacement(graph, facts, node)
            x, condition = node.inputs
            axis = node.attrs.get("axis")
            if axis is None:
                x = new.add("Reshape", x, np.array([-1], np.int64))
            count = total(new, new.cast(condition, np.int64))
            indices = first(new, partition(new, condition), count, most)
            new.finish(report, new.add("Gather", x, indices, axis=axis or 0))
        return report


def _most(node: gs.Node, facts: Facts) -> int | str:
    """Return how many elements ``node`` may select, or why it stays."""
    if facts.in_body:
        return "it is in a body, where TensorRT lets no data decide an extent"
    dims, conditions = (facts.shapes.dims(tensor.name) for tensor in node.inputs)
    if dims is None or conditions is None:
        return "its shapes are not known"
    most = facts.shapes.interval(conditions[0])[1]
    if not most <= MOST_ELEMENTS:
        return "it has too many conditions, or any number"
    axis = node.attrs.get("axis")
    extent = product(dims) if axis is None else dims[axis]
    if minimum(conditions[0], extent) != conditions[0]:
        return "it may have more conditions than elements"
    if not facts.reach_opset(OPSET):
        return f"the model cannot be raised to opset {OPSET}"
    return max(1, int(most))
