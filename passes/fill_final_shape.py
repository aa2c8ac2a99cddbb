r"""Fill a tensor in the shape that it is read in.

    before                              after

    [1, 1, 1000, 1024]                  [1000, 1024]
      |                                   |
    ConstantOfShape v                   ConstantOfShape v
      |                                   |
    Reshape                               y
      |
      y

Why it holds: all elements are the same number, so it does not matter where they are moved to, which are
taken and how often.

Needs: the extents of the result, all known.
Keeps: names of outputs. Others that read what was filled go on doing so.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import become, made_by, names_of

MOVING = (
    "Expand",
    "Flatten",
    "Gather",
    "Reshape",
    "Slice",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
"""Operators whose output holds nothing but elements of their first input."""


class FillFinalShape(Pass):
    """Fill a tensor in the shape that it is read in."""

    name = "fill-final-shape"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Take what moves equal numbers out of ``graph``."""
        report = Report()
        for node in facts.nodes(*MOVING):
            filled = made_by(node.inputs[0], "ConstantOfShape")
            if filled is None or facts.conditional:  # extents may be those of the other branch
                continue
            dims = facts.shapes.dims(node.outputs[0].name)
            shape = [dim for dim in dims or () if isinstance(dim, int)]
            if dims is None or len(shape) != len(dims):
                continue
            target = gs.Constant(facts.fresh_name(f"{node.name}_shape"), np.array(shape, np.int64))
            become(node, "ConstantOfShape", [target], filled.attrs)
            report.merged[node.name] = names_of(filled, node)
        return report
