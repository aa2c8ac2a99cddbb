r"""Spell MaxUnpool out as a scatter into zeros.

    before               after

    x     indices        x     indices     zeros of the output
     \     /              \      |        /
    MaxUnpool              Reshape to one axis
        |                        |
        y                 ScatterElements
                                 |
                          Reshape to the output
                                 |
                                 y

Why it holds: an index counts through the whole output, images and channels included, and each element
of x goes where its index says; everything else is 0. Exact. Where windows overlap, two elements may
have one index: as what MaxPool gives, they are equal, so that their order is no matter.

Keeps: the name of y.
Skips, with the reason in the report: an output_shape, as runtimes do not agree on what the indices
count through then; a rank or type that is not known; a model that cannot be raised to opset 11.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import argument
from optc.passes.replacement import Replacement


class DecomposeMaxUnpool(Pass):
    """Spell MaxUnpool out as a ScatterElements into zeros."""

    name = "decompose-max-unpool"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every MaxUnpool of ``graph``."""
        report = Report()
        for node in facts.nodes("MaxUnpool"):
            x = node.inputs[0]
            dims, dtype = facts.shapes.dims(x.name), facts.shapes.dtype(x.name)
            if dims is None or dtype is None:
                report.skipped[node.name] = "the rank or type of what it unpools is not known"
            elif argument(node, 2) is not None:
                report.skipped[node.name] = "runtimes do not agree on what an output_shape means"
            elif not facts.reach_opset(11):
                report.skipped[node.name] = "the model cannot be raised to opset 11"
            else:
                new = Replacement(graph, facts, node)
                new.finish(report, _spelt_out(node, len(dims) - 2, dtype, new))
        return report


def _spelt_out(
    node: gs.Node, rank: int, dtype: np.dtype[np.generic], new: Replacement
) -> gs.Tensor:
    """Return the output of ``node``, which has ``rank`` spatial axes."""
    x, indices = node.inputs[:2]
    kernel = np.array(node.attrs["kernel_shape"], np.int64)
    strides = np.array(node.attrs.get("strides") or [1] * rank, np.int64)
    pads = np.array(node.attrs.get("pads") or [0] * 2 * rank, np.int64).reshape(2, rank)
    factors = np.concatenate([[1, 1], strides])
    addends = np.concatenate([[0, 0], kernel - strides - pads.sum(0)])
    extents = new.add("Add", new.add("Mul", new.add("Shape", x), factors), addends)
    one_axis = np.array([-1], np.int64)
    zeros = new.add("Reshape", new.add("Expand", np.zeros((), dtype), extents), one_axis)
    scattered = new.add(
        "ScatterElements",
        zeros,
        new.add("Reshape", indices, one_axis),
        new.add("Reshape", x, one_axis),
        axis=0,
    )
    return new.add("Reshape", scattered, extents)
