r"""Spell a discrete Fourier transform of constant length out as a product with a constant matrix.

    before                        after

    x [..., length, parts]        x
    |                             |
    DFT                           Transpose (where another axis is transformed), Reshape
    |                             |
    y [..., bins, 2]              MatMul with cosines and sines
                                  |
                                  Reshape, Transpose
                                  |
                                  y

Why it holds: the transform is linear. With real and imaginary parts side by side, a row of x is a
vector of length * parts numbers, and the matrix has the real and imaginary part of each bin as its
columns. A signal that is cut or padded with zeros to dft_length only leaves rows out; the inverse has
the other sign and 1/n, and, onesided, each bin that stands for two counts twice.

Equal up to rounding: cosines and sines are computed in float64 of angles below one turn, and rounded
once. The sums are as long as the signal, where a fast transform has log2 of that.

It costs length * bins multiplications a row instead of some length * log2(length). A matrix of more
than 16 MiB (some 1,400 real points to as many complex bins) is left to the fallback.

Needs: a static length of the signal and a constant axis and dft_length.
Keeps: the name of y.
Skips, with the reason in the report: what is needed and not known; a matrix beyond the limit; float64;
a onesided transform of complex numbers, which the standard does not define.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array
from optc.passes.match import argument
from optc.passes.replacement import Declined, Replacement, replace_each

LARGEST_BYTES = 16 * 1024 * 1024
"""A larger matrix makes the transform slower than moving the data to the fallback."""


class DecomposeDft(Pass):
    """Spell DFT of constant length out as a MatMul with a constant matrix."""

    name = "decompose-dft"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every DFT of ``graph`` that pays."""
        nodes = facts.nodes("DFT")
        return replace_each(nodes, facts, lambda node: Replacement(graph, facts, node), _spelt_out)


def _spelt_out(new: Replacement) -> gs.Tensor:
    """Write what the node makes."""
    node, facts = new.node, new.facts
    x = node.inputs[0]
    dims, dtype = facts.shapes.dims(x.name), facts.shapes.dtype(x.name)
    if dims is None or dtype is None:
        raise Declined("the shape or type of its signal is not known")
    if dtype == np.float64:
        raise Declined("it computes in float64")
    axis = _number(argument(node, 2), node.attrs.get("axis", 1 if facts.opset < 20 else -2))
    if axis is None:
        raise Declined("its axis is no constant")
    rank = len(dims)
    axis += rank if axis < 0 else 0
    length, parts = dims[axis], dims[-1]
    inverse, onesided = bool(node.attrs.get("inverse", 0)), bool(node.attrs.get("onesided", 0))
    if not isinstance(length, int) or not isinstance(parts, int):
        raise Declined("the length of its signal is not static")
    if onesided and parts != (2 if inverse else 1):
        raise Declined("it is onesided, of numbers for which the standard does not define that")
    count = _number(argument(node, 1), 2 * (length - 1) if inverse and onesided else length)
    if count is None:
        raise Declined("its dft_length is no constant")
    bins = count if inverse or not onesided else count // 2 + 1
    made_parts = 1 if inverse and onesided else 2
    size = length * parts * bins * made_parts * dtype.itemsize
    if size > LARGEST_BYTES:
        raise Declined(
            f"its matrix takes {size >> 20} MiB, which is slower than a fast transform elsewhere"
        )
    matrix = _matrix(length, parts, count, inverse=inverse, onesided=onesided)
    order = list(range(rank))
    order[axis], order[rank - 2] = order[rank - 2], order[axis]
    is_turned = axis != rank - 2
    if is_turned:
        x = new.add("Transpose", x, perm=order)
    kept = [0] * (rank - 2)
    rows = new.add("Reshape", x, np.array([*kept, length * parts], np.int64))
    product = new.add("MatMul", rows, matrix.reshape(length * parts, -1).astype(dtype))
    y = new.add("Reshape", product, np.array([*kept, bins, made_parts], np.int64))
    return new.add("Transpose", y, perm=order) if is_turned else y


def _number(tensor: gs.Tensor | None, default: int) -> int | None:
    """Return the constant that an input is, ``default`` where it is omitted."""
    if tensor is None:
        return int(default)
    return int(tensor.values.item()) if isinstance(tensor, gs.Constant) else None


def _matrix(length: int, parts: int, count: int, *, inverse: bool, onesided: bool) -> Array:
    """Return the transform: point, its part, bin, its part.

    Args:
        length: Points of the signal; those beyond what ``count`` takes count nothing.
        parts: 1 where the signal is real, 2 where it is complex.
        count: Points that are transformed.
        inverse: Whether bins become a signal.
        onesided: Whether only bins up to the middle are there.
    """
    used = count // 2 + 1 if inverse and onesided else count
    points = np.arange(length)
    bins = np.arange(count // 2 + 1 if onesided and not inverse else count)
    angle = 2 * np.pi * (np.outer(points, bins) % count) / count
    cos, sin = np.cos(angle), (np.sin(angle) if inverse else -np.sin(angle))
    matrix: Array = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], axis=1)
    if inverse:
        matrix /= count
    if inverse and onesided:
        twice = (points > 0) & (2 * points < count)  # stands for its mirror image too
        matrix[twice] *= 2
        matrix = matrix[..., :1]
    matrix[used:] = 0
    return matrix[:, :parts]
