r"""Let a vector that is multiplied with a stack of matrices be a matrix of one row.

    before                    after

    v [k]   x [b, k, n]       v
      \     /                 |
       MatMul                 Unsqueeze
         |                    |        x
         y [b, n]             [1, k]  /
                               \     /
                                MatMul
                                  |
                                Squeeze: [b, 1, n] to [b, n]
                                  |
                                  y

Why it holds: it is how MatMul is defined for a vector. Exact: no element is moved. TensorRT's parser
gives the vector as many axes as the stack has, and loses count where all extents are known.

Needs: a vector on the left; at least three known axes on the right.
Keeps: the name of y.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.replacement import Replacement


class GiveVectorsARow(Pass):
    """Let a vector that is multiplied with a stack of matrices be a matrix of one row."""

    name = "give-vectors-a-row"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Rewrite the products in ``graph`` of a vector and a stack of matrices."""
        report = Report()
        for node in facts.nodes("MatMul"):
            vector, stack = node.inputs
            left, right = (facts.shapes.dims(tensor.name) for tensor in node.inputs)
            if left is None or right is None or len(left) != 1 or len(right) < 3:
                continue
            new = Replacement(graph, facts, node)
            product = new.add("MatMul", new.along("Unsqueeze", vector, [0]), stack)
            new.finish(report, new.along("Squeeze", product, [len(right) - 2]))
        return report
