r"""Turn a Resize that a target does not know into products with constant matrices.

    before                         after

    x [..., H, W]                  x
    |                              |
    Resize                         MatMul (constant [H', H] on the left)
    |                              |
    y [..., H', W']                MatMul (constant [W, W'] on the right)
                                   |
                                   y

Why it holds: every mode of Resize is linear in x, and treats one axis after the other. Row i of a matrix
is what the same Resize makes of the signal that is 1 at i and 0 elsewhere: it is computed, once, by the
runtime that is the reference. Equal up to rounding. An element that is infinite or NaN spreads along
its rows and columns, as 0 times it is NaN.

For anti-aliasing, tf_crop_and_resize and half_pixel_symmetric, which TensorRT has not. It costs a dense
product where a kernel reads a few neighbours: H multiplications for each element of H' x W, and W for
each of H' x W'. Matrices of more than 4 million elements are left to the fallback.

Needs: static extents along the axes that are resized, which are the last two; constant scales, sizes and
regions.
Keeps: the name of y.
Skips, with the reason in the report: what is needed and not known; sizes that keep the aspect ratio; an
extrapolation value other than 0; other types than float32 and float16.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.evaluation import evaluate
from optc.passes.graph import Array
from optc.passes.match import argument
from optc.passes.replacement import Replacement

LARGEST = 1 << 22
"""Elements of the largest matrix."""

OUTPUT = "resized"


class TurnResizesIntoProducts(Pass):
    """Turn Resize of static extents into a MatMul for each axis."""

    name = "turn-resizes-into-products"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Turn every Resize of ``graph`` that allows it into products."""
        report = Report()
        for node in facts.nodes("Resize"):
            matrices = _matrices(node, facts)
            if isinstance(matrices, str):
                report.skipped[node.name] = matrices
                continue
            new = Replacement(graph, facts, node)
            y: gs.Tensor = node.inputs[0]
            for from_end, matrix in matrices.items():
                product = (matrix.T, y) if from_end == 2 else (y, matrix)
                y = new.add("MatMul", *product)
            new.finish(report, y)
        return report


def _matrices(node: gs.Node, facts: Facts) -> dict[int, Array] | str:
    """Return the matrix [before, after] of each axis, counted from the end, or why there is none."""
    x, attrs, shapes = node.inputs[0], node.attrs, facts.shapes
    dims, dtype = shapes.dims(x.name), shapes.dtype(x.name)
    if dims is None or dtype is None or dtype.name not in ("float32", "float16"):
        return "the shape of what it resizes is not known, or it is no float32 or float16"
    if attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "its sizes keep the aspect ratio"
    if attrs.get("extrapolation_value", 0.0) != 0:
        return "it extrapolates with another number than 0"
    rank = len(dims)
    axes = [int(axis) % rank for axis in attrs.get("axes") or range(rank)]
    given = {}
    for index, key in ((1, "roi"), (2, "scales"), (3, "sizes")):
        tensor = argument(node, index)
        value = None if tensor is None else shapes.constant(tensor.name)
        if tensor is not None and value is None:
            return f"its {key} are no constant"
        given[key] = np.zeros(0, np.float32) if value is None else value.reshape(-1)
    roi, sizes = given["roi"], given["sizes"]
    matrices = {}
    for at, axis in enumerate(axes):
        extent = dims[axis]
        region = roi[[at, at + len(axes)]] if roi.size else roi
        is_same = (sizes[at] == extent) if sizes.size else (given["scales"][at] == 1)
        if is_same and (not region.size or list(region) == [0, 1]):
            continue
        if axis < rank - 2 or not isinstance(extent, int):
            return "it resizes more than the last two axes, or one that is not static"
        to = sizes[at] if sizes.size else given["scales"][at]
        matrix = _matrix(node, extent, to, region, facts.opset)
        if isinstance(matrix, str):
            return matrix
        matrices[rank - axis] = matrix.astype(dtype)
    return matrices


def _matrix(node: gs.Node, extent: int, to: np.generic, region: Array, opset: int) -> Array | str:
    """Return what the Resize makes of each unit vector of one axis: [before, after]."""
    after = extent * float(to) if to.dtype.kind == "f" else float(to)
    if extent * after > LARGEST:
        return f"a matrix of {extent} to {after:.0f} elements is larger than a resize is worth"
    unit = np.array(1, to.dtype) if to.dtype.kind == "f" else np.array(extent, to.dtype)
    along = np.array([unit, to])
    regions = np.array([0, region[0], 1, region[1]], region.dtype) if region.size else region
    empty = gs.Variable.empty()
    inputs = [
        gs.Constant("unit_vectors", np.identity(extent, np.float32)),
        gs.Constant("region", regions) if regions.size else empty,
        *([empty] if to.dtype.kind != "f" else []),
        gs.Constant("to", along),
    ]
    attrs = {key: value for key, value in node.attrs.items() if key != "axes"}
    twin = gs.Node("Resize", node.name, attrs, inputs, [gs.Variable(OUTPUT, np.float32)], domain="")
    found = evaluate([twin], [OUTPUT], opset)
    if OUTPUT not in found.values:
        return f"its matrix cannot be computed: {found.failures.get(node.name)}"
    return found.values[OUTPUT]
