"""Tensors whose extent the data decides, in operators that TensorRT builds.

TensorRT for RTX has no operator of its own that returns as many elements as the data says: NonZero and
NonMaxSuppression are refused, and a size that is computed from data is no size to it. What it does
build is an If whose branches differ in shape, in the main graph. So a count becomes an extent bit by
bit:

    bit 2 of the count ── If: 4 elements, else none ──┐
    bit 1 of the count ── If: 2 elements, else none ──┼── Concat ── Shape ── what a Slice ends at
    bit 0 of the count ── If: 1 element,  else none ──┘

The elements themselves are never looked at.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.replacement import Replacement

MOST_ELEMENTS = 1 << 20
"""What may be longer is left to the fallback: the branches hold as many elements in all."""

OPSET = 12
"""From this version on the branches of an If may differ in shape, there are Range and CumSum, and Max
takes integers."""

SCALAR = np.array([], np.int64)
"""What a Reshape to a scalar wants."""


def first(new: Replacement, values: gs.Tensor, count: gs.Tensor, most: int) -> gs.Tensor:
    """Return the first ``count`` of ``values``.

    Args:
        new: Writes the nodes. They belong into the main graph.
        values: One axis, at least ``count`` long.
        count: An int64 of rank 0, from 0 to ``most``.
        most: Positive.
    """
    two = np.array(2, np.int64)
    pieces = []
    for bit in reversed(range(most.bit_length())):
        shifted = new.add("Div", count, np.array(1 << bit, np.int64)) if bit else count
        is_set = new.add("Equal", new.add("Mod", shifted, two), np.array(1, np.int64))
        pieces.append(
            new.add("If", is_set, then_branch=_giving(new, 1 << bit), else_branch=_giving(new, 0))
        )
    extent = new.add("Shape", new.add("Concat", *pieces, axis=0))
    return new.add("Slice", values, np.array([0], np.int64), extent)


def _giving(new: Replacement, count: int) -> gs.Graph:
    """Return a body that gives ``count`` elements."""
    return gs.Graph(outputs=[new.constant(np.zeros(count, np.bool_))], name=f"give_{count}")


def partition(new: Replacement, mask: gs.Tensor, position: gs.Tensor | None = None) -> gs.Tensor:
    """Return the indices of ``mask``, those of true elements first, then the others.

    Args:
        new: Writes the nodes.
        mask: Bools along one axis.
        position: Where the index of each true element goes, if not in the order they stand. Of the
            false ones it is not read.
    """
    ones = new.cast(mask, np.int64)
    upto = new.add("CumSum", ones, np.array(0, np.int64))
    zero, one = np.array(0, np.int64), np.array(1, np.int64)
    length = new.add("Reshape", new.add("Shape", mask), SCALAR)
    indices = new.add("Range", zero, length, one)
    if position is None:
        position = new.add("Sub", upto, one)
    behind = new.add("Sub", new.add("Add", indices, total(new, ones)), upto)
    target = new.add("Where", mask, position, behind)
    return new.add("ScatterElements", indices, target, indices, axis=0)


def total(new: Replacement, counts: gs.Tensor) -> gs.Tensor:
    """Return the sum of all of ``counts``, of rank 0."""
    return new.add("ReduceSum", counts, keepdims=0)
