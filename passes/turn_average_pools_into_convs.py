r"""Turn an AveragePool with dilations into a convolution of each channel by itself.

    before                     after

    x                          x    weights [C, 1, 3, 3], each 1/9
    |                           \    /
    AveragePool 3x3              Conv, a group for each channel
      dilations 2                |
    |                            Mul: 9 / how many elements of a window lie in x
    |                            |
    y                            y

Why it holds: an average is a sum of products with 1 / (elements of a window). Where padding does not
count, a window at the edge has fewer elements: its average is larger by a factor that is constant, as
the extents of x are.

Equal up to rounding: 1 / (elements) is rounded once, where a runtime divides. It costs what the pooling
does: one multiplication for each addition.

Needs: a known number of channels; static spatial extents where padding does not count.
Keeps: the name of y.
Skips, with the reason in the report: ceil_mode and automatic padding; windows that lie in the padding
altogether; other types than float32 and float16; what is needed and not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim
from optc.passes.graph import Array
from optc.passes.replacement import Declined, Replacement, replace_each


class TurnAveragePoolsIntoConvs(Pass):
    """Turn average pooling with dilations into convolutions of each channel by itself."""

    name = "turn-average-pools-into-convs"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Turn every AveragePool of ``graph`` that has dilations."""
        nodes = [
            node
            for node in facts.nodes("AveragePool")
            if any(dilation != 1 for dilation in node.attrs.get("dilations") or ())
        ]
        return replace_each(nodes, facts, lambda node: Replacement(graph, facts, node), _convolved)


def _convolved(new: Replacement) -> gs.Variable:
    """Write the nodes and return the result."""
    attrs, [x] = new.node.attrs, new.node.inputs
    dims, dtype = new.facts.shapes.dims(x.name), new.facts.shapes.dtype(x.name)
    if dims is None or dtype is None or not isinstance(dims[1], int):
        raise Declined("its channels are not known")
    if dtype.name not in ("float32", "float16"):
        raise Declined(f"it computes in {dtype}")
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or attrs.get("ceil_mode", 0):
        raise Declined("its windows go beyond its padding")
    rank = len(dims) - 2
    kernel = [int(extent) for extent in attrs["kernel_shape"]]
    strides = attrs.get("strides") or [1] * rank
    pads, dilations = attrs.get("pads") or [0] * 2 * rank, attrs["dilations"]
    pooled = new.add(
        "Conv",
        x,
        np.full((dims[1], 1, *kernel), 1 / prod(kernel), dtype),
        group=dims[1],
        kernel_shape=kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
    )
    if not any(pads) or attrs.get("count_include_pad", 0):
        return pooled
    counts = [np.ones(())]
    for axis, extent in enumerate(dims[2:]):
        edges = pads[axis], pads[axis + rank]
        along = _counts(extent, edges, kernel[axis], strides[axis], dilations[axis])
        counts.append(np.multiply.outer(counts[-1], along))
    if not counts[-1].all():
        raise Declined("a window of it lies in the padding altogether")
    return new.add("Mul", pooled, (prod(kernel) / counts[-1])[np.newaxis].astype(dtype))


def _counts(extent: Dim, pads: Sequence[int], kernel: int, stride: int, dilation: int) -> Array:
    """Return how many elements of each window along an axis lie in x."""
    if not isinstance(extent, int):
        raise Declined("its spatial extents are not static, and its padding does not count")
    last = extent + pads[1] - (kernel - 1) * dilation
    starts = np.arange(-pads[0], last, stride)
    places: Array = starts[:, np.newaxis] + np.arange(kernel) * dilation
    counts: Array = ((places >= 0) & (places < extent)).sum(1)
    return counts
