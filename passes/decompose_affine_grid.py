r"""Spell AffineGrid out as a product with the grid of all positions.

    before                         after

    theta [N, 2, 3]  size          theta
        \            /             |
         AffineGrid                Transpose [0, 2, 1]
             |                     |
             y [N, H, W, 2]        MatMul (constant [H*W, 3] on the left: x, y, 1)
                                   |
                                   Reshape
                                   |
                                   y

Why it holds: the operator is defined as this product. Equal up to rounding: positions are computed in
float64 and rounded once.

Needs: spatial extents that are known. The number of grids may be dynamic.
Keeps: the name of y.
Skips, with the reason in the report: extents that are not known; corners to be aligned along an axis
of one position, where the standard divides by zero; float64.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.replacement import Declined, Replacement, replace_each


class DecomposeAffineGrid(Pass):
    """Spell AffineGrid out as a MatMul with the grid of all positions."""

    name = "decompose-affine-grid"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every AffineGrid of ``graph``."""
        nodes = facts.nodes("AffineGrid")
        return replace_each(nodes, facts, lambda node: Replacement(graph, facts, node), _spelt_out)


def _spelt_out(new: Replacement) -> gs.Tensor:
    """Write what the node makes."""
    node, facts = new.node, new.facts
    theta, size = node.inputs
    value = facts.shapes.value(size.name)
    sizes = [] if value is None else list(value.reshape(-1))[2:]
    extents = [extent for extent in sizes if isinstance(extent, int)]
    if not extents or len(extents) != len(sizes):
        raise Declined("the extents of its grid are not known")
    dtype = facts.shapes.dtype(theta.name)
    if dtype is None or dtype == np.float64:
        raise Declined(f"it computes in {'an unknown type' if dtype is None else dtype}")
    aligned = bool(node.attrs.get("align_corners", 0))
    if aligned and 1 in extents:
        raise Declined("it aligns the corners of an axis with one position")
    lines = [
        np.linspace(-1, 1, extent) if aligned else (2 * np.arange(extent) + 1) / extent - 1
        for extent in extents
    ]
    axes = np.meshgrid(*lines, indexing="ij")[::-1]  # x before y before z
    positions = np.stack([*axes, np.ones_like(axes[0])], axis=-1).reshape(-1, len(extents) + 1)
    turned = new.add("Transpose", theta, perm=[0, 2, 1])
    product = new.add("MatMul", positions.astype(dtype), turned)
    return new.add("Reshape", product, np.array([-1, *extents, len(extents)], np.int64))
