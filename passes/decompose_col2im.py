r"""Spell Col2Im out as a transposed convolution whose weights put each element where it belongs.

    before                         after

    x [N, C*K, blocks]             x
    |                              |
    Col2Im                         Reshape [N, C*K, rows, columns]
    |                              |
    y [N, C, height, width]        ConvTranspose (group C, weights 0 and 1)
                                   |
                                   y

Why it holds: Col2Im adds element k of each block to the place that it has in the image, which is what a
transposed convolution does with the weight that is 1 at k and 0 elsewhere. Equal up to rounding: the
sum of overlapping blocks may be taken in another order. An element that is infinite or NaN spreads over
its block, as 0 times it is NaN.

It costs K multiplications for each element of x.

Needs: constant image and block shapes, one to three of spatial axes, known channels.
Keeps: the name of y.
Skips, with the reason in the report: what is needed and not known; float64 and integers.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.replacement import Declined, Replacement, replace_each


class DecomposeCol2im(Pass):
    """Spell Col2Im out as a ConvTranspose with weights of 0 and 1."""

    name = "decompose-col2im"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every Col2Im of ``graph``."""
        nodes = facts.nodes("Col2Im")
        return replace_each(nodes, facts, lambda node: Replacement(graph, facts, node), _spelt_out)


def _spelt_out(new: Replacement) -> gs.Tensor:
    """Write what the node makes."""
    node, facts = new.node, new.facts
    x, image_shape, block_shape = node.inputs
    if not isinstance(image_shape, gs.Constant) or not isinstance(block_shape, gs.Constant):
        raise Declined("the shape of its image or its blocks is no constant")
    image, block = (np.asarray(t.values).reshape(-1) for t in (image_shape, block_shape))
    dims, dtype = facts.shapes.dims(x.name), facts.shapes.dtype(x.name)
    if dims is None or len(dims) != 3 or not isinstance(dims[1], int):
        raise Declined("its channels are not known")
    if dtype is None or dtype.name not in ("float32", "float16"):
        raise Declined(f"it adds {dtype}")
    rank = len(image)
    if rank > 3:
        raise Declined(f"its image has {rank} axes")
    strides = np.array(node.attrs.get("strides") or [1] * rank)
    dilations = np.array(node.attrs.get("dilations") or [1] * rank)
    pads = np.array(node.attrs.get("pads") or [0] * 2 * rank).reshape(2, rank)
    covered = (block - 1) * dilations + 1
    blocks = (image + pads.sum(0) - covered) // strides + 1
    beyond = image + pads.sum(0) - covered - (blocks - 1) * strides  # no block reaches these
    taps = int(np.prod(block))
    channels = dims[1] // taps
    weights = np.tile(np.identity(taps), (channels, 1)).reshape(channels * taps, 1, *block)
    tall = new.add("Reshape", x, np.array([0, channels * taps, *blocks], np.int64))
    return new.add(
        "ConvTranspose",
        tall,
        weights.astype(dtype),
        group=channels,
        strides=strides.tolist(),
        dilations=dilations.tolist(),
        pads=[*pads[0].tolist(), *np.maximum(pads[1] - beyond, 0).tolist()],
        output_padding=np.maximum(beyond - pads[1], 0).tolist()
        if (beyond > pads[1]).any()
        else None,
        kernel_shape=block.tolist(),
    )
